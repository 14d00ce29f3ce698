"""Drift: does what is deployed still measure as it did when it was evaluated?

The files are the same, byte for byte. So slower answers or more memory come from the machine, its runtime or its load,
and another quality from a runtime that computes something else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from tabulate import tabulate

from slmops.core.errors import EvaluationError, GateError
from slmops.core.job import Job
from slmops.core.names import Name
from slmops.core.values import Answer, Frozen, Measurement, Variant
from slmops.foundry.versions import ModelVersion

SPEED_METRICS = {"ttft_ms_p50": 1, "decode_tok_s": -1, "prefill_tok_s": -1, "response_s_p50": 1}
"""Metric to 1 if less is better, to -1 if more is."""
MEMORY_METRICS = ("memory_loaded_mb", "memory_peak_mb")
PERPLEXITY, ACCURACY = "perplexity", "accuracy"
DRIFT = "drift/"  # prefix of the metrics in MLflow that are ratios: measured now / recorded
SLACK = 1e-9  # 0.8 - 0.7 is no more than 0.1
_Times = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class Remeasure(Frozen, use_attribute_docstrings=True):
    """Measure what is deployed once more, the way a device gets it, and compare with what was recorded."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    name: Name = Field(description="The model's name in the registry.")
    version: Name | None = Field(None, description="An alias or a number in the registry; the champion by default.")
    max_slowdown: _Times = Field(1.15, title="Slowdown")
    """How many times slower than recorded each figure of speed may be."""
    max_memory_growth: _Times = Field(1.2, title="Memory growth")
    """How many times the recorded memory it may use."""
    max_perplexity_ratio: _Times = Field(1.01, title="Perplexity ratio")
    """How many times the recorded perplexity it may have; other kernels round differently."""
    max_accuracy_drop: float = Field(0.0, ge=0, le=1, title="Accuracy drop")
    """How far accuracy may fall; a fall that may be chance does not count."""


class Measure(Frozen):
    """Measure the speed and memory of a version whose device was not on the machine of its job, and is on this one."""

    name: Name = Field(description="The model's name in the registry.")
    version: int = Field(ge=1, description="Its number in the registry.")


class Recorded(Frozen):
    """What a version's job measured of it, and with what."""

    run_id: str = Field(description="The variant's run in MLflow.")
    job: Job = Field(description="The part of it that matters to a measurement.")
    hardware_kind: str
    variant: Variant = Field(description="Its path is not a folder of this machine.")
    measurements: dict[str, Measurement]
    answers: tuple[Answer, ...]
    tokens: int = Field(description="Tokens of the text that it was measured with.")
    evaluation_set: Path | None = Field(description="A copy of the job's, if the job kept one.")
    evaluation_set_digest: str
    text: Path | None = Field(description="A copy of the job's perplexity text, if the job kept one.")
    text_digest: str


class Figure(Frozen):
    metric: str
    recorded: Measurement
    now: Measurement
    ratio: float | None = Field(description="Now / recorded; None: the recorded value is 0.")
    drifted: bool = Field(description="Worse than recorded, by more than the tolerance and by more than chance.")
    detail: str = Field(description="Why, in a few words.")


class Remeasured(Frozen):
    """The result; the JSON form is a promise to scripts."""

    model: str
    version: int
    variant: str
    outcome: Literal["steady", "drifted"]
    figures: tuple[Figure, ...]
    answers_changed: int | None = Field(None, description="Answers with another text; None: not asked.")
    left_out: tuple[str, ...] = Field((), description="What was not compared, and why.")
    hardware_kind: str = Field(description="This machine.")
    recorded_run: str = Field(description="The MLflow run with the recorded figures.")
    detail: str = Field(description="A sentence for people.")
    run_id: str | None = Field(None, description="Its own MLflow run.")

    @property
    def metrics(self) -> dict[str, float]:
        """For MLflow: the figures, and their ratios to the recorded ones."""
        ratios = {f"{DRIFT}{one.metric}": one.ratio for one in self.figures if one.ratio is not None}
        changed = {} if self.answers_changed is None else {"answers_changed": float(self.answers_changed)}
        return {**{one.metric: one.now.value for one in self.figures}, **ratios, **changed}


class DriftError(GateError):
    """What is deployed measures worse than it did."""

    def __init__(self, result: Remeasured) -> None:
        if {PERPLEXITY, ACCURACY} & {one.metric for one in result.figures if one.drifted}:
            fix = "The files are intact: look for an update of the runtime. "
            fix += f"`slmops rollback {result.model}` deploys the version before."
        else:
            fix = "Look for what else runs on this machine, and for an update of the runtime; then measure again."
        super().__init__(result.detail, fix)
        self.result = result


