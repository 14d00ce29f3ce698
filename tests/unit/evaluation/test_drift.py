"""Drift, judged on made-up figures, and the request."""

from itertools import product

import pytest
from pydantic import ValidationError

from slmops.core.errors import EvaluationError
from slmops.core.values import Measurement
from slmops.evaluation import drift
from slmops.evaluation.drift import DriftError, Figure, Remeasure, Remeasured
from slmops.evaluation.summary import MACHINE_BUSY
from tests import measured, values

BOT = Remeasure(name="bot")
HERE = "this machine"
VERSION = values.model_version(3, variant="int8")


def figure(value: float, half: float | None = 0.0, note: str | None = None) -> Measurement:
    """A figure with an interval of so much to either side; None: without one."""
    ends = {} if half is None else {"low": value - half, "high": value + half}
    return Measurement(value=value, unit="x", samples=20, note=note, **ends)


def compared(metric: str, recorded: Measurement, now: Measurement, **tolerances: float) -> Figure:
    [one] = drift.compare({metric: recorded}, {metric: now}, BOT.model_copy(update=tolerances))
    return one


@pytest.mark.parametrize(
    ("metric", "recorded", "now", "drifted", "said"),
    [
        ("ttft_ms_p50", figure(100, 2), figure(130, 2), True, "1.3 times worse, and at most 1.15 is tolerated"),
        ("ttft_ms_p50", figure(100, 2), figure(115, 2), False, "within the tolerance"),
        ("ttft_ms_p50", figure(100, 2), figure(50, 2), False, "within the tolerance"),
        ("ttft_ms_p50", figure(100, 15), figure(130, 15), False, "1.3 times worse, but the intervals overlap"),  # touch
        ("ttft_ms_p50", figure(100, 2), figure(130, None), False, "1.3 times worse, but too few samples"),
        ("ttft_ms_p50", figure(100, None), figure(130, 2), False, "too few samples for an interval"),
        ("ttft_ms_p50", figure(100, 2), figure(200, 2, MACHINE_BUSY), False, f"2 times worse, but {MACHINE_BUSY}"),
        ("ttft_ms_p50", figure(100, 2, f"a; {MACHINE_BUSY}"), figure(200, 2), False, MACHINE_BUSY),
        ("decode_tok_s", figure(50, 1), figure(25, 1), True, "2 times worse"),
        # One sample a round has no interval, and hardly any spread.
        ("memory_peak_mb", figure(1000, None), figure(1190, None), False, "within the tolerance"),
        ("memory_peak_mb", figure(1000, None), figure(1250, None), True, "1.25 times worse, and at most 1.2"),
        # The interval is that of the text, which is the same.
        ("perplexity", figure(12.0, 2), figure(12.24, 2), True, "1.02 times worse, and at most 1.01"),
        ("perplexity", figure(12.0, 2), figure(12.1, 2), False, "within the tolerance"),
        ("decode_tok_s", figure(0), figure(1), False, "one of the two is 0"),
    ],
)
def test_worse_beyond_the_tolerance_and_beyond_chance(
    metric: str, recorded: Measurement, now: Measurement, drifted: bool, said: str
) -> None:
    one = compared(metric, recorded, now)
    assert (one.metric, one.recorded, one.now, one.drifted) == (metric, recorded, now, drifted)
    assert said in one.detail
    assert one.ratio == (now.value / recorded.value if recorded.value else None)


def test_each_tolerance_is_for_its_own_figures_and_only_what_both_have_is_compared() -> None:
    of = {"ttft_ms_p50": "max_slowdown", "memory_peak_mb": "max_memory_growth", "perplexity": "max_perplexity_ratio"}
    for metric, raised in product(of, of.values()):
        assert compared(metric, figure(100, 1), figure(150, 1), **{raised: 2.0}).drifted == (of[metric] != raised)
    both = {name: figure(1) for name in ("decode_tok_s", "size_mb", "kl_mean")}
    assert [one.metric for one in drift.compare(both, {**both, "perplexity": figure(1)}, BOT)] == ["decode_tok_s"]


