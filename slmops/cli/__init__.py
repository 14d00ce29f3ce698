"""The command ``slmops``: one module for each group of commands. It may import everything below it. Start reading in
``command.py``, whose table lists all commands; a command's own module is imported only when it is called.
"""
