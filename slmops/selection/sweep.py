"""A sweep of recipes: what is asked for, each trial, and the best trades of size for KL divergence."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from slmops.core.files import digest_of_json
from slmops.core.job import Job, Precision
from slmops.core.names import Name
from slmops.core.values import Frozen

HOPELESS = 2.0
"""How many times the KL divergence of a trial that is no larger, on the same first tokens, ends a trial early."""
SHOWN = {"size_mb": "size MB", "size_ratio": "of baseline", "kl_mean": "KL", "perplexity_ratio": "perplexity ratio"}
RULE = (
    "The knee is the point of the front farthest below the line between its ends, with size and KL divergence as "
    "logarithms scaled to 0 to 1."
)
NO_SPEED = "Speed is not measured in a sweep: save a recipe, and `slmops run --precision NAME` measures all of it."


class Sweep(Frozen, use_attribute_docstrings=True):
    """Search the options of recipes for the best trades of size for KL divergence."""

    model: str = Field(min_length=1)
    """Checkpoint, given in the same way as for a job, or 'demo'."""
    base: str | None = Field(None, description="Base model of an adapter, by default the one that it names.")
    name: Name | None = Field(None, description="Name in MLflow; the checkpoint's own by default.")
    precision: list[Precision] = Field([], title="Recipes")
    """Recipes to search, by default all whose file has a [sweep] table."""
    trials: int = Field(20, ge=1, le=10_000)
    """How many to make in all, those of an earlier call of the same search included."""
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False, description="Begin no trial after so many minutes.")
    perplexity_text: Path | None = Field(None, description="UTF-8 text; Python's language reference by default.")
    allow_pickle: bool = Field(False, description="Accept pickled weights (.bin), which can run code when read.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")
    save: Name | None = Field(None, description="Name of a recipe to make of the knee's settings, in the home.")

    @property
    def label(self) -> str:
        return self.name or self.model

    def job(self, recipes: Iterable[str]) -> Job:
        """The job whose baseline and checkpoint its trials have."""
        shared = {*Job.model_fields} & {*Sweep.model_fields} - {"minutes", "precision"}
        return Job(**self.model_dump(include=shared), precision=[*recipes])


class Trial(Frozen):
    """One combination of options, and what came of it."""

    number: int
    recipe: str
    options: dict[str, Any] = Field(description="By pass and option, such as quantize.group_size.")
    outcome: Literal["open", "measured", "stopped", "failed"] = "open"
    detail: str = Field("", description="Why it was stopped, or failed.")
    metrics: dict[str, float] = Field({}, description="By the names that they have in a job.")
    path: Path | None = Field(None, description="Its variant, which is kept while it is on the front.")

    @property
    def variant(self) -> str:
        """Name of its variant: the recipe, and a digest of the options."""
        return f"{self.recipe[:50]}-{digest_of_json(self.options)[:8]}"

    @property
    def text(self) -> str:
        """Its options, ``quantize.group_size=16 quantize.sym=true``."""
        return " ".join(f"{name}={json.dumps(value)}" for name, value in self.options.items()) or "as it is"

    @property
    def ended(self) -> str:
        """Its figures, or why it has none."""
        if self.outcome != "measured":
            return f"{self.outcome}: {self.detail}"
        return f"{self.metrics['size_mb']:.1f} MB at a KL divergence of {self.metrics['kl_mean']:.3g}"


class Swept(Frozen):
    """The result of a sweep. Scripts rely on the JSON form."""

    model: str
    run_id: str = Field(description="The MLflow parent run.")
    trials: tuple[Trial, ...]
    front: tuple[int, ...] = Field(description="Numbers of the trials that no other one beats, the smallest first.")
    knee: int | None = Field(description="Number of the trial at the knee of the front; None: none was measured.")
    saved: Path | None = Field(None, description="The file of the recipe that was made of the knee's settings.")

    @property
    def text(self) -> str:
        """The front as a table, how the other trials ended, and the knee."""
        from tabulate import tabulate

        by_number = {one.number: one for one in self.trials}
        rows = [
            {
                "trial": number,
                "recipe": by_number[number].recipe,
                **{title: f"{by_number[number].metrics[name]:.4g}" for name, title in SHOWN.items()},
                "options": by_number[number].text,
                "": "knee" if number == self.knee else "",
            }
            for number in self.front
        ]
        ended = [one.outcome for one in self.trials]
        counts = ", ".join(f"{ended.count(how)} {how}" for how in ("measured", "stopped", "failed"))
        lines = [f"{len(ended)} trials: {counts}.", RULE, NO_SPEED]
        if self.saved:
            lines.append(f"The knee is now the recipe {self.saved.stem} ({self.saved}).")
        return "\n".join([tabulate(rows, headers="keys", disable_numparse=True), "", *lines])


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The measured trials than which no other is smaller and closer, the smallest first: the Pareto front."""
    found: list[Trial] = []
    for one in sorted((one for one in trials if one.outcome == "measured"), key=_place):
        if not found or _place(one)[1] < _place(found[-1])[1]:
            found.append(one)
    return found


def knee(found: Sequence[Trial]) -> Trial | None:
    """The point of a front that :data:`RULE` names: where the sum of both scaled logarithms is least."""
    logs = [[math.log(max(value, 1e-9)) for value in _place(one)] for one in found]  # KL can be 0
    ends = [(min(axis), max(max(axis) - min(axis), 1e-9)) for axis in zip(*logs, strict=True)]
    sums = [sum((value - low) / width for value, (low, width) in zip(point, ends, strict=True)) for point in logs]
    return found[sums.index(min(sums))] if found else None


def why_hopeless(trials: Sequence[Trial], found: dict[str, float]) -> str | None:
    """The trial that is no larger than what was ``found`` of another, and far closer on the first tokens, as a reason
    not to measure that on all of them; None: there is none."""
    for one in front(trials):
        theirs, ours = one.metrics["first_kl"], found["first_kl"]
        if one.metrics["size_mb"] <= found["size_mb"] and HOPELESS * theirs < ours:
            return f"trial {one.number} is no larger, with a KL divergence of {theirs:.3g} against {ours:.3g}"
    return None


def _place(trial: Trial) -> tuple[float, float]:
    return trial.metrics["size_mb"], trial.metrics["kl_mean"]
