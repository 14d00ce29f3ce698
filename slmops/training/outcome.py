"""How a retraining ends: what may go on to production, and what is said of it."""

from __future__ import annotations

from pathlib import Path

from slmops.core.errors import GateError
from slmops.core.values import Comparison, Measurement
from slmops.training.values import Retrained

POLICY = Path(__file__).with_name("policy.toml")
"""What decides where a retraining is given no policy."""


class RetrainError(GateError):
    """The retraining is done, and what it made does not stay in production; the error carries the result."""

    def __init__(self, result: Retrained, fix: str | None = None) -> None:
        super().__init__(result.detail, fix)
        self.result = result


def worse(base: Measurement, finetuned: Measurement) -> str | None:
    """Why a fine-tuned checkpoint is not worth converting; None if it is.

    Both answered the same questions in the same way.
    """
    if finetuned.value < base.value:
        return (
            f"The fine-tuning made the model worse: accuracy {finetuned.value:.2f}, and {base.value:.2f} before it. "
            "The champion stays."
        )
    return None


def accuracies(base: Measurement, finetuned: Measurement, comparison: Comparison) -> dict[str, Measurement]:
    """Accuracy on the evaluation set, from the base model to each precision."""
    of_variants = {
        result.name: result.measurements["accuracy"]
        for result in comparison.variants
        if "accuracy" in result.measurements
    }
    return {"base": base, "finetuned": finetuned, **of_variants}


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
