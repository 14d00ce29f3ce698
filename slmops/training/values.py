"""What a retraining is asked for, and what passes between its stages."""

from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from slmops.checkpoints.source import DEMO
from slmops.core.errors import GateError
from slmops.core.job import Precision
from slmops.core.names import Name
from slmops.core.targets import CPU, TargetName
from slmops.core.validation import MATCHER_PATTERN
from slmops.core.values import Frozen, Hardware, Measurement

ProblemKind = Literal["schema", "roles", "empty", "oversized", "duplicate", "near_duplicate", "leak", "near_leak"]
Stopped = Literal["epochs", "patience", "minutes"]
WAITING = "waiting for approval"  # the outcome of a retraining in MLflow until a person has decided
DEFAULT_POLICY = Path(__file__).with_name("policy.toml")  # used when a retraining gets no policy
FIRST_REPEAT_S, DAY_S = 1800, 86400


class LoraSettings(Frozen, use_attribute_docstrings=True):
    """How the adapter is trained."""

    rank: int = Field(16, ge=1, le=512, title="LoRA rank")
    """Size of the matrices that are trained. Larger ones learn more and cost more."""
    alpha: int = Field(32, ge=1, le=1024, title="LoRA alpha")
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1, title="LoRA dropout")
    """Share of the adapter's inputs that each step drops."""
    learning_rate: float = Field(1e-3, gt=0, le=1)
    """Maximum, reached after a short warm-up. It then falls to zero."""
    epochs: float = Field(3, gt=0, le=1000, description="Passes over the training items.")
    minutes: float | None = Field(None, gt=0)
    """Time budget instead of epochs. A resumed training is then not bit-equal."""
    batch_size: int = Field(4, ge=1, le=1024, description="Items per step.")
    max_tokens: int = Field(512, ge=16, title="Longest item")
    """Tokens allowed per item, chat template included."""
    validation_share: float = Field(0.1, gt=0, lt=0.5)
    """Share of the training items used for the validation loss."""
    evaluations: int = Field(3, ge=1, le=100, description="Validations, and saved states, per epoch.")
    patience: int = Field(3, ge=1, le=100, description="Stop after this many validations without a better loss.")
    seed: int = Field(0, ge=0, le=2**31)
    """Of order, initial weights and dropout. The same seed and data give the same weights."""


class Retrain(Frozen, use_attribute_docstrings=True):
    """Fine-tune a checkpoint on data, convert and measure it, and deploy it if it is better."""

    model: str = Field(min_length=1, title="Base model")
    """The checkpoint to fine-tune, given in the same way as for a job, or 'demo'."""
    data: str = Field(
        min_length=1,
        title="Training data",
        description="JSONL with chat messages, or with prompt and completion: a file, a folder, a URL, an MLflow "
        "artifact URI, mlflow-dataset:NAME for an MLflow dataset, or 'demo'.",
    )
    evaluation_set: Path | None = None
    """JSONL or CSV with held-out questions. Default: evaluation.jsonl or .csv beside the data."""
    name: Name | None = Field(None, description="Name in MLflow and Foundry Local. Default: the base model's own name.")
    training: LoraSettings = Field(LoraSettings(), title="Fine-tuning", description="How the adapter is trained.")
    leak_similarity: float = Field(0.8, gt=0, le=1)
    """Similarity (Jaccard, of 5-grams of words) at which a training item counts as a copy of an evaluation item."""
    precision: list[Precision] = Field(default=["fp32", "int8", "int4"], title="Precisions")
    """Variants to make. fp32 is always made."""
    target: list[TargetName] = Field(default=[CPU], min_length=1, title="Targets")
    """What the variants are for. One is chosen for each target, and all are promoted as one release."""
    policy: Path | None = Field(None, description="TOML file with the gates and the objective.")
    matcher: str | None = Field(None, pattern=MATCHER_PATTERN)
    """Your Python function FILE.py:FUNCTION(expected, answer) for items with match 'python'."""
    quick: bool = Field(False, description="Fewer repetitions: results come sooner and are less exact.")
    approval: bool = Field(False, description="Wait until a person has decided on the promotion on the Prefect page.")
    serve: bool = Field(False, description="Start the service on this machine if the model is not served yet.")
    watch_s: int = Field(60, ge=0, le=86400, title="Watch")
    """Seconds to watch the service after the switch, and to roll back if it fails. 0 means not at all."""

    @property
    def label(self) -> str:
        return self.name or self.model

    def absolute(self) -> Self:
        """The same with absolute paths, for a worker that runs in another folder."""

        def absolute(text: str | Path) -> str:
            path = Path(text).expanduser()
            return str(path.absolute() if path.exists() and text != DEMO else text)

        given = {name: getattr(self, name) for name in ("model", "data", "evaluation_set", "policy")}
        changed = {name: absolute(text) for name, text in given.items() if text is not None}
        if self.matcher is not None:
            file, _, function = self.matcher.rpartition(":")
            changed["matcher"] = f"{absolute(file)}:{function}"
        return self.model_validate({**self.model_dump(exclude_unset=True), **changed})


