"""Where a killed training resumes: whole saved states, and loss curves that end at them.

transformers calls these states checkpoints, and its names of folders stay.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from slmops.core.files import write_atomic
from slmops.core.values import Frozen
from slmops.training.values import LossPoint, Stopped

STATES = "checkpoints"
WHOLE = "complete.json"


class WholeMark(Frozen):
    """Content of :data:`WHOLE`, the file of a saved state that is written last, with the sizes of the others."""

    seconds: float
    stopped: Stopped | None
    sizes: dict[str, int]


def state_folder(folder: Path, step: int) -> Path:
    """Where the training in ``folder`` saves its state after ``step``."""
    return folder / STATES / f"checkpoint-{step}"


def trainer_state(folder: Path, step: int) -> Any:
    """What the Trainer itself recorded of that state."""
    return json.loads((state_folder(folder, step) / "trainer_state.json").read_text(encoding="utf-8"))


def resumable(folder: Path) -> tuple[int, WholeMark] | None:
    """Find the newest whole state of the training in ``folder``: its step and its mark. Removes broken ones.

    The Trainer writes and deletes states in place, so a killed process leaves parts of them. If the state with the
    best weights is missing, the others are of no use.
    """
    whole: dict[int, WholeMark] = {}
    for state in (folder / STATES).glob("checkpoint-*"):
        with suppress(OSError, ValueError):
            mark = WholeMark.model_validate_json((state / WHOLE).read_text(encoding="utf-8"))
            if all((state / name).stat().st_size == size for name, size in mark.sizes.items()):
                whole[int(state.name.rpartition("-")[2])] = mark
                continue
        shutil.rmtree(state)
    if not whole:
        return None
    newest = max(whole)
    if trainer_state(folder, newest)["best_global_step"] not in whole:
        shutil.rmtree(folder / STATES)
        return None
    return newest, whole[newest]


def mark_whole(state: Path, seconds: float, stopped: Stopped | None) -> None:
    """Declare that the saved state in this folder is whole."""
    sizes = {path.name: path.stat().st_size for path in state.iterdir() if path.name != WHOLE}
    write_atomic(state / WHOLE, WholeMark(seconds=seconds, stopped=stopped, sizes=sizes).model_dump_json())


def truncate(file: Path, step: int) -> None:
    """Drop the points of a loss curve after ``step``, and a line that is cut off."""
    kept = []
    with suppress(ValueError):
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            if LossPoint.model_validate_json(line).step <= step:
                kept.append(line + "\n")
    write_atomic(file, "".join(kept))
