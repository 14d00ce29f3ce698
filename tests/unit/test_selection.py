"""The tutorial's rule as a table: the smallest that is good enough, fp32 as the last resort."""

from __future__ import annotations

from typing import Any

import pytest

from slmops.job import Job
from slmops.models import VariantResult
from slmops.selection import choose, shortfalls
from tests.values import failed, result

# Perplexity may be 1.1 times the baseline's, accuracy 0.1 below.
FP32 = result("fp32", 600, 1.0, 0.5)
FP16 = result("fp16", 300, 1.0, 0.5)
INT8 = result("int8", 180, 1.01, 0.48)
INT4 = result("int4", 110, 1.08, 0.45)
BAD_INT4 = result("int4", 110, 1.44, 0.45)
WRONG_INT4 = result("int4", 110, 1.05, 0.3)
BAD_INT8 = result("int8", 180, 1.2, 0.5)
BAD_FP16 = result("fp16", 300, 1.0, 0.2)
ALL_BAD = [FP32, BAD_FP16, BAD_INT8, BAD_INT4]


@pytest.mark.parametrize(
    ("results", "chosen"),
    [
        pytest.param([FP32, FP16, INT8, INT4], "int4", id="int4 is good"),
        pytest.param([INT4, FP16, INT8, FP32], "int4", id="whatever the order"),
        pytest.param([FP32, FP16, INT8, BAD_INT4], "int8", id="int4's perplexity is too high"),
        pytest.param([FP32, FP16, INT8, WRONG_INT4], "int8", id="int4's answers are too bad"),
        pytest.param([FP32, FP16, BAD_INT8, BAD_INT4], "fp16", id="only fp16 is good"),
        pytest.param(ALL_BAD, "fp32", id="none is good"),
        pytest.param([FP32], "fp32", id="nothing but the baseline"),
        pytest.param([FP32, failed("int4", "r"), INT8], "int8", id="int4 failed"),
        pytest.param([FP32, failed("int4", "r")], "fp32", id="all others failed"),
        pytest.param([failed("fp32", "r"), INT8, INT4], None, id="the baseline failed"),
        pytest.param([INT8, INT4], None, id="no baseline"),
        pytest.param([], None, id="nothing"),
        pytest.param([FP32, INT4, result("mine", 90, 1.02, 0.5)], "mine", id="the user's own is smaller"),
        pytest.param([FP32, INT4, result("mine", 150, 1.0, 0.6)], "int4", id="the user's own is better but larger"),
        pytest.param([FP32, BAD_INT4, result("mine", 150)], "mine", id="the user's own by its size"),
        pytest.param([FP32, result("mine", 700, 0.9, 0.6)], "fp32", id="the user's own is larger than the baseline"),
        pytest.param([FP32, result("mine", 600)], "fp32", id="the user's own is as large as the baseline"),
        pytest.param([FP32, result("int4", 110, 1.1, 0.4)], "int4", id="exactly at both limits"),
        pytest.param([FP32, result("int4", 110, 1.1000001, 0.5)], "fp32", id="just above the perplexity limit"),
        pytest.param([FP32, result("int4", 110, 1.0, 0.3999)], "fp32", id="just below the accuracy limit"),
        pytest.param([result("fp32", 600, 1.0, 0.8), result("int4", 110, 1.0, 0.7)], "int4", id="0.8 - 0.7 > 0.1"),
        pytest.param([FP32, result("int4", 110, 0.9, 0.9)], "int4", id="better than the baseline"),
        pytest.param([FP32, result("int4", 110, float("nan"), 0.5)], "fp32", id="no number is not good"),
        pytest.param([FP32, result("int4", 110, 1.0, float("nan"))], "fp32", id="nor is it for accuracy"),
    ],
)
def test_choice(results: list[VariantResult], chosen: str | None) -> None:
    assert choose(results, Job(model="m")).variant == chosen


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({}, "int8"),
        ({"max_perplexity_ratio": 1.5}, "int4"),
        ({"max_perplexity_ratio": 1.001}, "fp16"),
        ({"max_accuracy_drop": 0}, "fp16"),
        ({"max_perplexity_ratio": 1.5, "max_accuracy_drop": 0.01}, "fp16"),
        ({"max_perplexity_ratio": 1.5, "max_accuracy_drop": 1}, "int4"),
    ],
)
def test_limits_are_the_jobs(asked: dict[str, Any], chosen: str) -> None:
    assert choose([FP32, FP16, INT8, BAD_INT4], Job(model="m", **asked)).variant == chosen


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        (
            [FP32, INT8, INT4],
            "int4 is the smallest satisfactory variant: perplexity 1.080 times the baseline's, accuracy 0.45 against "
            "0.50, 0.18 of its size.",
        ),
        (
            [FP32, INT8, BAD_INT4],
            "int8 is the smallest satisfactory variant: perplexity 1.010 times the baseline's, accuracy 0.48 against "
            "0.50, 0.30 of its size (int4 is not: its perplexity is 1.440 times the baseline's, above 1.1).",
        ),
        (
            [FP32, result("int8", 180, 1.2, 0.2), WRONG_INT4],
            "fp32 is taken: no other variant is satisfactory: int4 is not: its accuracy is 0.30, more than 0.1 below "
            "the baseline's 0.50; int8 is not: its perplexity is 1.200 times the baseline's, above 1.1 and its "
            "accuracy is 0.20, more than 0.1 below the baseline's 0.50.",
        ),
        (
            [FP32, result("mine", 700)],
            "fp32 is taken: no other variant is satisfactory: mine is not: its 700.0 MB are no less than the "
            "baseline's 600.0.",
        ),
        ([FP32], "fp32 is taken: there is no other variant."),
        (
            [failed("fp32", "r"), INT4],
            "No variant is chosen: there is no fp32 baseline to judge the others against.",
        ),
    ],
)
def test_reason_is_a_sentence_with_the_numbers(results: list[VariantResult], reason: str) -> None:
    assert choose(results, Job(model="m")).reason == reason


def test_every_refused_variant_is_named() -> None:
    reason = choose(ALL_BAD, Job(model="m")).reason
    assert [reason.count(f"{name} is not: ") for name in ("int4", "int8", "fp16", "fp32")] == [1, 1, 1, 0]


def test_shortfalls_of_the_good_are_none() -> None:
    assert shortfalls(INT4, FP32, Job(model="m")) == []
