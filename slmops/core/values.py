"""What passes between the modules: small frozen values, each with one JSON form."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MANIFEST = "variant.json"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
"""Name of a model or a variant; it may become part of a path, and MLflow and Foundry Local accept it."""
OF_MACHINE = (
    "convert_",
    "load_",
    "ttft_",
    "itl_",
    "response_",
    "decode_",
    "prefill_",
    "throughput_",
    "memory_",
    "cpu_",
    "energy_",
    "noise_",
)
"""How the names of the metrics begin that depend on the machine; they compare between machines of one kind only."""


class Frozen(BaseModel):
    """Base of all values: unchangeable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def to_name(text: str) -> str:
    """Make a model name out of any text: lower case, with only the characters that MLflow, Foundry Local and
    Prefect all accept.

    >>> to_name("Org/Qwen2.5-0.5B-Instruct")
    'qwen2-5-0-5b-instruct'
    """
    base = text.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9_]+", "-", base).strip("-_")[:63].rstrip("-_") or "model"


class Checkpoint(Frozen):
    """A fine-tuned model in Hugging Face format, checked and ready to convert."""

    name: str = Field(description="Its own name, used where the user gives none.")
    source: str = Field(description="What the user asked for.")
    path: Path = Field(description="Folder with config, weights, tokenizer and chat template.")
    digest: str = Field(description="SHA-256 over the names and contents of all its files.")
    architecture: str = Field(description="First of config.json's architectures, as LlamaForCausalLM.")
    parameters: int = Field(description="Number of weights; tied embeddings count once.")
    size_mb: float = Field(description="Size of the weight files in MB.")
    context_length: int = Field(description="Longest sequence in tokens.")
    tied_embeddings: bool = Field(description="Input embeddings and output head are one tensor.")
    linear_sizes: tuple[int, ...] = Field(description="Input sizes of the linear layers, which a group must divide.")


class Recipe(Frozen):
    """How a variant is made: a named Olive workflow."""

    name: str = Field(pattern=NAME_PATTERN, description="The variant's name: fp32, int4, or the Olive file's stem.")
    config: dict[str, Any] = Field(description="Olive's workflow config, without input model and output folder.")
    bits: Literal[4, 8, 16, 32] | None = Field(None, description="Bits that most weights must have; None: not checked.")
    baseline: bool = Field(False, description="It must compute what the checkpoint computes.")

    @property
    def users_own(self) -> bool:
        """It is a user's Olive file, of which nothing is promised."""
        return self.bits is None


class Hardware(Frozen):
    """The machine that something was made or measured on."""

    system: str
    machine: str
    processor: str
    cores: int
    memory_gb: float
    isa: tuple[str, ...] = Field(description="Instruction sets that matter to the kernels, as avx2.")

    @property
    def kind(self) -> str:
        """What machines must have in common for their speeds to compare: ``Some CPU (Linux x86_64), 2 cores, avx2``.

        Neither the release of the system nor the amount of memory: both change and the machine is the same.
        """
        system, processor = self.system.partition(" ")[0], " ".join(self.processor.split())
        return f"{processor} ({system} {self.machine}), {self.cores} cores, {' '.join(self.isa) or 'no extensions'}"


class VariantFile(Frozen):
    """One file of a variant."""

    name: str
    size: int = Field(description="Bytes.")
    sha256: str


class Weights(Frozen):
    """What the weights of an ONNX model are made of."""

    bits_per_weight: float = Field(
        description="Bytes of all weights and their scales x 8 / parameters of the checkpoint."
    )
    by_bits: dict[str, int] = Field(description="Number of weights stored with so many bits: {'4': ..., '32': ...}.")
    quantized_ops: dict[str, int] = Field(description="Number of operators, as {'MatMulNBits 4 bit': 105}.")


class Variant(Frozen):
    """A converted model in a folder of its own. The folder's ``variant.json`` is this, less ``path``."""

    key: str = Field(description="Name of the folder: recipe name and digest of all that went in.")
    recipe: Recipe
    checkpoint: Checkpoint
    files: tuple[VariantFile, ...]
    weights: Weights
    export_error: float | None = Field(None, description="Largest logit difference to the checkpoint / largest logit.")
    convert_s: float
    convert_memory_peak_mb: float
    versions: dict[str, str]
    hardware: Hardware
    created: datetime
    path: Path = Field(exclude=True)

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe.name

    @property
    def model_mb(self) -> float:
        """Size of the ONNX graph and its data in MB; tokenizer and configs not counted."""
        return sum(file.size for file in self.files if ".onnx" in file.name) / 1e6