def assess(
    version: ModelVersion,
    recorded: Recorded,
    now: Mapping[str, Measurement],
    answers: Sequence[Answer] | None,
    left_out: Sequence[str],
    hardware_kind: str,
    request: Remeasure,
) -> Remeasured:
    """Compare what was measured now, and the answers if it was asked; EvaluationError if there is nothing in common."""
    figures = list(compare(recorded.measurements, now, request))
    reasons = list(left_out)
    changed = None
    if answers is not None:
        before = {answer.id: answer.answer for answer in recorded.answers}
        changed = sum(before.get(answer.id, answer.answer) != answer.answer for answer in answers)
        if accuracy := compare_answers(recorded.answers, answers, request):
            figures.append(accuracy)
        else:
            reasons.append("accuracy, because no item could be judged both times")
    if not figures:
        raise EvaluationError(f"Nothing of {version.label} can be compared: {'; '.join(reasons)}.")
    drifted = [f"{one.metric} ({one.detail})" for one in figures if one.drifted]
    detail = f"{version.label} measures as recorded, within the tolerances of {len(figures)} figures."
    if drifted:
        detail = f"{version.label} has drifted from what was recorded: {', '.join(drifted)}."
    elif reasons:
        detail += " Not everything could be compared."
    return Remeasured(
        model=version.name,
        version=version.version,
        variant=version.variant,
        outcome="drifted" if drifted else "steady",
        figures=tuple(figures),
        answers_changed=changed,
        left_out=tuple(reasons),
        hardware_kind=hardware_kind,
        recorded_run=recorded.run_id,
        detail=detail,
    )


def compare(
    recorded: Mapping[str, Measurement], now: Mapping[str, Measurement], request: Remeasure
) -> tuple[Figure, ...]:
    """Judge the figures of speed, memory and perplexity that both have.

    Speed drifts only if the two intervals lie apart as well. Memory has one sample a round, too few for an interval,
    and hardly any spread. The interval of a perplexity is that of the text, which is the same for both.
    """
    tolerances = {
        **dict.fromkeys(SPEED_METRICS, request.max_slowdown),
        **dict.fromkeys(MEMORY_METRICS, request.max_memory_growth),
        PERPLEXITY: request.max_perplexity_ratio,
    }
    figures = []
    for metric, tolerance in tolerances.items():
        if metric not in recorded or metric not in now:
            continue
        was, is_now = recorded[metric], now[metric]
        both = was.value and is_now.value
        worse = (is_now.value / was.value) ** SPEED_METRICS.get(metric, 1) if both else 0
        doubt = _doubt(was, is_now) if metric in SPEED_METRICS else None
        beyond = worse > tolerance + SLACK
        one = _figure(metric, was, is_now, beyond, doubt, f"{worse:.4g} times worse", tolerance)
        figures.append(one if both else one.model_copy(update={"detail": "one of the two is 0"}))
    return tuple(figures)


def compare_answers(recorded: Sequence[Answer], now: Sequence[Answer], request: Remeasure) -> Figure | None:
    """Judge the accuracy item by item, if any item could be judged both times; a fall within chance does not count."""
    from slmops.evaluation import statistics

    before = {answer.id: answer.correct for answer in recorded}
    pairs = [
        (bool(before[answer.id]), bool(answer.correct))
        for answer in now
        if answer.correct is not None and before.get(answer.id) is not None
    ]
    if not pairs:
        return None
    theirs, ours = zip(*pairs, strict=True)
    drop = statistics.paired_difference(theirs, ours)
    was, is_now = (statistics.of_proportion(sum(side), len(side)) for side in (theirs, ours))
    doubt = None if drop.low is not None and drop.low > 0 else "that may be chance"
    beyond = drop.value > request.max_accuracy_drop + SLACK
    return _figure(ACCURACY, was, is_now, beyond, doubt, f"{drop.value:.4g} lower", request.max_accuracy_drop)


def text(result: Remeasured, *, markdown: bool = False) -> str:
    """What ``slmops remeasure`` prints, or the same as Markdown."""
    rows = [
        (
            one.metric + f" in {one.now.unit}" * (one.now.unit != "1"),
            one.recorded.text,
            one.now.text,
            "-" if one.ratio is None else f"{one.ratio:.3f}",
            "drifted: " * one.drifted + one.detail,
        )
        for one in result.figures
    ]
    headers = ("metric", "recorded", "now", "ratio", "")
    table = tabulate(rows, headers, tablefmt="github" if markdown else "plain", disable_numparse=True)
    notes = [f"not compared: {reason}" for reason in result.left_out]
    if result.answers_changed is not None:
        notes.append(f"answers with another text: {result.answers_changed}")
    if markdown:
        return "\n".join([f"**{result.outcome}**: {result.detail}", "", table, "", *(f"- {note}" for note in notes)])
    return "\n".join([f"{result.outcome}: {result.detail}", "", table, *[""] * bool(notes), *notes])


def _figure(
    metric: str, recorded: Measurement, now: Measurement, beyond: bool, doubt: str | None, change: str, tolerated: float
) -> Figure:
    detail = "within the tolerance"
    if beyond:
        detail = f"{change}, but {doubt}" if doubt else f"{change}, and at most {tolerated:g} is tolerated"
    ratio = now.value / recorded.value if recorded.value else None
    drifted = beyond and doubt is None
    return Figure(metric=metric, recorded=recorded, now=now, ratio=ratio, drifted=drifted, detail=detail)


def _doubt(recorded: Measurement, now: Measurement) -> str | None:
    """Why a difference may be chance; None if it is not."""
    from slmops.evaluation.summary import MACHINE_BUSY

    if any(MACHINE_BUSY in (one.note or "") for one in (recorded, now)):
        return MACHINE_BUSY
    if recorded.low is None or recorded.high is None or now.low is None or now.high is None:
        return "too few samples for an interval"
    return "the intervals overlap" if recorded.low <= now.high and now.low <= recorded.high else None
