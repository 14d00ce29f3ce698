"""Figures of few, equal and impossible samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

import slmops.evaluation.statistics as st

TOO_FEW = [(1, 50), (4, 50), (99, 90), (999, 99), (99, 10), (12, 99), (50, 100)]
ENOUGH = [(5, 50), (100, 90), (1000, 99), (100, 10), (10000, 99.9)]


@pytest.mark.parametrize(
    ("count", "percent", "has"), [*((*one, False) for one in TOO_FEW), *((*one, True) for one in ENOUGH)]
)
def test_percentile_has_an_interval_from_enough_samples(count: int, percent: float, has: bool) -> None:
    samples = np.random.default_rng(8).lognormal(0, 0.5, count)
    measured = st.of_percentile(samples.tolist(), percent, "ms")
    assert measured.value == pytest.approx(np.percentile(samples, percent))
    assert (measured.unit, measured.samples) == ("ms", count)
    if has:
        assert measured.note is None
        assert measured.low < measured.value < measured.high
    else:
        assert (measured.low, measured.high) == (None, None)
        assert measured.note == ("indicative: 1 sample" if count == 1 else f"indicative: {count} samples")


def test_two_rounds_have_an_interval_that_spans_both() -> None:
    measured = st.percentile_of_rounds([[1, 2, 3], [11, 12, 13]], 50, "ms")
    assert (measured.value, measured.low < 3, measured.high > 11) == (7, True, True)


@pytest.mark.parametrize("count", [1, 4])
def test_few_samples_have_a_mean_and_no_interval(count: int) -> None:
    measured = st.of_mean([3.0] * count, "ms")
    assert (measured.value, measured.low, measured.high, measured.samples) == (3.0, None, None, count)
    few = st.paired_mean_difference([0.5] * count, [0.25] * count)
    assert (few.value, few.low, few.high) == (0.25, None, None)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.5, 1e-300, 1e9])
def test_equal_samples_have_no_width(value: float) -> None:
    for measured in (st.of_mean([value] * 30, "ms"), st.of_percentile([value] * 30, 50, "ms")):
        assert measured.value == pytest.approx(value)
        assert (measured.low, measured.high) == pytest.approx((value, value))
        assert measured.low <= measured.value <= measured.high
    assert st.slope([value] * 30, "MB").value == 0


def test_equal_scores_have_a_width() -> None:
    # Forty equal answers do not show that no answer would ever differ.
    same = st.paired_mean_difference([0.3] * 40, [0.3] * 40)
    alike = st.paired_difference([True] * 40, [True] * 40)
    assert same.value == alike.value == 0
    assert (same.low, same.high) == (alike.low, alike.high)
    one = st.paired_mean_difference([0.3] * 39 + [1.0], [0.3] * 39 + [0.2])
    assert one.value == pytest.approx(0.02)
    assert one.low < -0.05
    assert one.high > 0.1


def test_all_right_and_all_wrong() -> None:
    measured = st.paired_difference([True] * 40, [False] * 40)
    assert (measured.value, measured.high) == (1.0, 1.0)
    assert measured.low == pytest.approx(0.825, abs=0.001)
    assert st.mcnemar([True] * 40, [False] * 40) == pytest.approx(2 / 2**40)
    assert st.of_proportion(40, 40).high == pytest.approx(1)
    assert st.of_proportion(0, 40).low == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count", [10, 11, 19, 20, 49, 50, 300, 329])
def test_slope_of_a_line(count: int) -> None:
    measured = st.slope([7 + 0.25 * step for step in range(count)], "MB/request")
    assert (measured.value, measured.low, measured.high) == pytest.approx((0.25, 0.25, 0.25))
    assert measured.samples == count


def test_slope_leaves_the_odd_samples_out_at_the_start() -> None:
    measured = st.slope([900.0] * 4 + [0.25 * step for step in range(25)], "MB/request")
    assert (measured.low, measured.high) == (0.25, 0.25)


def test_single_spikes_do_not_tilt_the_slope() -> None:
    values = [0.5 * step for step in range(300)]
    values[290] = values[299] = 1e6
    assert st.slope(values, "MB/request").value == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: st.of_percentile([], 50, "ms"), "no samples"),
        (lambda: st.percentile_of_rounds([], 50, "ms"), "no samples"),
        (lambda: st.percentile_of_rounds([[1.0], [math.nan]], 50, "ms"), "not finite"),
        (lambda: st.blocked_percentile([], 50, "nats"), "no samples"),
        (lambda: st.of_mean([], "ms"), "no samples"),
        (lambda: st.of_mean([1, math.nan, 2], "ms"), "not finite"),
        (lambda: st.of_percentile([1, math.inf], 50, "ms"), "not finite"),
        (lambda: st.of_proportion(0, 0), "not less than 1"),
        (lambda: st.of_proportion(3, 2), "3.*2"),
        (lambda: st.of_proportion(-1, 2), "not less than 0"),
        (lambda: st.paired_difference([], []), "no samples"),
        (lambda: st.paired_difference([True], []), "different lengths: 1 and 0"),
        (lambda: st.mcnemar([], []), "no samples"),
        (lambda: st.mcnemar([True], [True, False]), "different lengths: 1 and 2"),
        (lambda: st.paired_mean_difference([], []), "no samples"),
        (lambda: st.paired_mean_difference([1.0], [1.0, 0.5]), "different lengths: 1 and 2"),
        (lambda: st.paired_mean_difference([1.5], [1.0]), "between 0 and 1"),
        (lambda: st.paired_mean_difference([0.5], [-0.1]), "between 0 and 1"),
        (lambda: st.perplexity([]), "no samples"),
        (lambda: st.perplexity([1.0, math.inf]), "not finite"),
        (lambda: st.perplexity_ratio([1.0] * 3, [1.0] * 2), "different lengths: 3 and 2"),
        (lambda: st.perplexity_ratio([], []), "no samples"),
        (lambda: st.perplexity_ratio([math.nan], [1.0]), "not finite"),
        (lambda: st.blocked_mean([], "1"), "no samples"),
        (lambda: st.slope([], "MB"), "no samples"),
        (lambda: st.slope([1.0] * 9, "MB"), "10 samples or more, not 9"),
        (lambda: st.slope([1.0] * 20 + [math.nan], "MB"), "not finite"),
        (lambda: st.noise_percent([1.0, math.nan]), "not finite"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