class Registration(Frozen):
    """A variant in Foundry Local."""

    foundry_id: str = Field(description="<name>-<variant>-generic-cpu:<version>.")
    path: Path = Field(description="Folder in Foundry's cache layout.")
    prompt_template_exact: bool = Field(description="PromptTemplate renders what the chat template renders.")
    answer: str = Field(description="What the variant answered to the smoke-test prompt.")


class Measurement(Frozen):
    """One figure and how sure it is."""

    value: float
    unit: str
    samples: int = 1
    low: float | None = Field(None, description="Lower end of the 95 % interval; None: too few samples to say.")
    high: float | None = Field(None, description="Upper end of the 95 % interval; of an exact figure, its value.")
    note: str | None = Field(None, description="What to mind, as 'indicative: 12 samples'.")

    @classmethod
    def exact(cls, value: float, unit: str, samples: int = 1) -> Measurement:
        """A figure without uncertainty, as a size or a count."""
        return cls(value=value, unit=unit, samples=samples, low=value, high=value)


class Answer(Frozen):
    """One item of the evaluation set, answered and judged."""

    id: str
    category: str
    prompt: str
    expected: str
    answer: str
    correct: bool | None = Field(description="None: it could not be judged.")
    score: float | None = Field(None, description="From 0 to 1; of matchers that know no degrees 0 or 1.")
    format_valid: bool | None = Field(
        None, description="It has the structure that its item asks for; None: none asked."
    )
    reason: str | None = Field(None, description="Why it could not be judged.")
    finish_reason: str
    seconds: float
    completion_tokens: int


class CurvePoint(Frozen):
    """One figure at one prompt length."""

    name: str
    prompt_tokens: int
    measurement: Measurement


class CaseOutcome(Frozen):
    """One edge case and how the runtime took it."""

    id: str
    expected: str
    outcome: str = Field(description="answered, refused, cut, unequal, failed, crashed or hung.")
    passed: bool
    detail: str


class Evaluation(Frozen):
    """What was measured of one variant."""

    measurements: dict[str, Measurement]
    answers: tuple[Answer, ...]
    cases: tuple[CaseOutcome, ...] = ()
    curves: tuple[CurvePoint, ...] = ()
    samples: tuple[dict[str, float], ...] = Field(description="One row a timed request: the raw figures.")
    evaluation_set_digest: str
    text_digest: str

    @property
    def metrics(self) -> dict[str, float]:
        """Name to value."""
        return {name: measurement.value for name, measurement in self.measurements.items()}


Outcome = Literal["pass", "fail", "inconclusive", "skipped"]


class GateResult(Frozen):
    """One gate of the policy, applied to one variant."""

    gate: str = Field(description="The gate as text, as 'perplexity_ratio at most 1.1'.")
    metric: str
    outcome: Outcome = Field(description="skipped: there is nothing to compare with, as no champion yet.")
    advisory: bool = Field(description="It is reported, and refuses nothing.")
    refuses: bool = Field(description="Because of this gate the variant cannot be chosen.")
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float
    more_samples: int | None = Field(None, description="How many more would settle an inconclusive gate, about.")
    detail: str = Field(description="A sentence for people.")


class VariantResult(Frozen):
    """A variant as the comparison shows it; the JSON form is a promise to scripts."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    reason: str | None = None
    path: Path | None = None
    foundry_id: str | None = None
    run_id: str | None = None
    version: int | None = Field(None, description="Its version in the Model Registry; None: a gate refused it.")
    metrics: dict[str, float] = {}
    measurements: dict[str, Measurement] = Field({}, description="The same with units and intervals.")
    gates: tuple[GateResult, ...] = ()
    dominated_by: str | None = Field(None, description="A variant at least as good in everything and better in some.")


class Choice(Frozen):
    """Which variant is taken, and why."""

    variant: str | None
    reason: str


class Comparison(Frozen):
    """The result of a job."""

    model: str
    run_id: str = Field(description="The MLflow parent run.")
    choice: Choice
    variants: tuple[VariantResult, ...]
