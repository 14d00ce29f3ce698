"""The small text files of a checkpoint, read with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from slmops.core.errors import CheckpointError

COPY_AGAIN = "Copy or download the checkpoint again."


def read_text(path: Path, where: str) -> str:
    """The content of a file in UTF-8; a CheckpointError calls it ``where``."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise CheckpointError(f"{where} cannot be read: {reason}.", "Give a readable file in UTF-8.") from error


def read_json(path: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file; a CheckpointError calls it ``where``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}", COPY_AGAIN) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} is not a JSON object.", COPY_AGAIN)
    return content


def read_if_there(folder: Path, name: str, where: str | None = None) -> dict[str, Any]:
    """The object in a checkpoint's JSON file, empty without one; a CheckpointError calls the folder ``where``."""
    path = folder / name
    return read_json(path, f"{where or folder}/{name}") if path.is_file() else {}