@pytest.mark.parametrize(
    ("before", "now", "tolerance", "drifted", "said"),
    [
        ([False] * 20, [True] * 20, 0, False, "within the tolerance"),
        ([True] * 20, [True] * 19 + [False], 0, False, "0.05 lower, but that may be chance"),
        ([True] * 20, [True] * 10 + [False] * 10, 0, True, "0.5 lower, and at most 0 is tolerated"),
        ([True] * 20, [True] * 10 + [False] * 10, 0.5, False, "within the tolerance"),
        ([True] * 20, [True] * 8 + [False] * 12, 0.5, True, "0.6 lower, and at most 0.5 is tolerated"),
        # Ten questions each way: a drop of nothing, however many answers changed.
        ([True, False] * 10, [False, True] * 10, 0, False, "within the tolerance"),
    ],
)
def test_accuracy_is_compared_question_by_question(
    before: list[bool], now: list[bool], tolerance: float, drifted: bool, said: str
) -> None:
    request = BOT.model_copy(update={"max_accuracy_drop": tolerance})
    one = drift.compare_answers(measured.answers(*before), measured.answers(*now), request)
    assert (one.drifted, one.detail) == (drifted, said)
    assert (one.recorded.value, one.now.value) == (sum(before) / 20, sum(now) / 20)
    assert one.ratio == (one.now.value / one.recorded.value if any(before) else None)


def test_only_questions_that_were_judged_both_times_count() -> None:
    before, now = measured.answers(True, None, False, True), measured.answers(True, True, None, True)
    one = drift.compare_answers(before, now, BOT)
    assert (one.recorded.value, one.now.value, one.now.samples) == (1.0, 1.0, 2)
    assert drift.compare_answers(measured.answers(None), measured.answers(True), BOT) is None
    assert drift.compare_answers((), measured.answers(True), BOT) is None


RECORDED = measured.recorded(measurements={"decode_tok_s": figure(50, 1), "perplexity": figure(12, 2)})


def judged(decode: float, *left_out: str, answered: str = "A") -> Remeasured:
    now = {"decode_tok_s": figure(decode, 1), "perplexity": figure(12, 2)}
    answers = [one.model_copy(update={"answer": answered}) for one in measured.answers(True, True, True)]
    return drift.assess(VERSION, RECORDED, now, answers, left_out, HERE, BOT)


def test_the_result_that_is_steady() -> None:
    result = judged(49)
    assert (result.outcome, result.model, result.version, result.variant) == ("steady", "bot", 3, "int8")
    assert (result.recorded_run, result.hardware_kind, result.left_out) == ("run-3", HERE, ())
    assert result.answers_changed == 0
    assert result.detail == "bot version 3 (int8) measures as recorded, within the tolerances of 3 figures."
    figures = {"decode_tok_s": 49, "perplexity": 12, "accuracy": 1, "answers_changed": 0}
    assert result.metrics == {**figures, "drift/decode_tok_s": 0.98, "drift/perplexity": 1, "drift/accuracy": 1}


def test_the_result_that_has_drifted() -> None:
    result = judged(25, "everything else", answered="B")
    assert (result.outcome, result.answers_changed) == ("drifted", 3)
    assert result.detail == (
        "bot version 3 (int8) has drifted from what was recorded: "
        "decode_tok_s (2 times worse, and at most 1.15 is tolerated)."
    )
    error = DriftError(result)
    assert (error.exit_code, error.result, error.message) == (3, result, result.detail)
    assert "what else runs on this machine" in str(error.fix)
    said = drift.text(result)
    assert said.startswith(f"drifted: {result.detail}\n\nmetric")
    assert "decode_tok_s in x 50 [49, 51] 25 [24, 26] 0.500 drifted: 2 times worse" in " ".join(said.split())
    assert said.endswith("\n\nnot compared: everything else\nanswers with another text: 3")
    table = " ".join(drift.text(result, markdown=True).split())
    assert "| decode_tok_s in x | 50 [49, 51] | 25 [24, 26] | 0.500 | drifted: 2 times worse" in table
    assert "- not compared: everything else" in table


def test_quality_that_drifts_and_what_cannot_be_compared() -> None:
    result = drift.assess(VERSION, RECORDED, {"perplexity": figure(15, 2)}, None, ["accuracy, as x"], HERE, BOT)
    assert result.answers_changed is None
    assert "answers_changed" not in result.metrics
    assert "`slmops rollback bot`" in str(DriftError(result).fix)
    assert judged(50, "some").detail.endswith("of 3 figures. Not everything could be compared.")
    unjudged = drift.assess(VERSION, RECORDED, {"perplexity": figure(12)}, measured.answers(None), [], HERE, BOT)
    assert unjudged.left_out == ("accuracy, because no item could be judged both times",)
    with pytest.raises(EvaluationError, match=r"bot version 3 \(int8\)"):  # no figure at all is not steady
        drift.assess(VERSION, RECORDED, {}, measured.answers(None), [], HERE, BOT)


@pytest.mark.parametrize("field", ["max_slowdown", "max_memory_growth", "max_perplexity_ratio"])
def test_an_infinite_tolerance_is_none(field: str) -> None:
    with pytest.raises(ValidationError):
        Remeasure(name="bot", **{field: float("inf")})
    assert Remeasure(name="bot", version=3).version == "3"  # it may be a number
