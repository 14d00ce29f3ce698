"""The policy: gates that a variant must pass, and the objective by which one of those that pass is taken.

``policy.toml`` beside this module is the default and explains the format.
"""

import difflib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, ValidationError, ValidationInfo, field_validator, model_validator

from slmops.core.errors import UsageError
from slmops.core.files import read_table
from slmops.core.names import Name
from slmops.core.validation import predicate
from slmops.core.values import Frozen

PACKAGED = Path(__file__).with_name("policy.toml")
CATEGORY = "accuracy."
_NAMES = """
size_mb size_ratio size_source_ratio bits_per_weight load_s load_cold_s
ttft_ms_p50 ttft_ms_p90 ttft_ms_p99 ttft_model_ms_p50 itl_ms_p50 itl_ms_p90 itl_ms_p99
response_s_p50 response_s_p90 response_s_p99 decode_tok_s prefill_tok_s decode_consistency
throughput_tok_s_c1 throughput_tok_s_c2 throughput_tok_s_c4
memory_before_mb memory_loaded_mb memory_peak_mb memory_unloaded_mb cpu_percent cpu_percent_total
energy_j_per_token noise_percent
perplexity perplexity_ratio kl_mean kl_median kl_p99 kl_max top1_agreement
hf_perplexity_ratio hf_kl_mean hf_top1_agreement
accuracy accuracy_drop flips mcnemar_p score score_drop format_valid truncated_rate stop_rate length_ratio unscored
edge_cases_passed convert_s convert_memory_peak_mb tokenizer_mismatches template_mismatches
"""
KNOWN_METRICS = frozenset(_NAMES.split())

Limit = Annotated[float, Field(allow_inf_nan=False)]


class Gate(Frozen):
    """One metric and the limit that it must keep."""

    metric: str
    of: Literal["value", "difference", "ratio"] = "value"
    to: Literal["baseline", "champion"] | None = None
    max: Limit | None = None
    min: Limit | None = None
    advisory: StrictBool = False
    inconclusive: Literal["refuse", "accept"] = "refuse"

    @field_validator("metric")
    @classmethod
    def _made(cls, metric: str) -> str:
        if metric not in KNOWN_METRICS and not (metric.startswith(CATEGORY) and metric != CATEGORY):
            raise ValueError(f"there is no metric {metric!r}; {_like(metric, [*KNOWN_METRICS, 'accuracy.CATEGORY'])}")
        return metric

    @field_validator("max", "min", mode="before")
    @classmethod
    def _number(cls, limit: Any, info: ValidationInfo) -> Any:
        # Text stays allowed: YAML reads 1e-2, without a point, as text.
        if isinstance(limit, bool):
            raise ValueError(f"{info.field_name} must be a number, not {limit}")
        return limit

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.max is None) == (self.min is None):
            raise ValueError("give exactly one of max and min")
        if self.of == "value" and self.to is not None:
            raise ValueError(f"'to' = {self.to!r} needs 'of' = 'difference' or 'ratio'")
        if self.of != "value" and self.to is None:
            raise ValueError(f"'of' = {self.of!r} needs 'to' = 'baseline' or 'champion'")
        if self.of == "ratio" and self.limit <= 0:
            raise ValueError(f"the limit of a ratio must be above 0, not {self.limit:g}")
        return self

    @property
    def limit(self) -> float:
        """``max`` or ``min``, whichever is given."""
        limit = self.min if self.max is None else self.max
        assert limit is not None  # noqa: S101 - by _makes_sense
        return limit

    @property
    def bound(self) -> str:
        """The limit in words: ``at most 1.1``; of a difference ``at most 0.1 below``."""
        upper = self.max is not None
        if self.of != "difference":
            return f"at {'most' if upper else 'least'} {self.limit:g}"
        if self.limit == 0:
            return f"not {'above' if upper else 'below'}"
        above = self.limit > 0
        return f"at {'most' if upper == above else 'least'} {abs(self.limit):g} {'above' if above else 'below'}"

    @property
    def text(self) -> str:
        """The gate in words: ``perplexity at most 1.1 times the baseline's``."""
        whose = {"value": "", "difference": f" the {self.to}'s", "ratio": f" times the {self.to}'s"}[self.of]
        return f"{self.metric} {self.bound}{whose}"


class Policy(Frozen):
    """What a variant must reach, and which of those that reach it is taken."""

    objective: Literal["preference", "smallest", "fastest", "best_quality"] = "preference"
    preference: tuple[Name, ...] = ()
    gates: tuple[Gate, ...] = ()

    @field_validator("preference")
    @classmethod
    def _once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise ValueError(f"preference names {', '.join(twice)} more than once")
        return names


def load(path: Path | None = None) -> Policy:
    """Read a policy (TOML by the suffix ``.toml``, else YAML), or the packaged one; UsageError: all that is wrong."""
    data = read_table(path or PACKAGED, "policy")
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        problems = "\n".join(f"  {_problem(one, data)}" for one in error.errors())
        raise UsageError(
            f"The policy {path or PACKAGED} cannot be used:\n{problems}", f"The format is explained in {PACKAGED}."
        ) from None


def _problem(error: Any, data: dict[str, Any]) -> str:
    """One of pydantic's errors as a line: where it is, what is wrong, what is accepted."""
    model: type[Frozen] = Policy
    place = ""
    keys = list(error["loc"])
    if keys[0] == "gates" and len(keys) > 1:
        gate = data["gates"][keys[1]]
        metric = gate.get("metric") if isinstance(gate, dict) else None
        place = f"gate {keys[1] + 1} ({metric or 'no metric'}): "
        model, keys = Gate, keys[2:]
    key = ".".join(str(part + 1) if isinstance(part, int) else str(part) for part in keys)
    match error["type"]:
        case "extra_forbidden" | "invalid_key":  # invalid: YAML has keys that are no text
            key = str(keys[-1])
            said = f"there is no key {key!r}; {_like(key, model.model_fields)}"
        case "missing":
            said = f"{key} is missing"
        case "value_error":
            said = predicate(error)
        case kind:
            said = f"{key or 'it'} {predicate(error)}, not {error['input']!r}"
            said += ": write [[gates]]" if (kind, key) == ("tuple_type", "gates") else ""
    return place + said


def _like(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known))
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(sorted(known))}"
