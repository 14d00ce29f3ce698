"""What the commands print: data on stdout, everything else on stderr."""

import io
import logging
import os
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from pydantic import BaseModel

Flat = Parameter(name="*")  # each field of the model is an option
Json = Annotated[bool, Parameter(help="Print the result as JSON.")]
Model = Annotated[str, Parameter(help="The model.")]


def speak_utf8() -> None:
    """Write what a file or another program reads as UTF-8, and let no character end a command.

    Windows has its own encodings there, such as cp1252; its console takes all characters.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def output(text: str) -> None:
    """Print on stdout. A reader that has left, such as ``head``, has all that it wants: that is not a failure."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits


def show(value: "BaseModel", text: str, *, json: bool, page: str | None = None) -> None:
    """Print a result as text or JSON, and on stderr where its page in MLflow is."""
    output(value.model_dump_json(indent=2) if json else text)
    if page is not None:
        say(f"\nin MLflow: {page}")


def log_to_stderr() -> None:
    """Send the log of slmops to stderr, with the time before each line."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Format())
    logger = logging.getLogger("slmops")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"{datetime.now():%H:%M:%S} {level}{record.getMessage()}"
