"""Run a worker in a container, in a home of its own, and end its flow runs before itself.

    python deployments/worker.py HOMES COMMAND...

HOMES is a folder that the workers share: each takes the first home in it that nobody holds, so that one that starts
again finds what it has converted and trained, and no home is left behind. It becomes the user's home, as a link.

When a container is stopped, only its first process is told. Prefect's worker would kill its flow runs by force, and
they would be "running" for ever.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from slmops.core.errors import BusyError
from slmops.core.locks import exclusive
from slmops.processes import daemon


@contextmanager
def own_home(homes: Path, link: Path) -> Iterator[Path]:
    """Hold the first free home; ``link`` leads to it."""
    for number in count(1):
        home = homes / str(number)
        try:
            with exclusive(home.with_suffix(".lock"), f"the home {home}", wait=False):
                home.mkdir(exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(home)
                yield home
                return
        except BusyError:
            continue


def run(command: list[str]) -> int:
    """Run the worker until it ends or SIGTERM comes; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    child = subprocess.Popen(command, start_new_session=True)
    try:
        return child.wait()
    except KeyboardInterrupt:
        daemon.stop(daemon.of(child, url=""))
        return 0


def main(homes: Path, command: list[str]) -> int:
    """A worker with a home below ``homes``."""
    with own_home(homes, Path(os.environ["HOME"])) as home:
        print(f"home: {home}", flush=True)
        return run(command)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
