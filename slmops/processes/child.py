"""The other end of :func:`slmops.processes.children.call`: the main program, which runs a function of a worker."""

import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel

from slmops.core.errors import SlmopsError
from slmops.core.files import write_atomic


def main(handle: Callable[[Any], BaseModel]) -> None:
    """Read the request file, handle it, write the result file, exit."""
    threading.Thread(target=die_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    request_file, result_file = Path(sys.argv[-2]), Path(sys.argv[-1])
    status = 1
    try:
        try:
            request_type: type[BaseModel] = get_type_hints(handle)["request"]
            request = request_type.model_validate_json(request_file.read_text(encoding="utf-8"))
            answer: dict[str, object] = {"result": handle(request).model_dump(mode="json")}
        except SlmopsError as error:
            traceback.print_exc()
            answer = {"error": type(error).__name__, "message": error.message, "fix": error.fix}
        write_atomic(result_file, json.dumps(answer))
        status = int("error" in answer)
    except BaseException:
        traceback.print_exc()
    finally:
        leave(status)


def leave(status: int) -> None:
    """End without the clean-up of native runtimes, which have crashed there after the work was done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def die_with_parent() -> None:
    """Wait until standard input closes, which happens when the parent is gone, and kill the whole group."""
    while os.read(0, 4096):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    main(getattr(import_module(module), function))
