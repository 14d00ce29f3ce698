"""Distributions, answers and what is relative to the baseline; and that the policy knows just what is measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from slmops.core.values import Answer, Evaluation, Measurement, Recipe, Variant
from slmops.evaluation import summary
from slmops.evaluation.logits_worker import Distance
from slmops.evaluation.quality import Quality
from slmops.selection.policy import CATEGORY, KNOWN_METRICS
from tests.measured import CASES, answer, answers, quality, speed, timed, turn
from tests.values import variant

TOKENS = 640
RELATIVE = {"size_ratio", "perplexity_ratio", "length_ratio", "accuracy_drop", "flips", "mcnemar_p", "score_drop"}
KL = {"kl_mean", "kl_median", "kl_p99", "kl_max", "top1_agreement"}
CHECKPOINT = {"hf_perplexity_ratio", "hf_kl_mean", "hf_top1_agreement"}


def baseline(raw: Quality) -> tuple[Variant, Quality]:
    recipe = Recipe(name="fp32", config={}, bits=32, baseline=True)
    return variant(Path("fp32"), "fp32", files={"model.onnx": 4_000_000}, recipe=recipe), raw


def evaluate(
    raw: Quality, beside: tuple[Variant, Quality] | None = None, checkpoint_nll: tuple[float, ...] | None = None
) -> Evaluation:
    """Of an int4 variant of 1 MB."""
    return summary.evaluation(variant(Path("int4")), speed(turn(timed(0.2, 1.2))), raw, beside, checkpoint_nll)


def figures(*arguments: Any) -> dict[str, Measurement]:
    return evaluate(*arguments).measurements


def nlls(seed: int, shift: float = 0) -> tuple[float, ...]:
    return tuple((np.random.default_rng(seed).exponential(2, TOKENS) + shift).tolist())


def distance(seed: int) -> Distance:
    random = np.random.default_rng(seed)
    return Distance(
        kl=tuple(random.exponential(0.05, TOKENS).tolist()), same_top=tuple((random.random(TOKENS) < 0.9).tolist())
    )


def test_distance_to_the_baseline() -> None:
    far = distance(2)
    found = figures(quality(nlls(1, 0.1), baseline=far), baseline(quality(nlls(1))))
    assert found["perplexity"].value == pytest.approx(math.exp(np.mean(nlls(1, 0.1))))
    assert found["size_ratio"].value == 0.25
    assert found["perplexity_ratio"].value == pytest.approx(math.exp(0.1))
    assert found["kl_mean"].value == pytest.approx(np.mean(far.kl))
    assert found["kl_median"].value == pytest.approx(np.median(far.kl))
    assert found["kl_p99"].value == pytest.approx(np.percentile(far.kl, 99))
    assert found["kl_max"].value == max(far.kl)
    assert found["top1_agreement"].value == pytest.approx(np.mean(far.same_top))
    assert {found[name].unit for name in KL} == {"nats", "1"}
    assert {found[name].samples for name in KL | {"perplexity_ratio"}} == {TOKENS}
    assert found["kl_mean"].low < np.mean(far.kl) < found["kl_mean"].high
    assert not found.keys() & CHECKPOINT


def test_distance_to_the_checkpoint() -> None:
    far = distance(3)
    found = figures(quality(nlls(1), hugging_face=far), None, nlls(1, -0.2))
    assert found["hf_perplexity_ratio"].value == pytest.approx(math.exp(0.2))
    assert found["hf_kl_mean"].value == pytest.approx(np.mean(far.kl))
    assert found["hf_top1_agreement"].value == pytest.approx(np.mean(far.same_top))


@pytest.mark.parametrize(("distances", "nll"), [({}, nlls(1)), ({"hugging_face": distance(3)}, None)])
def test_without_the_checkpoint(distances: dict[str, Distance], nll: tuple[float, ...] | None) -> None:
    assert not figures(quality(nlls(1), **distances), None, nll).keys() & (RELATIVE | KL | CHECKPOINT)


def test_baseline_against_itself() -> None:
    raw = quality(nlls(1), answers(True, False, None, True, True), hugging_face=distance(3))
    beside = baseline(raw)
    found = summary.evaluation(beside[0], speed(turn(timed(0.2, 1.2))), raw, beside, nlls(1)).measurements
    expected = {**dict.fromkeys(RELATIVE | KL, 0), "size_ratio": 1, "perplexity_ratio": 1, "length_ratio": 1}
    expected |= {"top1_agreement": 1, "mcnemar_p": 1}
    assert {name: found[name].value for name in expected} == expected
    exact = {"size_ratio", "perplexity_ratio", "length_ratio", "flips", "mcnemar_p", *KL}
    assert all(found[name].low == found[name].high == found[name].value for name in exact)
    # As good as itself, and yet four answers cannot prove it.
    assert found["accuracy_drop"].low < 0 < found["accuracy_drop"].high
    assert found["hf_perplexity_ratio"].value == 1
    assert found["hf_kl_mean"].value > 0


def test_a_variant_that_was_not_compared_is_not_taken_for_the_baseline() -> None:
    found = figures(quality(nlls(2)), baseline(quality(nlls(1))))
    assert not found.keys() & KL
    assert found.keys() >= RELATIVE


def test_accuracy_leaves_out_what_was_not_scored() -> None:
    found = figures(quality(answered=answers(True, None, False, True, None, True)))
    assert (found["accuracy"].value, found["accuracy"].samples) == (0.75, 4)
    assert found["accuracy"].note == f"standard error {math.sqrt(0.75 * 0.25 / 3):.3f}"
    assert found["accuracy"].low < 0.75
    assert (found["unscored"].value, found["unscored"].unit, found["unscored"].samples) == (2, "items", 6)
    assert (found["score"].value, found["score"].samples) == (0.75, 4)


def test_nothing_scored() -> None:
    found = figures(quality(answered=answers(None, None)), baseline(quality(answered=answers(None, True))))
    assert found["unscored"].value == 2
    made_of_judgements = {"accuracy", "score", "accuracy_drop", "flips", "mcnemar_p", "score_drop"}
    assert not [name for name in found if name in made_of_judgements or name.startswith(CATEGORY)]
    assert found["length_ratio"].value == 1


def test_accuracy_by_category_under_its_own_name() -> None:
    marked = [("World facts", True), ("World facts", False), ("world-facts", True), ("東京", False), ("大阪", True)]
    given = [answer(number, correct, category=category) for number, (category, correct) in enumerate(marked)]
    found = figures(quality(answered=(*given, answer(9, None, category="unscored only"))))
    assert {name: (one.value, one.samples) for name, one in found.items() if name.startswith(CATEGORY)} == {
        "accuracy.World facts": (0.5, 2),
        "accuracy.world-facts": (1, 1),
        "accuracy.東京": (0, 1),
        "accuracy.大阪": (1, 1),
    }
    assert (found["accuracy"].value, found["accuracy"].samples) == (0.6, 5)


def test_scores_have_degrees() -> None:
    scores = [0.2, 0.9, 0.4, 1.0, 0.0, 0.7]
    given = tuple(answer(number, score >= 0.5, score=score) for number, score in enumerate(scores))
    found = figures(quality(answered=given))
    assert found["score"].value == pytest.approx(np.mean(scores))
    assert found["accuracy"].value == 0.5
    assert found["score"].low < np.mean(scores)


@pytest.mark.parametrize(
    ("formats", "expected"), [([None, None], None), ([True, None, False, True], (2 / 3, 3)), ([False, None], (0, 1))]
)
def test_format(formats: list[bool | None], expected: tuple[float, int] | None) -> None:
    found = figures(quality(answered=tuple(answer(n, True, format_valid=valid) for n, valid in enumerate(formats))))
    if expected is None:
        assert "format_valid" not in found
    else:
        assert (found["format_valid"].value, found["format_valid"].samples) == expected


def test_how_answers_ended() -> None:
    reasons = ["stop", "length", "stop", "content_filter", "stop"]
    found = figures(quality(answered=tuple(answer(n, None, finish_reason=one) for n, one in enumerate(reasons))))
    assert (found["stop_rate"].value, found["truncated_rate"].value) == (0.6, 0.2)
    assert (found["stop_rate"].samples, found["truncated_rate"].samples) == (5, 5)


def test_answers_against_the_baselines_item_by_item() -> None:
    #          both right x 5  lost x 6  gained x 1  both wrong x 2  not scored by one or the other
    theirs = [True] * 5 + [True] * 6 + [False] * 1 + [False] * 2 + [None, True, None]
    ours = [True] * 5 + [False] * 6 + [True] * 1 + [False] * 2 + [True, None, None]
    found = figures(quality(answered=answers(*ours)), baseline(quality(answered=answers(*theirs))))
    assert (found["flips"].value, found["flips"].samples, found["flips"].unit) == (7, 14, "items")
    assert (found["accuracy_drop"].value, found["accuracy_drop"].samples) == (pytest.approx(5 / 14), 14)
    assert found["mcnemar_p"].value == pytest.approx(2 * binom.cdf(1, 7, 0.5))
    assert (found["score_drop"].value, found["score_drop"].samples) == (pytest.approx(5 / 14), 14)


def test_drop_of_scores_with_degrees() -> None:
    ours, theirs = (
        tuple(answer(number, True, score=score) for number, score in enumerate(scores))
        for scores in ([0.5, 0.6, 1.0, None], [0.7, 0.6, 0.9, 1.0])
    )
    found = figures(quality(answered=ours), baseline(quality(answered=theirs)))["score_drop"]
    assert (found.value, found.samples) == (pytest.approx((0.2 + 0 - 0.1) / 3), 3)


@pytest.mark.parametrize(
    ("ours", "theirs", "ratio"), [([10, 30], [20, 60], 0.5), ([10, 30], [10, 10], 2), ([5, 0], [0, 0], 5)]
)
def test_length_of_the_answers(ours: list[int], theirs: list[int], ratio: float) -> None:
    def given(lengths: list[int]) -> tuple[Answer, ...]:
        return tuple(answer(number, completion_tokens=length) for number, length in enumerate(lengths))

    found = figures(quality(answered=given(ours)), baseline(quality(answered=given(theirs))))
    assert found["length_ratio"].value == ratio


def test_the_policy_knows_just_what_is_measured_and_all_of_it_survives_json() -> None:
    # A job that is not quick, on a machine that tells its energy, with items of each kind.
    rounds = [
        turn(
            timed(0.2, 1.2),
            timed(0.1, 0.9, cell=1),
            cold=number == 0,
            energy_j=50.0,
            throughput={1: 20.0, 2: 33.0, 4: 41.0} if number == 0 else {},
            memory=((0.5, 50.0), (2.5, 60.0), (5.0, 70.0), (9.5, 55.0)),
        )
        for number in range(3)
    ]
    raw = quality(
        nlls(1),
        (answer(0, format_valid=True), answer(1, False, category="capitals"), answer(2, None)),
        baseline=distance(2),
        hugging_face=distance(3),
    )
    timings, beside = speed(*rounds, cells=((128, 16), (32, 16))), baseline(quality(nlls(2), raw.answers))
    made = summary.evaluation(variant(Path("int4")), timings, raw, beside, nlls(3))
    assert made.measurements.keys() == KNOWN_METRICS | {f"{CATEGORY}general", f"{CATEGORY}capitals"}
    assert (made.answers, made.cases, made.metrics["edge_cases_passed"]) == (raw.answers, CASES, 0.5)
    assert (made.evaluation_set_digest, made.text_digest) == ("e" * 64, "t" * 64)
    assert all(math.isfinite(value) for value in made.metrics.values())
    assert Evaluation.model_validate_json(made.model_dump_json()) == made