class Schedule(Frozen, use_attribute_docstrings=True):
    """When the deployments of a model run by themselves; what is not given is only run by hand."""

    retrain: str | None = Field(None, title="Retraining")
    """Cron expression, such as '0 2 * * *'. A retraining without new data or settings does nothing."""
    remeasure: str | None = Field(None, title="Remeasurement", description="Cron expression, such as '0 4 * * 0'.")
    news_minutes: int | None = Field(None, ge=1, title="Minutes between looks for news")
    """Look this often for new training data, which start a retraining, and for new versions."""
    timezone: str = Field("UTC", title="Time zone", description="Of the cron expressions, such as Europe/Berlin.")


class Deploy(Retrain):
    """A retraining that a model's own deployments repeat, and when."""

    name: Name = Field(description="Name in MLflow and Foundry Local, and of the deployments.")
    schedule: Schedule = Field(Schedule(), description="When they run by themselves.")
    notify: str | None = None
    """A notification block of Prefect, as TYPE/NAME, that tells of runs that failed, of roll-backs and of devices."""

    @property
    def retraining(self) -> dict[str, Any]:
        """What its retraining is asked for, as JSON; what was not given is left to the defaults."""
        return self.model_dump(mode="json", exclude_unset=True, exclude={"schedule", "notify"})


class News(Frozen, use_attribute_docstrings=True):
    """Look for new training data of a model, or for new versions of it."""

    name: Name = Field(description="The model's name in the registry.")
    data: str | None = Field(None, min_length=1, title="Training data")
    """Where its training data come from, given as for a retraining. Without it only versions are looked for."""
    evaluation_set: Path | None = None
    """JSONL or CSV with held-out questions. Default: evaluation.jsonl or .csv beside the data."""


class Seen(BaseModel, frozen=True):
    """What one look leaves for the next."""

    version: int | None = Field(None, description="The highest number in the registry.")
    data: str | None = Field(None, description="Digest of the training items that are not new.")
    told: str | None = Field(None, description="Digest of the training items that the last event was about.")
    times: int = Field(0, description="How many events there were about them.")
    again: float = Field(0, description="When the next one is due, in seconds since 1970.")

    def look_at_data(self, digest: str, used: str | None, now: float) -> "tuple[Seen, bool]":
        """What to remember, and whether an event about the training items with this digest is due.

        They are new until a retraining has used them, which an event does not ensure: the retraining may fail, or
        nothing listens. So the event is repeated: after half an hour, then after twice as long each time, up to a day.
        The last retraining used the digest ``used``. ``now`` is in seconds since 1970.
        """
        if self.data is None or digest in (self.data, used):  # at the first look nothing is new
            return Seen(version=self.version, data=digest), False
        times = self.times if digest == self.told else 0
        if times and now < self.again:
            return self, False
        again = now + min(FIRST_REPEAT_S * 2**times, DAY_S)
        return self.model_copy(update={"told": digest, "times": times + 1, "again": again}), True


