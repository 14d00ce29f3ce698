"""What passes between the packages: small frozen values, each with one JSON form."""

import json
import math
from collections.abc import Callable
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from slmops.core.names import NAME_PATTERN

if TYPE_CHECKING:
    from pandas import DataFrame

MANIFEST = "variant.json"
HEADLINE_METRICS = (
    *("size_mb", "size_ratio", "ttft_ms_p50", "decode_tok_s", "memory_peak_mb"),
    *("perplexity_ratio", "kl_mean", "hf_kl_mean", "hf_top1_agreement", "accuracy"),
)
"""The metrics that a comparison shows where there is no room for all."""


class Frozen(BaseModel):
    """Base of all values: they cannot be changed, and unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", field_title_generator=lambda name, _: name.replace("_", " ").capitalize()
    )

    @classmethod
    def from_file(cls, path: Path, /, **more: object) -> Self | None:
        """The value in a JSON file, with ``more`` fields; None unless all of it is there."""
        try:
            return cls.model_validate({**json.loads(path.read_bytes()), **more})
        except (OSError, ValueError, TypeError):  # TypeError: JSON, but not an object
            return None


def is_weights(file: str) -> bool:
    """Whether a variant's file of this name is an ONNX graph or its data, nothing small."""
    return ".onnx" in file


class Checkpoint(Frozen):
    """A fine-tuned model in Hugging Face format, checked and ready to convert."""

    name: str = Field(description="Its own name, used where the user gives none.")
    source: str = Field(description="What the user asked for.")
    base: str | None = Field(None, description="Base model that an adapter was merged with, and its revision.")
    path: Path = Field(description="Folder with config, weights, tokenizer and chat template.")
    digest: str = Field(description="SHA-256 over the names and contents of all its files.")
    architecture: str = Field(description="First of config.json's architectures, such as LlamaForCausalLM.")
    parameters: int = Field(description="Number of weights; tied embeddings count once.")
    size_mb: float = Field(description="Size of the weight files in MB.")
    context_length: int = Field(description="Longest sequence in tokens that its variants are deployed with.")
    tied_embeddings: bool = Field(description="Input embeddings and output head are one tensor.")
    linear_sizes: tuple[int, ...] = Field(description="Input sizes of the linear layers; groups must divide them.")
    tokenizer_mismatches: int = Field(0, description="Odd texts that Foundry Local reads as other tokens.")
    template_mismatches: int = Field(0, description="Odd conversations that Foundry Local renders otherwise.")


class Agreement(Frozen):
    """How Foundry Local's tokenizer and Jinja differ from those of transformers on one checkpoint."""

    template: str | None = Field(description="The chat template rewritten; None: its own will do.")
    why: str | None = Field(description="How the runtime renders the checkpoint's own.")
    files: dict[str, str] = Field(description="The tokenizer's files rewritten, by name; empty: its own will do.")
    tokenizer_mismatches: tuple[str, ...] = Field(description="Odd texts that it reads as other tokens.")
    template_mismatches: tuple[str, ...] = Field(description="How it renders odd conversations otherwise.")


class Recipe(Frozen):
    """How a variant is made: a named Olive workflow, and settings of the runtime."""

    name: str = Field(pattern=NAME_PATTERN, description="The variant's name: fp32, int4, or a file's stem.")
    config: dict[str, Any] = Field(description="Olive's workflow config, without input model and output folder.")
    bits: Literal[4, 8, 16, 32] | None = Field(None, description="Bits that most weights must have; None: not checked.")
    genai: dict[str, Any] = Field({}, description="What is put into the exporter's genai_config.json.")
    baseline: bool = Field(False, description="It must compute what the checkpoint computes.")

    @property
    def users_own(self) -> bool:
        """It is a user's Olive file, which may do anything."""
        return self.bits is None


class Hardware(Frozen):
    """The machine that something was made or measured on."""

    system: str
    machine: str
    processor: str
    cores: int
    memory_gb: float
    isa: tuple[str, ...] = Field(description="Instruction sets that matter to the kernels, such as avx2.")

    @property
    def kind(self) -> str:
        """What machines must share before their speeds can be compared: ``Some CPU (Linux x86_64), 2 cores, avx2``.

        The release of the system and the amount of memory are not in it: they can change on the same machine.
        """
        system, processor = self.system.partition(" ")[0], " ".join(self.processor.split())
        return f"{processor} ({system} {self.machine}), {self.cores} cores, {' '.join(self.isa) or 'no extensions'}"


