"""Distributions, answers and what is relative to the baseline; and that the policy knows just what is measured."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from slmops.core.values import Evaluation, Measurement
from slmops.evaluation import summary
from slmops.evaluation.logits_worker import Distance
from slmops.evaluation.quality import Quality
from slmops.selection.policy import CATEGORY, KNOWN_METRICS
from tests import making
from tests.measured import CASES, answer, answers, quality, speed, timed, turn
from tests.values import checkpoint, variant

TOKENS = 640
RELATIVE = {"size_ratio", "perplexity_ratio", "length_ratio", "accuracy_drop", "flips", "mcnemar_p", "score_drop"}
KL = {"kl_mean", "kl_median", "kl_p99", "kl_max", "top1_agreement"}
CHECKPOINT = {"hf_perplexity_ratio", "hf_kl_mean", "hf_top1_agreement"}


def figures(
    raw: Quality, beside: Quality | None = None, checkpoint_nll: tuple[float, ...] | None = None
) -> dict[str, Measurement]:
    """Of an int4 variant of 1 MB, beside a baseline of 4 MB."""
    baseline, timings = beside and (4.0, beside), speed(turn(timed(0.2, 1.2)))
    return summary.evaluation(variant(Path("int4")), timings, raw, baseline, checkpoint_nll).measurements


def nlls(seed: int, shift: float = 0) -> tuple[float, ...]:
    return tuple((np.random.default_rng(seed).exponential(2, TOKENS) + shift).tolist())


def distance(seed: int) -> Distance:
    random = np.random.default_rng(seed)
    return Distance(
        kl=tuple(random.exponential(0.05, TOKENS).tolist()), same_top=tuple((random.random(TOKENS) < 0.9).tolist())
    )


def test_distances_to_the_baseline_and_to_the_checkpoint() -> None:
    far, farther = distance(2), distance(3)
    raw = quality(nlls(1, 0.1), baseline=far, hugging_face=farther)
    found = figures(raw, quality(nlls(1)), nlls(1, -0.2))
    expected = {"perplexity": math.exp(np.mean(nlls(1, 0.1))), "perplexity_ratio": math.exp(0.1)}
    expected |= {"kl_mean": np.mean(far.kl), "kl_median": np.median(far.kl), "kl_p99": np.percentile(far.kl, 99)}
    expected |= {"kl_max": max(far.kl), "top1_agreement": np.mean(far.same_top), "hf_perplexity_ratio": math.exp(0.3)}
    expected |= {"hf_kl_mean": np.mean(farther.kl), "hf_top1_agreement": np.mean(farther.same_top)}
    assert {name: found[name].value for name in expected} == pytest.approx(expected)
    assert {found[name].unit for name in KL} == {"nats", "1"}
    assert {found[name].samples for name in expected} == {TOKENS}
    assert found["size_ratio"].value == 0.25
    assert found["kl_mean"].low < np.mean(far.kl) < found["kl_mean"].high


def test_the_checkpoint_as_the_baseline() -> None:
    far, own = distance(2), quality(nlls(1), answers(True, False))
    found = figures(quality(nlls(2), answers(True, True), hugging_face=far), own, own.nll)
    assert {*found} >= RELATIVE - {"score_drop"} | KL | CHECKPOINT
    for name in ("kl_mean", "top1_agreement", "perplexity_ratio"):
        assert found[name] == found[f"hf_{name}"]
    assert found["kl_mean"].value == pytest.approx(np.mean(far.kl))
    shown = summary.of_checkpoint(checkpoint(size_mb=9.0), own)
    assert {name: shown[name].value for name in ("size_mb", "accuracy")} == {"size_mb": 9.0, "accuracy": 0.5}
    assert shown["perplexity"].value == pytest.approx(math.exp(np.mean(nlls(1))))


def test_what_was_not_compared() -> None:
    for raw, nll in ((quality(nlls(1)), nlls(1)), (quality(nlls(1), hugging_face=distance(3)), None)):
        assert not figures(raw, None, nll).keys() & (RELATIVE | KL | CHECKPOINT)
    found = figures(quality(nlls(2)), quality(nlls(1)))  # and it is not taken for the baseline
    assert not found.keys() & KL
    assert found.keys() >= RELATIVE


def test_baseline_against_itself() -> None:
    raw = quality(nlls(1), answers(True, False, None, True, True), hugging_face=distance(3))
    fp32 = variant(Path("fp32"), "fp32", files={"model.onnx": 4_000_000})
    found = summary.evaluation(fp32, speed(turn(timed(0.2, 1.2))), raw, (4.0, raw), nlls(1)).measurements
    expected = {**dict.fromkeys(RELATIVE | KL, 0), "size_ratio": 1, "perplexity_ratio": 1, "length_ratio": 1}
    expected |= {"top1_agreement": 1, "mcnemar_p": 1}
    assert {name: found[name].value for name in expected} == expected
    exact = {"size_ratio", "perplexity_ratio", "length_ratio", "flips", "mcnemar_p", *KL}
    assert all(found[name].low == found[name].high == found[name].value for name in exact)
    # As good as itself, and yet four answers cannot prove it.
    assert found["accuracy_drop"].low < 0 < found["accuracy_drop"].high
    assert found["hf_perplexity_ratio"].value == 1
    assert found["hf_kl_mean"].value > 0


def each(field: str, *values: Any, correct: Any = True) -> Quality:
    """An answer for each value of a field."""
    return quality(answered=tuple(answer(number, correct, **{field: value}) for number, value in enumerate(values)))


SCORES = [0.2, 0.9, 0.4, 1.0, 0.0, 0.7]
GRADED = quality(answered=tuple(answer(number, score >= 0.5, score=score) for number, score in enumerate(SCORES)))
JUDGED = quality(answered=answers(True, None, False, True, None, True))
MARKS = {"World facts": (True, False), "world-facts": (True,), "東京": (False,), "大阪": (True,), "x": (None,)}
MARKED = quality(answered=tuple(answer(0, one, category=name) for name, marks in MARKS.items() for one in marks))
CATEGORIES = {"World facts": (0.5, 2), "world-facts": (1, 1), "東京": (0, 1), "大阪": (1, 1), "x": None}
OF_JUDGEMENTS = ("accuracy", "score", "accuracy_drop", "flips", "mcnemar_p", "score_drop", f"{CATEGORY}general")
#       both right x 5  lost x 6       gained x 1  both wrong x 2  not scored by one or the other
THEIRS = [True] * 5 + [True] * 6 + [False] * 1 + [False] * 2 + [None, True, None]
OURS = [True] * 5 + [False] * 6 + [True] * 1 + [False] * 2 + [True, None, None]
DROP = {"accuracy_drop": (5 / 14, 14), "mcnemar_p": (2 * binom.cdf(1, 7, 0.5), 14), "score_drop": (5 / 14, 14)}
ENDS = each("finish_reason", "stop", "length", "stop", "content_filter", "stop", correct=None)


@pytest.mark.parametrize(
    ("raw", "beside", "expected"),
    [
        (JUDGED, None, {"accuracy": (0.75, 4), "unscored": (2, 6), "score": (0.75, 4)}),
        (
            quality(answered=answers(None, None)),
            quality(answered=answers(None, True)),
            {"unscored": (2, 2), "length_ratio": (1, 2), **dict.fromkeys(OF_JUDGEMENTS)},
        ),
        (MARKED, None, {"accuracy": (0.6, 5), **{f"{CATEGORY}{name}": found for name, found in CATEGORIES.items()}}),
        (GRADED, None, {"score": (np.mean(SCORES), 6), "accuracy": (0.5, 6)}),
        (each("format_valid", None, None), None, {"format_valid": None}),
        (each("format_valid", True, None, False, True), None, {"format_valid": (2 / 3, 3)}),
        (each("format_valid", False, None), None, {"format_valid": (0, 1)}),
        (ENDS, None, {"stop_rate": (0.6, 5), "truncated_rate": (0.2, 5)}),
        (quality(answered=answers(*OURS)), quality(answered=answers(*THEIRS)), {"flips": (7, 14), **DROP}),
        (each("score", 0.5, 0.6, 1.0, None), each("score", 0.7, 0.6, 0.9, 1.0), {"score_drop": (0.1 / 3, 3)}),
        (each("completion_tokens", 10, 30), each("completion_tokens", 20, 60), {"length_ratio": (0.5, 2)}),
        (each("completion_tokens", 5, 0), each("completion_tokens", 0, 0), {"length_ratio": (5, 2)}),
    ],
)
def test_answers(raw: Quality, beside: Quality | None, expected: dict[str, tuple[float, int] | None]) -> None:
    found = figures(raw, beside)
    for name, wanted in expected.items():
        shown = (found[name].value, found[name].samples) if name in found else None
        assert shown == (wanted and (pytest.approx(wanted[0]), wanted[1])), name


def test_units_and_intervals_of_answers() -> None:
    found = figures(JUDGED)
    assert found["accuracy"].note == f"standard error {math.sqrt(0.75 * 0.25 / 3):.3f}"
    assert found["accuracy"].low < 0.75
    assert (found["unscored"].unit, figures(quality(), quality())["flips"].unit) == ("items", "items")
    assert figures(GRADED)["score"].low < np.mean(SCORES)


def test_the_policy_knows_just_what_is_measured_and_all_of_it_survives_json() -> None:
    # A job that is not quick, on a machine that tells its energy, with items of each kind.
    memory = ((0.5, 50.0), (2.5, 60.0), (5.0, 70.0), (9.5, 55.0))
    requests = (timed(0.2, 1.2), timed(0.1, 0.9, cell=1))
    cold = turn(*requests, cold=True, energy_j=50.0, throughput={1: 20.0, 2: 33.0, 4: 41.0}, memory=memory)
    rounds = [cold, *[turn(*requests, energy_j=50.0, memory=memory)] * 2]
    answered = (answer(0, format_valid=True), answer(1, False, category="capitals"), answer(2, None))
    raw = quality(nlls(1), answered, baseline=distance(2), hugging_face=distance(3))
    timings, beside = speed(*rounds, cells=((128, 16), (32, 16))), (4.0, quality(nlls(2), raw.answers))
    made = summary.evaluation(variant(Path("int4")), timings, raw, beside, nlls(3))
    assert made.measurements.keys() == KNOWN_METRICS | {f"{CATEGORY}general", f"{CATEGORY}capitals"}
    assert {name: made.measurements[name].unit for name in making.RELATIVE_UNITS} == making.RELATIVE_UNITS
    assert (made.answers, made.cases, made.metrics["edge_cases_passed"]) == (raw.answers, CASES, 0.5)
    assert (made.evaluation_set_digest, made.text_digest) == ("e" * 64, "t" * 64)
    assert all(math.isfinite(value) for value in made.metrics.values())
    assert Evaluation.model_validate_json(made.model_dump_json()) == made
