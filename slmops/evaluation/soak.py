"""Soak: does the runtime's memory grow with the number of requests that a variant answers?

The requests are sent, one after the other, in a child process, which runs this module.
"""

import faulthandler
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from pydantic import Field

from slmops.core.errors import EvaluationError, GateError, UsageError
from slmops.core.settings import Settings
from slmops.core.values import Comparison, Frozen, Measurement, Outcome
from slmops.processes import children

log = logging.getLogger(__name__)

UNIT = "KB/request"
LENGTHS = [32, 64, 128, 256]  # tokens of the prompts, in turn; a conversation of three questions ends each turn
SOAK_TOKENS = 16
REQUEST_LIMIT_S = 300.0
PROGRESS = "soak: "
EVERY = 50
WARM_UP_LEAST = 20
ENDS = 10  # the memory at the start, and at the end, is the median over so many requests


class Soak(Frozen, use_attribute_docstrings=True):
    """Ask a variant many times and see whether its memory grows."""

    name: str | None = Field(None, description="The model; that of the latest comparison by default.")
    variant: str | None = Field(None, description="The variant; the chosen one by default.")
    champion: bool = Field(False, description="Soak what is deployed, the way a device gets it from the registry.")
    requests: int = Field(300, ge=30, description="Requests to send after a warm-up of a tenth of them, at least 20.")
    max_kb_per_request: float = Field(10, gt=0, allow_inf_nan=False, title="Limit")
    """KB (10^3 bytes) by which the memory may grow with each request, on average."""

    @property
    def warm_up(self) -> int:
        """Requests to send first, because of allocations that happen once."""
        return max(WARM_UP_LEAST, self.requests // 10)


class SoakRequest(Frozen):
    home: Path
    foundry_id: str
    warm_up: int
    requests: int


class SoakSeries(Frozen):
    """Private memory of the process in KB (10^3 bytes) after each request, without the warm-up."""

    memory_kb: tuple[float, ...]


class Target(Frozen):
    model: str
    variant: str
    foundry_id: str
    version: int | None = Field(None, description="Its number in the registry; None: it is a variant of this home.")


class SoakResult(Target):
    """The result of a soak; the JSON form is a promise to scripts."""

    outcome: Outcome
    slope: Measurement = Field(description="Growth of the memory in KB per request.")
    limit: float = Field(description="The most that is allowed, in the same unit.")
    more_requests: int | None = Field(None, description="About how many more would settle an inconclusive soak.")
    memory_start_mb: float = Field(description="Median of the first ten requests after the warm-up.")
    memory_end_mb: float = Field(description="Median of the last ten.")
    detail: str = Field(description="A sentence for people.")
    run_id: str | None = Field(None, description="Its MLflow run.")

    @property
    def metrics(self) -> dict[str, float]:
        """For MLflow, without the ends of a missing interval."""
        slope = {"": self.slope.value, "_low": self.slope.low, "_high": self.slope.high}
        return {
            **{f"soak_slope_kb_per_request{end}": value for end, value in slope.items() if value is not None},
            "soak_requests": float(self.slope.samples),
            "memory_start_mb": self.memory_start_mb,
            "memory_end_mb": self.memory_end_mb,
        }

    @property
    def text(self) -> str:
        """What ``slmops soak`` prints."""
        memory = f"{self.memory_start_mb:.1f} MB at the start, {self.memory_end_mb:.1f} MB at the end"
        return f"{self.outcome}: {self.detail}\nmemory of the process: {memory}"


class SoakError(GateError):
    """The memory grows, or nothing shows that it does not."""

    def __init__(self, result: SoakResult) -> None:
        if result.outcome == "fail":
            fix = "The series is in MLflow, as soak_memory_mb."
        elif result.more_requests is None:
            fix = "More requests would hardly settle it: the growth is close to the limit."
        else:
            fix = f"Repeat it with about --requests {result.slope.samples + result.more_requests}."
        super().__init__(result.detail, fix)
        self.result = result


def check(request: Soak) -> None:
    """Raise a UsageError for a champion without a model's name, or together with a variant."""
    if request.champion and request.name is None:
        raise UsageError("--champion needs the name of a model.", "`slmops soak NAME --champion`")
    if request.champion and request.variant is not None:
        raise UsageError("--champion and --variant exclude each other.", "Give one of them.")


def find(comparison: Comparison, wanted: str | None) -> Target:
    """The wanted variant, or the chosen one; UsageError if there is none that can be asked."""
    usable = {one.name: one.foundry_id for one in comparison.variants if one.status == "ok" and one.foundry_id}
    known = ", ".join(usable) or "none"
    name = wanted or comparison.choice.variant
    if name is None:
        raise UsageError(f"No variant of {comparison.model} was chosen.", f"Name one with --variant: {known}.")
    found = next((one for one in comparison.variants if one.name == name), None)
    if found is None:
        raise UsageError(f"{comparison.model} has no variant {name!r}.", f"Its variants: {known}.")
    if name not in usable:
        said = f"The variant {name} of {comparison.model} cannot be asked: {found.reason or found.status}."
        raise UsageError(said, f"Variants that can: {known}.")
    return Target(model=comparison.model, variant=name, foundry_id=usable[name])


def measure(target: Target, request: Soak, home: Path, settings: Settings) -> tuple[SoakResult, tuple[float, ...]]:
    """Soak a registered variant; the result, and the memory in KB after each request. The caller holds the lock."""
    warm_up, requests = request.warm_up, request.requests
    log.info("%s: soaking with %d requests", target.variant, requests)
    measured, _ = children.call(
        handle,
        SoakRequest(home=home, foundry_id=target.foundry_id, warm_up=warm_up, requests=requests),
        log=settings.logs / target.model / f"{target.variant}.soak.log",
        timeout_s=(warm_up + requests) * REQUEST_LIMIT_S,
        error=EvaluationError,
        env=children.STEADY_MALLOC,  # the allocator's own steps would hide a leak, or look like one
        on_line=lambda line: log.info("%s", line) if line.startswith(PROGRESS) else None,
    )
    return judge(target, measured.memory_kb, request.max_kb_per_request), measured.memory_kb


def judge(target: Target, memory_kb: Sequence[float], limit: float) -> SoakResult:
    """Fit the slope. It passes, or fails, only if the whole interval lies on one side of the limit."""
    from slmops.evaluation import statistics  # NumPy would slow each `slmops --help`

    slope = statistics.slope(memory_kb, UNIT)
    outcome: Outcome = "inconclusive"
    more, found = None, f"may be on either side of the limit of {limit:g}"
    if slope.high is not None and slope.high <= limit:
        outcome, found = "pass", f"is within the limit of {limit:g}"
    elif slope.low is not None and slope.low > limit:
        outcome, found = "fail", f"is above the limit of {limit:g}"
    elif more := statistics.more_samples(slope, limit):
        found += f"; about {more} more requests would settle it"
    interval = "no interval" if slope.low is None else f"95 % interval {slope.low:.2f} to {slope.high:.2f}"
    return SoakResult(
        **target.model_dump(),
        outcome=outcome,
        slope=slope,
        limit=limit,
        more_requests=more,
        memory_start_mb=median(memory_kb[:ENDS]) / 1e3,
        memory_end_mb=median(memory_kb[-ENDS:]) / 1e3,
        detail=f"{target.variant}: over {slope.samples} requests the memory grows by {slope.value:.2f} KB a request "
        f"({interval}), which {found}.",
    )


def handle(request: SoakRequest) -> SoakSeries:
    from slmops.foundry import runtime

    model = runtime.registered(request.home, request.foundry_id)
    talks = conversations(Path(model.get_path()))
    model.load()
    memory = []
    for number in range(-request.warm_up, request.requests):
        # Renewed by each request. If native code hangs, a thread that needs no Python ends the process.
        faulthandler.dump_traceback_later(REQUEST_LIMIT_S, exit=True)
        runtime.ask(model, talks[number % len(talks)], max_tokens=SOAK_TOKENS)
        if number < 0:
            continue
        memory.append(private_kb(psutil.Process()))
        if (number + 1) % EVERY == 0:
            print(f"{PROGRESS}{number + 1} of {request.requests} requests, {memory[-1] / 1e3:.0f} MB", flush=True)
    faulthandler.cancel_dump_traceback_later()
    return SoakSeries(memory_kb=tuple(memory))


def conversations(folder: Path) -> list[list[dict[str, str]]]:
    """What to ask, in turn: a message of each length that fits the context, then several in one conversation."""
    from slmops.evaluation import prompts
    from slmops.foundry.layout import GENAI_CONFIG

    context = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]["context_length"]
    # At most a third of the context each, because the conversation must fit too.
    texts = list(prompts.of_lengths(LENGTHS, context // 3 - SOAK_TOKENS, folder).values())
    talks = [[{"role": "user", "content": text}] for text in texts]
    answer = {"role": "assistant", "content": "I see."}
    first, second = talks[0], talks[-1]
    return [*talks, [*first, answer, *second, answer, *first]]


def private_kb(process: psutil.Process) -> float:
    """Memory of this process alone, in KB: on Linux, anonymous pages, in memory (resident less shared) or swapped out.

    Proportional and unique set sizes jump by tens of MB when another process with the same libraries starts or ends.
    """
    memory: Any = process.memory_full_info()
    if hasattr(memory, "shared"):
        return float(memory.rss - memory.shared + memory.swap) / 1e3
    return float(memory.uss) / 1e3
