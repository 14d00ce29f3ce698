"""The command ``slmops``: a module for each group of commands, imported only when one of them is called. Start reading
in ``command.py``, whose table lists all commands."""