class DataProblem(Frozen):
    file: str
    line: int
    kind: ProblemKind
    detail: str = Field(description="What is wrong, and with which other item.")


class DataReport(Frozen, use_attribute_docstrings=True):
    files: dict[str, int] = Field(description="Name of each file, and its number of items.")
    items: int = Field(description="Items for training and validation.")
    evaluation_items: int
    dropped: int = Field(description="Exact duplicates, of which one each is kept.")
    problems: tuple[DataProblem, ...]
    tokens: dict[str, float] = Field({})
    """Tokens per item, chat template included: min, p50, p90, p99, max, total."""


class TrainingData(Frozen):
    """Checked data in our own files: one JSON object with ``messages`` per line, the last message the assistant's."""

    source: str = Field(description="What the user asked for.")
    digest: str = Field(description="SHA-256 over the training items, independent of their files.")
    train: Path
    validation: Path
    evaluation: Path = Field(description="Our copy of the held-out evaluation set.")
    evaluation_digest: str = Field(description="SHA-256 of that file.")
    report: DataReport


class LossPoint(Frozen):
    step: int = Field(description="Optimizer steps so far.")
    epoch: float
    seconds: float = Field(description="Of training, including earlier attempts.")
    train_loss: float | None = Field(None, description="Mean over the steps since the last point, in nats per token.")
    validation_loss: float | None = None
    learning_rate: float | None = None


class TrainingResult(Frozen):
    steps: int
    epochs: float
    best_step: int = Field(description="The step with the lowest validation loss. Its weights are the result.")
    validation_loss: float
    stopped: Stopped
    seconds: float
    trained_parameters: int


class Finetuned(TrainingResult):
    """A fine-tuned checkpoint in its own folder, whose ``training.json`` is this without ``folder``."""

    key: str = Field(description="Name of the folder: a digest of every input.")
    base_digest: str
    data_digest: str
    training: LoraSettings
    losses: tuple[LossPoint, ...]
    precision: Literal["fp32", "bf16"] = Field(description="Of the matrix products while training.")
    memory_peak_mb: float
    versions: dict[str, str]
    hardware: Hardware
    created: datetime
    folder: Path = Field(exclude=True)

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"


class Retrained(Frozen, use_attribute_docstrings=True):
    """The result of a retraining. Scripts rely on its JSON form."""

    model: str
    outcome: Literal["promoted", "nothing to do", "refused", "rolled back", "waiting for approval"]
    detail: str = Field(description="A sentence for people.")
    input_digest: str = Field(description="SHA-256 over data, base model and settings.")
    run_id: str = Field(description="The MLflow run of the retraining.")
    version: int | None = Field(None, description="The registered version of the result.")
    variant: str | None = None
    accuracy: dict[str, Measurement] = Field({})
    """Accuracy on the evaluation set of base, finetuned and each precision."""
    seconds: dict[str, float] = Field({}, description="Stage to seconds.")
    url: str = Field(description="Its page in MLflow.")

    @property
    def text(self) -> str:
        """What ``slmops retrain`` prints."""
        from tabulate import tabulate

        lines = [f"{self.outcome}: {self.detail}"]
        if self.accuracy:
            rows = [
                (name, f"{one.value:.2f}", "" if one.low is None else f"[{one.low:.2f}, {one.high:.2f}]", one.samples)
                for name, one in self.accuracy.items()
            ]
            headers = ["", "accuracy", "95 % interval", "questions"]
            lines += ["", tabulate(rows, headers=headers, disable_numparse=True)]
        if self.seconds:
            times = [(stage, f"{seconds:.0f}") for stage, seconds in self.seconds.items()]
            lines += ["", tabulate(times, headers=["stage", "seconds"], disable_numparse=True)]
        return "\n".join(lines)


class RetrainError(GateError):
    """The retraining is done, but its version does not stay in production. The error carries the result."""

    def __init__(self, result: Retrained, fix: str | None = None) -> None:
        super().__init__(result.detail, fix)
        self.result = result
