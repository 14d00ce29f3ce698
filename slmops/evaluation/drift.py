"""Drift: whether what is deployed is still what was recorded of it when it was evaluated. Values and judgement.

The files are the same, down to each byte. So a slower answer or more memory tells of the machine, its runtime or its
load, and another quality of a runtime that computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from slmops.core.errors import EvaluationError, GateError
from slmops.core.job import Job
from slmops.core.values import Answer, Frozen, Measurement, Name, Variant
from slmops.foundry.versions import ModelVersion

SPEED_METRICS = {"ttft_ms_p50": 1, "decode_tok_s": -1, "prefill_tok_s": -1, "response_s_p50": 1}
"""Metric to 1 if less is better, -1 if more is."""
MEMORY_METRICS = ("memory_loaded_mb", "memory_peak_mb")
PERPLEXITY, ACCURACY = "perplexity", "accuracy"
DRIFT = "drift/"
"""How the metrics in MLflow begin that are ratios: what was measured now / what was recorded."""
SLACK = 1e-9  # 0.8 - 0.7 is no more than 0.1


class Remeasure(BaseModel):
    """Measure what is deployed once more, as a device gets it, and compare with what was recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    name: Name = Field(title="Name", description="The model's name in the registry.")
    version: Name | None = Field(
        None, title="Version", description="An alias or a number in the registry; the champion by default."
    )
    max_slowdown: float = Field(
        1.15,
        ge=1,
        allow_inf_nan=False,
        title="Slowdown",
        description="Times slower than recorded that each figure of speed may be.",
    )
    max_memory_growth: float = Field(
        1.2,
        ge=1,
        allow_inf_nan=False,
        title="Memory growth",
        description="Times the recorded memory that it may use.",
    )
    max_perplexity_ratio: float = Field(
        1.01,
        ge=1,
        allow_inf_nan=False,
        title="Perplexity ratio",
        description="Times the recorded perplexity that it may have; other kernels round otherwise.",
    )
    max_accuracy_drop: float = Field(
        0.0,
        ge=0,
        le=1,
        title="Accuracy drop",
        description="How far accuracy may fall; a fall that may be chance is none.",
    )


class Recorded(Frozen):
    """What was recorded of a version when its job evaluated it, and with what."""

    run_id: str = Field(description="The variant's run in MLflow.")
    job: Job = Field(description="As it was asked for, in what matters to a measurement.")
    hardware_kind: str
    variant: Variant = Field(description="Its path is that of no folder here.")
    measurements: dict[str, Measurement]
    answers: tuple[Answer, ...]
    evaluation_set: Path | None = Field(description="A copy of the job's, if the job kept one.")
    evaluation_set_digest: str
    text: Path | None = Field(description="A copy of the job's perplexity text, if the job kept one.")
    text_digest: str


class Figure(Frozen):
    """One metric then and now."""

    metric: str
    recorded: Measurement
    now: Measurement
    ratio: float | None = Field(description="Now / recorded; None: what was recorded is 0.")
    drifted: bool = Field(description="It is worse than recorded, by more than the tolerance and by more than chance.")
    detail: str = Field(description="Why, in a few words.")


class Remeasured(Frozen):
    """The result; the JSON form is a promise to scripts."""

    model: str
    version: int
    variant: str
    outcome: Literal["steady", "drifted"]
    figures: tuple[Figure, ...]
    answers_changed: int | None = Field(None, description="Answers that read otherwise; None: not asked.")
    left_out: tuple[str, ...] = Field((), description="What was not compared, and why.")
    hardware_kind: str = Field(description="This machine.")
    recorded_run: str = Field(description="The MLflow run of the evaluation that it is compared with.")
    detail: str = Field(description="A sentence for people.")
    run_id: str | None = Field(None, description="Its own MLflow run.")

    @property
    def metrics(self) -> dict[str, float]:
        """Name to value, as MLflow gets them: what was measured, and its ratio to what was recorded."""
        ratios = {f"{DRIFT}{one.metric}": one.ratio for one in self.figures if one.ratio is not None}
        changed = {} if self.answers_changed is None else {"answers_changed": float(self.answers_changed)}
        return {**{one.metric: one.now.value for one in self.figures}, **ratios, **changed}


class DriftError(GateError):
    """What is deployed is not what was recorded of it any more."""

    def __init__(self, result: Remeasured) -> None:
        quality = {PERPLEXITY, ACCURACY} & {one.metric for one in result.figures if one.drifted}
        if quality:
            fix = (
                "The files are intact: look for an update of the runtime. `slmops rollback NAME` deploys the last one."
            )
        else:
            fix = "Look for what else runs on this machine, and for an update of the runtime; then measure again."
        super().__init__(result.detail, fix.replace("NAME", result.model))
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
    """Compare what was measured now with what was recorded.

    Args:
        version: What was measured.
        recorded: What its evaluation recorded.
        now: Metric to figure.
        answers: To the evaluation set; None: it was not asked.
        left_out: What was not measured again, and why.
        hardware_kind: Of this machine.
        request: With the tolerances.

    Raises:
        EvaluationError: There is not one figure to compare.
    """
    figures = list(compare(recorded.measurements, now, request))
    reasons = list(left_out)
    if answers is not None:
        accuracy = compare_answers(recorded.answers, answers, request)
        if accuracy is None:
            reasons.append("accuracy, as no question could be judged both times")
        else:
            figures.append(accuracy)
    if not figures:
        raise EvaluationError(f"Nothing of {version.label} can be compared: {'; '.join(reasons)}.")
    drifted = any(one.drifted for one in figures)
    return Remeasured(
        model=version.name,
        version=version.version,
        variant=version.variant,
        outcome="drifted" if drifted else "steady",
        figures=tuple(figures),
        answers_changed=None if answers is None else _changed(recorded.answers, answers),
        left_out=tuple(reasons),
        hardware_kind=hardware_kind,
        recorded_run=recorded.run_id,
        detail=_sentence(version.label, figures, reasons),
    )


