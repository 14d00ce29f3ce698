"""What to retrain with, and what passes between the stages of a retraining."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from slmops.core.job import Precision
from slmops.core.validation import MATCHER_PATTERN
from slmops.core.values import Frozen, Hardware, Measurement, Name

DEMO = "demo"


class LoraSettings(BaseModel):
    """How the adapter is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(
        16,
        ge=1,
        le=512,
        title="LoRA rank",
        description="Size of the matrices that are trained: larger ones learn more, and cost more.",
    )
    alpha: int = Field(32, ge=1, le=1024, title="LoRA alpha", description="What is learnt counts alpha / rank times.")
    dropout: float = Field(
        0.0, ge=0, lt=1, title="LoRA dropout", description="Share of the adapter's inputs that each step leaves out."
    )
    learning_rate: float = Field(
        1e-3, gt=0, le=1, title="Learning rate", description="Highest, after a short warm-up; it falls to zero."
    )
    epochs: float = Field(3, gt=0, le=1000, title="Epochs", description="Passes over the training items.")
    minutes: float | None = Field(
        None, gt=0, title="Minutes", description="Time budget in place of epochs; then a resumed run is not bit-equal."
    )
    batch_size: int = Field(4, ge=1, le=1024, title="Batch size", description="Items per step.")
    max_tokens: int = Field(
        512, ge=16, title="Longest item", description="Tokens of an item, its chat template included."
    )
    validation_share: float = Field(
        0.1, gt=0, lt=0.5, title="Validation share", description="Training items kept for the validation loss."
    )
    evaluations: int = Field(
        3, ge=1, le=100, title="Evaluations", description="Validations and checkpoints in each epoch."
    )
    patience: int = Field(
        3, ge=1, le=100, title="Patience", description="Validations without a better loss after which it stops."
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**31,
        title="Seed",
        description="Same seed, same data, same weights: of order, initial weights and dropout.",
    )


class Retrain(BaseModel):
    """Fine-tune a checkpoint on data, convert and measure it, and deploy it if it is better."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        min_length=1, title="Base model", description="The checkpoint to fine-tune, as for a job, or 'demo'."
    )
    data: str = Field(
        min_length=1,
        title="Training data",
        description="JSONL of chat messages or of prompt and completion: a file, a folder, a URL, an MLflow artifact "
        "URI, an MLflow dataset as mlflow-dataset:NAME, or 'demo'.",
    )
    evaluation_set: Path | None = Field(
        None,
        title="Evaluation set",
        description="JSONL or CSV of held-out questions; evaluation.jsonl beside the data by default.",
    )
    name: Name | None = Field(
        None, title="Name", description="Name in MLflow and Foundry Local; the base model's own by default."
    )
    training: LoraSettings = Field(LoraSettings(), title="Fine-tuning", description="How the adapter is trained.")
    leak_similarity: float = Field(
        0.8,
        gt=0,
        le=1,
        title="Leak similarity",
        description="Share of common 5-grams of words from which a training item counts as a copy of an evaluation "
        "item.",
    )
    precision: list[Precision] = Field(
        default=["fp32", "int8", "int4"], title="Precisions", description="Variants to make; fp32 is always made."
    )
    policy: Path | None = Field(None, title="Policy", description="Gates and objective of the choice.")
    matcher: str | None = Field(
        None,
        title="Matcher",
        description="Your own Python function FILE.py:FUNCTION(expected, answer) for items with match 'python'.",
        pattern=MATCHER_PATTERN,
    )
    quick: bool = Field(False, title="Quick", description="Fewer repetitions: rougher figures, sooner.")
    approval: bool = Field(
        False, title="Approval", description="Wait until a person has decided about the promotion on the Prefect page."
    )
    serve: bool = Field(
        False, title="Serve", description="Start the service on this machine if the model is not served yet."
    )
    watch_s: int = Field(
        60,
        ge=0,
        le=86400,
        title="Watch",
        description="Seconds to watch the service after the switch, and roll back if it fails; 0: not at all.",
    )

    @property
    def label(self) -> str:
        """What its runs are called by."""
        return self.name or self.model


class Problem(Frozen):
    """Something about one item of the data."""

    file: str
    line: int
    kind: Literal["schema", "roles", "empty", "oversized", "duplicate", "near_duplicate", "leak", "near_leak"]
    fatal: bool = Field(description="The data cannot be used with it.")
    detail: str = Field(description="What is wrong, and with which other item.")


class DataReport(Frozen):
    """What the checks of the data found."""

    files: dict[str, int] = Field(description="Name of each file, and its items.")
    items: int = Field(description="Items that are trained on or validated with.")
    evaluation_items: int
    dropped: int = Field(description="Exact duplicates, each kept once.")
    problems: tuple[Problem, ...]
    tokens: dict[str, float] = Field(
        {}, description="Tokens per item, chat template included: min, p50, p90, p99, max, total."
    )


class TrainingData(Frozen):
    """Checked data, as files of ours: a JSON object with ``messages`` a line, the last of them the assistant's."""

    source: str = Field(description="What the user asked for.")
    digest: str = Field(description="SHA-256 over the training items, whatever files they came in.")
    train: Path
    validation: Path
    evaluation: Path = Field(description="The held-out evaluation set, a copy of ours.")
    evaluation_digest: str = Field(description="SHA-256 of that file.")
    report: DataReport


class LossPoint(Frozen):
    """One point of the loss curves."""

    step: int = Field(description="Optimizer steps so far.")
    epoch: float
    seconds: float = Field(description="Of training, those of earlier attempts included.")
    train_loss: float | None = Field(None, description="Mean over the steps since the last point, in nats per token.")
    validation_loss: float | None = None
    learning_rate: float | None = None


class Finetuned(Frozen):
    """A fine-tuned checkpoint in a folder of its own. The folder's ``training.json`` is this, less ``folder``."""

    key: str = Field(description="Name of the folder: digest of all that went in.")
    base_digest: str
    data_digest: str
    training: LoraSettings
    steps: int
    epochs: float
    best_step: int = Field(description="The step with the lowest validation loss, whose weights these are.")
    validation_loss: float
    stopped: Literal["epochs", "patience", "minutes"]
    losses: tuple[LossPoint, ...]
    precision: Literal["fp32", "bf16"] = Field(description="What the products were computed in.")
    seconds: float
    memory_peak_mb: float
    trained_parameters: int
    versions: dict[str, str]
    hardware: Hardware
    created: datetime
    folder: Path = Field(exclude=True)

    @property
    def adapter(self) -> Path:
        """The LoRA adapter, in peft's format."""
        return self.folder / "adapter"

    @property
    def merged(self) -> Path:
        """The fine-tuned checkpoint in Hugging Face format."""
        return self.folder / "merged"


class Retrained(Frozen):
    """The result of a retraining; the JSON form is a promise to scripts."""

    model: str
    outcome: Literal["promoted", "nothing to do", "refused", "rolled back"]
    detail: str = Field(description="A sentence for people.")
    input_digest: str = Field(description="SHA-256 over data, base model and settings.")
    run_id: str = Field(description="The MLflow run of the retraining.")
    version: int | None = Field(None, description="The version that was made of it.")
    variant: str | None = None
    accuracy: dict[str, Measurement] = Field(
        {}, description="Accuracy on the evaluation set: of base, finetuned and each precision."
    )
    seconds: dict[str, float] = Field({}, description="Stage to seconds.")
    url: str = Field(description="Its page in MLflow.")
