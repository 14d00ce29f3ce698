"""``python -m slmops.cli`` is ``slmops``."""

from slmops.cli.command import main

if __name__ == "__main__":
    main()