def compare(
    recorded: Mapping[str, Measurement], now: Mapping[str, Measurement], request: Remeasure
) -> tuple[Figure, ...]:
    """Judge the figures of speed, memory and perplexity that both have.

    Speed drifts only if the two intervals lie apart, too. Memory has one sample a round, too few for an interval, and
    hardly any spread. The interval of a perplexity is that of the text, which is the same for both: so in both of these
    the tolerance alone decides.
    """
    tolerances = {
        **dict.fromkeys(SPEED_METRICS, request.max_slowdown),
        **dict.fromkeys(MEMORY_METRICS, request.max_memory_growth),
        PERPLEXITY: request.max_perplexity_ratio,
    }
    return tuple(
        _compare(metric, recorded[metric], now[metric], tolerance)
        for metric, tolerance in tolerances.items()
        if metric in recorded and metric in now
    )


def compare_answers(recorded: Sequence[Answer], now: Sequence[Answer], request: Remeasure) -> Figure | None:
    """Judge the accuracy, question by question; None if no question could be judged both times.

    It drifts if the whole 95 % interval of the paired difference says that it fell, and by more than the tolerance.
    """
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
    beyond = drop.value > request.max_accuracy_drop + SLACK
    sure = drop.low is not None and drop.low > 0
    if not beyond:
        detail = "within the tolerance"
    elif not sure:
        detail = f"{drop.value:.4g} lower, which may be chance"
    else:
        detail = f"{drop.value:.4g} lower, and at most {request.max_accuracy_drop:g} is tolerated"
    was, is_now = (statistics.of_proportion(sum(side), len(side)) for side in (theirs, ours))
    return Figure(
        metric=ACCURACY, recorded=was, now=is_now, ratio=_ratio(was, is_now), drifted=beyond and sure, detail=detail
    )


def text(result: Remeasured) -> str:
    """What ``slmops remeasure`` prints."""
    rows = [("metric", "recorded", "now", "ratio", ""), *(_row(one) for one in result.figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = _notes(result)
    return "\n".join([f"{result.outcome}: {result.detail}", "", *table, *([""] if notes else []), *notes])


def markdown(result: Remeasured) -> str:
    """The same as Markdown."""
    head = ["| metric | recorded | now | ratio | |", "|---|---|---|---|---|"]
    rows = ["| " + " | ".join(_row(one)) + " |" for one in result.figures]
    notes = [f"- {note}" for note in _notes(result)]
    return "\n".join([f"**{result.outcome}**: {result.detail}", "", *head, *rows, "", *notes])


def _sentence(label: str, figures: Sequence[Figure], left_out: Sequence[str]) -> str:
    drifted = [f"{one.metric} ({one.detail})" for one in figures if one.drifted]
    if drifted:
        return f"{label} is not what was recorded of it any more: {', '.join(drifted)}."
    some = " Not everything could be compared." if left_out else ""
    return f"{label} is what was recorded of it, within the tolerances of {len(figures)} figures.{some}"


def _changed(recorded: Sequence[Answer], now: Sequence[Answer]) -> int:
    """How many answers read otherwise than those recorded to the same questions."""
    before = {answer.id: answer.answer for answer in recorded}
    return sum(before.get(answer.id, answer.answer) != answer.answer for answer in now)


def _compare(metric: str, recorded: Measurement, now: Measurement, tolerance: float) -> Figure:
    ratio = _ratio(recorded, now)
    worse = ratio ** SPEED_METRICS.get(metric, 1) if ratio else 0.0
    doubt = _doubt(recorded, now) if metric in SPEED_METRICS else None
    beyond = worse > tolerance + SLACK
    if not ratio:
        detail = "one of the two is 0"
    elif not beyond:
        detail = "within the tolerance"
    elif doubt is not None:
        detail = f"{worse:.4g} times worse, but {doubt}"
    else:
        detail = f"{worse:.4g} times worse, and at most {tolerance:g} is tolerated"
    return Figure(
        metric=metric, recorded=recorded, now=now, ratio=ratio, drifted=beyond and doubt is None, detail=detail
    )


def _doubt(recorded: Measurement, now: Measurement) -> str | None:
    """Why a difference may be chance; None: it is not."""
    from slmops.evaluation.summary import MACHINE_BUSY

    if any(MACHINE_BUSY in (one.note or "") for one in (recorded, now)):
        return MACHINE_BUSY
    if recorded.low is None or recorded.high is None or now.low is None or now.high is None:
        return "too few samples for an interval"
    return "the intervals overlap" if recorded.low <= now.high and now.low <= recorded.high else None


def _ratio(recorded: Measurement, now: Measurement) -> float | None:
    return now.value / recorded.value if recorded.value else None


def _row(one: Figure) -> tuple[str, ...]:
    ratio = "-" if one.ratio is None else f"{one.ratio:.3f}"
    said = f"drifted: {one.detail}" if one.drifted else one.detail
    unit = "" if one.now.unit == "1" else f" in {one.now.unit}"
    return one.metric + unit, _shown(one.recorded), _shown(one.now), ratio, said


def _notes(result: Remeasured) -> list[str]:
    notes = [f"not compared: {reason}" for reason in result.left_out]
    if result.answers_changed is not None:
        notes.append(f"answers that read otherwise: {result.answers_changed}")
    return notes


def _shown(one: Measurement) -> str:
    if one.low is None or one.high is None or one.low == one.high:
        return _number(one.value)
    return f"{_number(one.value)} [{_number(one.low)}, {_number(one.high)}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
