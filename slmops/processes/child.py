"""The other end of :func:`slmops.processes.children.call`: the main program, which runs functions of workers."""

import contextlib
import ctypes
import gc
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any, get_type_hints

from pydantic import BaseModel

from slmops.core.errors import SlmopsError
from slmops.core.files import write_atomic
from slmops.processes import tree

DONE = b"\0done\n"
"""Follows the last output of a call."""


def main() -> None:
    """Do the calls that are read from standard input, one after the other, until it closes."""
    calls: SimpleQueue[bytes] = SimpleQueue()
    die_with_parent(calls.put)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    while True:
        _do(**json.loads(calls.get()))


def _do(*, worker: str, request: str, result: str, cwd: str, stays: bool) -> None:
    """Read the request file, handle it, write the result file, and say so."""
    try:
        os.chdir(cwd)
        module, _, function = worker.partition(":")
        handle: Callable[[Any], BaseModel] = getattr(import_module(module), function)
        request_type: type[BaseModel] = get_type_hints(handle)["request"]
        try:
            asked = request_type.model_validate_json(Path(request).read_text(encoding="utf-8"))
            answer: dict[str, object] = {"result": handle(asked).model_dump(mode="json")}
        except SlmopsError as error:
            traceback.print_exc()
            answer = {"error": type(error).__name__, "message": error.message, "fix": error.fix}
        if stays:
            _give_memory_back()
        write_atomic(Path(result), json.dumps(answer))
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(1, DONE)
    except BaseException:
        traceback.print_exc()
        leave(1)


def _give_memory_back() -> None:
    """What a call no longer needs is not to count for the next one."""
    gc.collect()
    gc.freeze()  # libraries are a million objects, through which each later collection would go
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def leave(status: int) -> None:
    """End without the clean-up of native runtimes, which have crashed there after the work was done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def die_with_parent(heard: Callable[[bytes], None] = lambda _: None) -> None:
    """Tell each line of standard input, in a thread; when it closes, the parent is gone: kill all that is ours.

    Standard input is then empty for others. On Windows numpy, which looks at it when it is imported, would wait for
    the next line: https://github.com/numpy/numpy/issues/24290.
    """
    lines = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def listen() -> None:
        for line in lines:
            heard(line)
        tree.kill_own()

    threading.Thread(target=listen, daemon=True).start()


if __name__ == "__main__":
    main()