class VariantFile(Frozen):
    name: str
    size: int = Field(description="Bytes.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Weights(Frozen):
    """What the weights of an ONNX model are made of."""

    bits_per_weight: float = Field(description="Bytes of all weights and scales x 8 / parameters of the checkpoint.")
    by_bits: dict[str, int] = Field(description="Number of weights by the bits that store each: {'4': ..., '32': ...}.")
    quantized_ops: dict[str, int] = Field(description="Number of operators, such as {'MatMulNBits 4 bit': 105}.")


class Variant(Frozen):
    """A converted checkpoint in a folder of its own. The folder's ``variant.json`` is this without ``path``."""

    key: str = Field(description="Name of the folder: recipe and digest of all inputs.")
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
        return self.recipe.name

    @property
    def model_mb(self) -> float:
        """Size of the ONNX graph and its data in MB, without tokenizer and configs."""
        return sum(file.size for file in self.files if is_weights(file.name)) / 1e6


class Registration(Frozen):
    """A variant in Foundry Local."""

    foundry_id: str = Field(description="<name>-<precision>-generic-cpu:<version>, or the suffix of another target.")
    path: Path = Field(description="Folder in Foundry's cache layout.")
    answer: str = Field(description="What the variant answered to the smoke-test prompt.")
    not_run: str | None = Field(None, description="Why Foundry Local does not run it here.")


class Measurement(Frozen):
    """One figure and its uncertainty."""

    value: float
    unit: str
    samples: int = 1
    low: float | None = Field(None, description="Lower end of the 95 % interval; None: too few samples.")
    high: float | None = Field(None, description="Upper end of the 95 % interval; an exact figure's own value.")
    note: str | None = Field(None, description="A caveat, such as 'indicative: 12 samples'.")
    disturbed: bool = Field(False, description="The machine was busy with something else meanwhile.")

    @classmethod
    def exact(cls, value: float, unit: str, samples: int = 1) -> "Measurement":
        """A figure without uncertainty, such as a size or a count."""
        return cls(value=value, unit=unit, samples=samples, low=value, high=value)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its ends; None if there is none, or if the figure is exact."""
        if self.low is None or self.high is None or not self.low < self.high:
            return None
        return self.low, self.high

    @property
    def text(self) -> str:
        """``1.105 [1.082, 1.129]``, or the value alone; marked if it was disturbed."""
        figures = (self.value, *(self.interval or ()))
        value, *ends = (f"{x:,.0f}" if 1000 <= abs(x) < math.inf else f"{x:.4g}" for x in figures)
        return self.marked(f"{value} [{', '.join(ends)}]" if ends else value)

    def marked(self, text: str) -> str:
        """A text of this figure: ``~62*`` if it was disturbed. :attr:`Comparison.busy` is the footnote."""
        return f"~{text}*" if self.disturbed else text

    def mapped(self, function: Callable[[float], float]) -> Self:
        """A rising function of the figure and of the ends of its interval."""
        figures = {"value": self.value, "low": self.low, "high": self.high}
        return self.model_copy(update={key: None if x is None else function(x) for key, x in figures.items()})


class Answer(Frozen):
    """One item of the evaluation set, answered and judged."""

    id: str
    category: str
    prompt: str
    expected: str
    answer: str
    correct: bool | None = Field(description="None: it could not be judged.")
    score: float | None = Field(None, description="From 0 to 1; exactly 0 or 1 from a matcher that knows no degrees.")
    format_valid: bool | None = Field(None, description="It has the structure that its item asks for, if it asks.")
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
    """One edge case and what the runtime did."""

    id: str
    expected: str
    outcome: str = Field(description="answered, refused, cut, unequal, failed, crashed or hung.")
    passed: bool
    detail: str


class Extent(Frozen):
    """How much of the text and of the evaluation set was measured, the same for all variants of a job."""

    tokens: int
    all_tokens: int
    questions: int
    all_questions: int

    @property
    def text(self) -> str:
        """``8 of 12 questions``, and what the others would have been good for; empty if nothing was left out."""
        text = ("tokens of the text", self.tokens, self.all_tokens)
        said = " and ".join(
            f"{used:,} of {there:,} {what} (with all, intervals would be {math.sqrt(there / used):.1f} times narrower)"
            for what, used, there in (text, ("questions", self.questions, self.all_questions))
            if used < there
        )
        return said and f"Quality was measured with {said}."


class Evaluation(Frozen):
    """All that was measured of one variant."""

    measurements: dict[str, Measurement]
    answers: tuple[Answer, ...]
    cases: tuple[CaseOutcome, ...] = ()
    curves: tuple[CurvePoint, ...] = ()
    samples: tuple[dict[str, float], ...] = Field(description="Raw figures, one row per timed request.")
    evaluation_set_digest: str
    text_digest: str
    extent: Extent

    @property
    def metrics(self) -> dict[str, float]:
        return {name: measurement.value for name, measurement in self.measurements.items()}


Outcome = Literal["pass", "fail", "inconclusive", "skipped"]


class GateResult(Frozen):
    """One gate of the policy, applied to one variant."""

    gate: str = Field(description="The gate as text, such as 'perplexity_ratio at most 1.1'.")
    metric: str
    outcome: Outcome = Field(description="skipped: there is nothing to compare with, for example no champion yet.")
    advisory: bool = Field(description="It is only reported.")
    refuses: bool = Field(description="Because of this gate the variant cannot be chosen.")
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float
    disturbed: bool = Field(False, description="The machine was busy with something else while it was measured.")
    more_samples: int | None = Field(None, description="About how many more would settle an inconclusive gate.")
    detail: str = Field(description="A sentence for people.")


class VariantResult(Frozen):
    """A variant as the comparison shows it. Scripts rely on the JSON form."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    reason: str | None = None
    path: Path | None = None
    foundry_id: str | None = None
    run_id: str | None = None
    version: int | None = Field(None, description="Its number in the Model Registry; None: a gate refused it.")
    metrics: dict[str, float] = {}
    measurements: dict[str, Measurement] = Field({}, description="The same with units and intervals.")
    gates: tuple[GateResult, ...] = ()
    dominated_by: str | None = Field(None, description="A variant at least as good in everything and better in some.")
    extent: Extent | None = None
    not_run: str | None = Field(None, description="Why its speed was not measured.", exclude_if=lambda why: not why)

    @property
    def disturbed(self) -> list[str]:
        """The metrics during whose measurement the machine was busy with something else."""
        return [metric for metric, one in self.measurements.items() if one.disturbed]

    @property
    def accepted(self) -> bool:
        """It is measured, and no gate refuses it."""
        return self.status == "ok" and not any(gate.refuses for gate in self.gates)


class Room(Frozen):
    """Memory and disk of a job: what was estimated before it, and the most that it took."""

    memory_estimated_mb: float
    disk_estimated_mb: float = Field(description="Beyond the variants.")
    memory_peak_mb: float = Field(0, description="Of its process and of a child together, without the servers.")
    disk_peak_mb: float = Field(0, description="What was added to the home beyond the variants.")

    @property
    def text(self) -> str:
        return (
            f"The job took at most {self.memory_peak_mb / 1000:.1f} GB of memory (a conversion alone was estimated at "
            f"{self.memory_estimated_mb / 1000:.1f}) and {self.disk_peak_mb / 1000:.1f} GB of disk beyond the variants "
            f"(estimated: {self.disk_estimated_mb / 1000:.1f})."
        )


class Choice(Frozen):
    variant: str | None
    reason: str


class Comparison(Frozen):
    """The result of a job."""

    model: str
    run_id: str = Field(description="The MLflow parent run.")
    choice: Choice = Field(description="For the first target, which is the CPU unless that is none.")
    variants: tuple[VariantResult, ...]
    baseline: VariantResult | None = Field(None, description="The checkpoint, if it is the baseline; else fp32 is.")
    room: Room | None = Field(None, description="None: other machines did the work.")
    measured_earlier: dict[str, datetime] = Field({}, description="When 'speed', 'quality' were measured, if earlier.")
    peers: tuple[VariantResult, ...] = Field((), description="llama.cpp's files of the checkpoint, for reference.")
    other_choices: dict[str, Choice] = Field({}, description="For the other targets.", exclude_if=lambda them: not them)

    @property
    def failed(self) -> list[str]:
        return [result.name for result in self.variants if result.status == "failed"]

    @property
    def chosen(self) -> list[VariantResult]:
        names = [one.variant for one in (self.choice, *self.other_choices.values())]
        return [one for one in self.variants if one.name in names]

    @property
    def reasons(self) -> list[str]:
        return [self.choice.reason, *(f"For {name}: {one.reason}" for name, one in self.other_choices.items())]

    @property
    def left_out(self) -> str:
        """What was left out of the text and the questions; empty if nothing was."""
        return next((result.extent.text for result in self.variants if result.extent), "")

    @property
    def busy(self) -> str:
        """The footnote of disturbed headline figures: whose they are; empty if there are none."""
        measured = [result for result in (*self.variants, *self.peers) if result.status == "ok"]
        rough = [result.name for result in measured if not set(HEADLINE_METRICS).isdisjoint(result.disturbed)]
        steady = [result.name for result in measured if result.name not in rough and not result.not_run]
        if not rough:
            return ""
        names = ", ".join(rough)
        said = f"* The machine was busy with something else while {names} took a turn: these figures are rough"
        compare = f", do not compare with those of {', '.join(steady)}, which were not disturbed," * bool(steady)
        return f"{said}{compare} and take no part in choosing the fastest. The next run measures them anew."

    def to_frame(self) -> "DataFrame":
        """A pandas frame, one row a variant: its status, whether it was chosen, and a column for each metric."""
        from pandas import DataFrame

        rows = [{"status": one.status, "chosen": one in self.chosen, **one.metrics} for one in self.variants]
        return DataFrame(rows, index=[one.name for one in self.variants])

    def _repr_html_(self) -> str:
        """What a notebook shows: headline figures of each variant, the choice with its reason, what to mind."""
        frame = self.to_frame()
        shown = frame[["status", "chosen", *(metric for metric in HEADLINE_METRICS if metric in frame)]].astype(object)
        for one in self.variants:
            for metric in {*shown}.intersection(one.disturbed):
                shown.loc[one.name, metric] = one.measurements[metric].text
        said = "".join(f"<p>{escape(text)}</p>" for text in (*self.reasons, self.left_out, self.busy) if text)
        return f"{shown.to_html(border=0, float_format='{:.4g}'.format, na_rep='-')}{said}"
