"""Child process: run one Olive workflow. Files on disk prove its success, not what Olive says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slmops.core.values import Frozen
from slmops.processes import child


class OliveRequest(Frozen):
    """A complete Olive workflow config, and the folder in which it must leave its model."""

    config: dict[str, Any]
    output: Path


class OliveResult(Frozen):
    """Whether there is a model at all."""

    produced: bool


def handle(request: OliveRequest) -> OliveResult:
    """Run the workflow."""
    from olive import run

    run(request.config)
    return OliveResult(produced=any(request.output.rglob("*.onnx")))


if __name__ == "__main__":
    child.main(OliveRequest, handle)
