"""What to do: one model that is the flags of ``slmops run``, a job file and the form in the Prefect UI."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError, ValidationInfo, WithJsonSchema, field_validator

from slmops.core.errors import UsageError
from slmops.core.names import NAME_PATTERN, Name
from slmops.core.settings import Settings
from slmops.core.targets import CPU, TARGETS, TargetName
from slmops.core.validation import MATCHER_PATTERN, problems
from slmops.core.values import Checkpoint, Frozen, Room

USUAL = ("fp32", "fp16", "int8", "int4")
SHIPPED = (*USUAL, "int4-small", "int4-calibrated", "bf16")
"""The recipes that come with slmops, as files of :mod:`slmops.conversion.recipe_files`."""
_FORM = [
    {"title": "Comes with slmops", "type": "string", "enum": [*SHIPPED]},
    {"title": "Your own recipe", "type": "string", "pattern": NAME_PATTERN},
]
Precision = Annotated[str, StringConstraints(pattern=NAME_PATTERN), WithJsonSchema({"anyOf": _FORM})]
"""Name of a recipe, shipped or the user's own."""
BASELINE = "fp32"
CHECKPOINT = "checkpoint"
PEER_PREFIX = "llama.cpp-"  # of peers' names; no recipe's name has a dot


class Job(Frozen, use_attribute_docstrings=True):
    """Convert, register, measure and compare one checkpoint."""

    model: str = Field(
        "",
        description="Folder in Hugging Face format or adapter, hub id (org/name or org/name@revision), .gguf file, "
        "MLflow model URI, or 'demo'; by default the one that the Olive config names.",
    )
    base: str | None = Field(None, description="Base model of an adapter, by default the one that it names.")
    name: Name | None = Field(None, description="Name in MLflow and Foundry Local; the checkpoint's own by default.")
    baseline: Literal["fp32", "checkpoint"] | None = None
    """What the variants are judged against: an fp32 variant, or the checkpoint itself, which takes far less memory and
    disk, without fp32 and fp16. By default fp32 if that takes at most 2 GB or an eighth of this machine's memory."""
    olive_config: Path | None = None
    """Your own Olive workflow (JSON) as a variant, named after the file."""
    precision: list[Precision] = Field(default=[], title="Precisions", validate_default=True)
    """Variants to make, by their recipes: fp32, fp16, int8 and int4 by default, or none beside an Olive config. An fp32
    baseline is always made. `slmops recipes` lists what there is, your own included."""
    target: list[TargetName] = Field(default=[CPU], min_length=1, title="Targets")
    """What the variants are for; a GPU takes those of the precisions that make sense there. One variant is chosen for
    each target."""
    int4_block_size: int | None = Field(None, ge=16, le=256, title="int4 block size")
    """Weights that share a scale: 16, 32, 64, 128 or 256; must divide the input size of each layer. By default that of
    the recipe int4."""
    int4_symmetric: bool | None = Field(None, title="int4 symmetric", description="No zero points: less exact.")
    device: Literal["cpu", "gpu"] = Field("cpu", description="What the variants are made for.")
    provider: Literal["CPUExecutionProvider", "CUDAExecutionProvider"] = Field(
        "CPUExecutionProvider", title="Execution provider", description="ONNX Runtime's execution provider."
    )
    output_path: Path | None = Field(None, description="Also put each finished variant into a folder below this one.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", title="Olive log level")
    """How much Olive writes into its log."""
    export_tolerance: float = Field(1e-3, gt=0)
    """Largest logit difference of the fp32 export to the checkpoint, relative to the largest logit."""
    chat_template: Path | None = Field(None, description="Jinja file to use instead of the checkpoint's chat template.")
    allow_pickle: bool = False
    """Accept pickled weights (.bin), which can run code when they are read."""
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")
    max_length: int | None = Field(None, ge=16, title="max_length")
    """Context to deploy, in tokens; by default the model's, as far as its cache takes at most 2 GiB."""
    temperature: float | None = Field(None, ge=0, le=5, title="temperature")
    """Default for applications; by default the checkpoint's own if it wants to be sampled, else 0."""
    top_p: float | None = Field(None, gt=0, le=1, title="top_p", description="Default for applications.")
    repetition_penalty: float | None = Field(None, gt=0, le=5, title="repetition_penalty")
    """Default for applications."""
    evaluation_set: Path | None = None
    """JSONL or CSV of questions and expected answers; general knowledge by default."""
    perplexity_text: Path | None = Field(None, description="UTF-8 text; Python's language reference by default.")
    calibration_text: Path | None = None
    """UTF-8 text like what the model will read and write, for the recipe int4-calibrated; not the perplexity text."""
    matcher: str | None = Field(None, pattern=MATCHER_PATTERN)
    """Your own Python function FILE.py:FUNCTION(expected, answer) for items with match 'python'."""
    policy: Path | None = None
    """Gates and objective of the choice (TOML or YAML); see slmops/selection/policy.toml."""
    prompt_lengths: list[Annotated[int, Field(ge=16)]] = Field(default=[32, 128, 512, 1024], min_length=1)
    """Prompt tokens at which speed is measured; those that the context has no room for are left out."""
    output_lengths: list[Annotated[int, Field(ge=2, le=4096)]] = Field(default=[16], min_length=1)
    """Tokens to generate for each prompt length."""
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    """About how long the text and the questions may take, all models together; fewer of both are used if need be."""
    upload: bool = False
    """Put all accepted variants into the registry whole, for other machines; by default a promotion does that."""
    peer: Literal["llama.cpp"] | None = None
    """Also measure llama.cpp's Q8_0 and Q4_K_M of the checkpoint: a reference that is never chosen."""
    quick: bool = Field(False, description="Fewer repetitions: rougher figures, sooner.")
    remeasure: bool = False
    """Measure anew, instead of taking over what an earlier job measured of the same variants on this machine."""

    if not TYPE_CHECKING:

        def __init__(self, **given: object) -> None:
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise UsageError("\n".join(problems(error, got=True)), "See help(slmops.Job).") from None

        # For pydantic: validation as part of something else keeps its own errors.
        __init__.__pydantic_base_init__ = True

    @field_validator("precision")
    @classmethod
    def _usual(cls, asked: list[Precision], info: ValidationInfo) -> list[Precision]:
        return asked or ([BASELINE] if info.data.get("olive_config") else [*USUAL])

    @property
    def targets(self) -> list[str]:
        """Each target once, the CPU first."""
        return [target for target in TARGETS if target in self.target]

    @property
    def label(self) -> str:
        return self.name or self.model or str(self.olive_config)


@dataclass(frozen=True)
class JobContext:
    """What all stages of one job on one machine share."""

    job: Job
    name: str  # the model's in MLflow and Foundry Local
    checkpoint: Checkpoint
    settings: Settings
    tracking_uri: str = ""
    run_id: str = ""  # the job's run in MLflow; empty until there is one
    room: Room | None = None  # what it is estimated to take of this machine

    @property
    def logs(self) -> Path:
        return self.settings.logs / self.name

    @property
    def work(self) -> Path:
        return self.settings.work(self.name)
