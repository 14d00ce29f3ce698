"""What to look for, and what is remembered of the last look."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from slmops.core.values import Name


class News(BaseModel):
    """Look whether there are new training data for a model, or new versions of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name = Field(title="Name", description="The model's name in the registry.")
    data: str | None = Field(
        None,
        min_length=1,
        title="Training data",
        description="Where its training data come from, as for a retraining; nothing: only versions are looked for.",
    )
    evaluation_set: Path | None = Field(
        None, title="Evaluation set", description="As for a retraining; evaluation.jsonl beside the data by default."
    )
