"""Where a training can be taken up: checkpoints that are whole, and loss curves cut off behind them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from slmops.core.files import write_atomic
from slmops.core.values import Frozen
from slmops.training.values import LossPoint

CHECKPOINTS = "checkpoints"
COMPLETE = "complete.json"
"""The file of a checkpoint that is written last, with the sizes of all others."""

Stopped = Literal["epochs", "patience", "minutes"]


class Mark(Frozen):
    """Content of :data:`COMPLETE`."""

    seconds: float
    stopped: Stopped | None
    sizes: dict[str, int]


def resumable(checkpoints: Path) -> tuple[int, Mark] | None:
    """The step of the newest whole checkpoint and its mark; those that are not whole are removed.

    The Trainer writes and removes them in place, so a process that is killed leaves halves. Without the one with the
    best weights none is of use.
    """
    whole: dict[int, Mark] = {}
    for folder in checkpoints.glob("checkpoint-*"):
        mark = _mark(folder)
        if mark is None:
            shutil.rmtree(folder)
        else:
            whole[int(folder.name.rpartition("-")[2])] = mark
    if not whole:
        return None
    newest = max(whole)
    if state_of(checkpoints.parent, newest)["best_global_step"] not in whole:
        shutil.rmtree(checkpoints)
        return None
    return newest, whole[newest]


def mark_whole(folder: Path, seconds: float, stopped: Stopped | None) -> None:
    """Declare that a checkpoint is whole."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != COMPLETE}
    write_atomic(folder / COMPLETE, Mark(seconds=seconds, stopped=stopped, sizes=sizes).model_dump_json())


def _mark(folder: Path) -> Mark | None:
    try:
        mark = Mark.model_validate_json((folder / COMPLETE).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in mark.sizes.items())
    except (OSError, ValueError):
        return None
    return mark if whole else None


def truncate(file: Path, step: int) -> None:
    """Drop the points of a loss curve behind ``step``, and a line that is cut off."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    kept = []
    for line in lines:
        try:
            if LossPoint.model_validate_json(line).step <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    write_atomic(file, "".join(kept))


def state_of(folder: Path, step: int) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(
        (folder / CHECKPOINTS / f"checkpoint-{step}" / "trainer_state.json").read_text(encoding="utf-8")
    )
    return state
