"""How a retraining ends: what may go to production, and what people read about it."""

from __future__ import annotations

from pathlib import Path

from slmops.core.errors import GateError
from slmops.core.values import Comparison, Measurement
from slmops.training.values import Retrained

DEFAULT_POLICY = Path(__file__).with_name("policy.toml")
"""Used when a retraining gets no policy."""


class RetrainError(GateError):
    """The retraining is done, but its version does not stay in production. The error carries the result."""

    def __init__(self, result: Retrained, fix: str | None = None) -> None:
        super().__init__(result.detail, fix)
        self.result = result


def worse(base: Measurement, finetuned: Measurement) -> str | None:
    """Say why a fine-tuned checkpoint of this accuracy is not worth converting; None if it is."""
    if finetuned.value >= base.value:
        return None
    return (
        f"The fine-tuning made the model worse: accuracy {base.value:.2f} before it, {finetuned.value:.2f} after it. "
        "The champion stays."
    )


def accuracies(comparison: Comparison) -> dict[str, Measurement]:
    """Accuracy of each precision on the evaluation set."""
    return {one.name: one.measurements["accuracy"] for one in comparison.variants if "accuracy" in one.measurements}


def text(result: Retrained) -> str:
    """What ``slmops retrain`` prints."""
    from tabulate import tabulate

    lines = [f"{result.outcome}: {result.detail}"]
    if result.accuracy:
        rows = [
            [name, f"{one.value:.2f}", f"[{one.low:.2f}, {one.high:.2f}]" if one.low is not None else "", one.samples]
            for name, one in result.accuracy.items()
        ]
        table = tabulate(rows, headers=["", "accuracy", "95 % interval", "questions"], disable_numparse=True)
        lines += ["", table]
    if result.seconds:
        rows = [[stage, f"{seconds:.0f}"] for stage, seconds in result.seconds.items()]
        lines += ["", tabulate(rows, headers=["stage", "seconds"], disable_numparse=True)]
    return "\n".join(lines)
