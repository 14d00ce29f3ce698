"""Figures and intervals against NumPy, SciPy, published tables and arithmetic by hand; few and impossible samples."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy import signal, stats

import slmops.evaluation.statistics as st
from slmops.core.values import Measurement


def table(both: int, ours: int, theirs: int, neither: int) -> tuple[list[bool], list[bool]]:
    mine = [True] * (both + ours) + [False] * (theirs + neither)
    other = [True] * both + [False] * ours + [True] * theirs + [False] * neither
    return mine, other


def scipys(samples: Any, statistic: Any, method: str, informative: int | None = None) -> Any:
    """SciPy's interval with other random numbers, and more of them."""
    count = informative or len(samples)
    level = 1 - 2 * stats.norm.cdf(stats.t.ppf(0.025, count - 1) * math.sqrt(count / (count - 1)))
    return stats.bootstrap(
        (samples,), statistic, confidence_level=level, n_resamples=20000, method=method, rng=np.random.default_rng(9)
    ).confidence_interval


@pytest.mark.parametrize("count", [30, 100])
def test_intervals_are_scipys(count: int) -> None:
    samples = np.random.default_rng(3).lognormal(0, 0.5, count)
    for got, wanted in (
        (st.of_mean(samples, "ms"), scipys(samples, np.mean, "BCa")),
        (st.of_percentile(samples, 50, "ms"), scipys(samples, np.median, "percentile")),
    ):
        assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), rel=0.04)
    tokens = np.random.default_rng(4).gamma(1, 3, 64 * count)
    wanted = scipys(tokens.reshape(-1, 64).mean(axis=1), np.mean, "BCa")
    got = st.blocked_mean(tokens, "1")
    assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), rel=0.01)
    assert got.value == pytest.approx(tokens.mean(), rel=1e-12)


def test_defect_8_rounds_that_differ_widen_the_interval() -> None:
    requests = np.random.default_rng(12).normal(100, 1, 30)
    alike = [requests[:10], requests[10:20], requests[20:]]
    apart = [one + shift for one, shift in zip(alike, (-10, 0, 10), strict=True)]
    for rounds, least in ((alike, 0), (apart, 15)):
        found = st.percentile_of_rounds(rounds, 50, "ms")
        assert (found.value, found.samples, found.unit) == (np.median(rounds), 30, "ms")
        assert least < found.high - found.low < least + 10
    # One round, and rounds of one, are independent samples.
    assert st.percentile_of_rounds([requests], 50, "ms") == st.of_percentile(requests, 50, "ms")
    two = st.percentile_of_rounds([[1, 2, 3], [11, 12, 13]], 50, "ms")
    assert (two.value, two.low < 3, two.high > 11) == (7, True, True)


def test_pairs_that_differ_set_the_width() -> None:
    scores = np.random.default_rng(5).uniform(0, 0.5, 40)
    better = scores + np.where(np.arange(40) < 8, 0.3, 0)
    wanted = scipys(better - scores, np.mean, "percentile", informative=8)
    measured = st.paired_mean_difference(better.tolist(), scores.tolist())
    assert measured.value == pytest.approx(0.06)
    assert (measured.low, measured.high) == pytest.approx((wanted.low, wanted.high), abs=0.008)


# Gained, lost, pairs and Tango's limits: Tango (1998), Karacan's sleeping difficulties; Fagerland, Lydersen and Laake
# (2014), Bentur's airway hyper-responsiveness; by hand, z^2 / (n + z^2).
@pytest.mark.parametrize(
    ("gained", "lost", "total", "low", "high"),
    [
        (9, 3, 32, -0.027, 0.390),
        (1, 7, 21, -0.517, -0.026),
        (0, 0, 40, -3.8415 / 43.8415, 3.8415 / 43.8415),
        (0, 0, 1, -3.8415 / 4.8415, 3.8415 / 4.8415),
        (20, 0, 20, 1 - 2 * 3.8415 / 23.8415, 1),
        (0, 20, 20, -1, 2 * 3.8415 / 23.8415 - 1),
    ],
)
def test_paired_difference_is_tangos(gained: int, lost: int, total: int, low: float, high: float) -> None:
    measured = st.paired_difference(*table(total - gained - lost, gained, lost, 0))
    assert measured.value == (gained - lost) / total
    assert (measured.low, measured.high) == pytest.approx((low, high), abs=6e-4)
    assert (measured.unit, measured.samples, measured.note) == ("1", total, None)
    half = total - gained - lost
    assert st.paired_difference(*table(half // 2, gained, lost, half - half // 2)) == measured


# 1 to 7: Fagerland, Lydersen and Laake (2013), airway hyper-responsiveness, exact conditional test.
def test_mcnemar_by_hand() -> None:
    for gained, lost, p in (
        *((0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (1, 7, 0.0703)),
        *((6, 0, 2 / 64), (0, 6, 2 / 64), (8, 2, 2 * (1 + 10 + 45) / 1024)),
    ):
        assert st.mcnemar(*table(11, gained, lost, 7)) == pytest.approx(p, abs=5e-5), (gained, lost)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998, Statistics in Medicine 17, 857-872), table I, method 3
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_proportion_is_wilsons(successes: int, total: int, low: float, high: float) -> None:
    measured = st.of_proportion(successes, total)
    assert (measured.value, measured.unit, measured.samples) == (successes / total, "1", total)
    assert (measured.low, measured.high) == pytest.approx((low, high), abs=6e-5)


def test_perplexity_of_a_fair_die_and_of_a_broken_model_is_a_number() -> None:
    measured = st.perplexity([math.log(6)] * 640)
    assert (measured.value, measured.low, measured.high) == pytest.approx((6, 6, 6))
    assert (measured.unit, measured.samples, measured.note) == ("1", 640, None)
    broken = st.perplexity([5000.0] * 640)
    assert 1e300 < broken.value == broken.high < math.inf


def test_perplexity_ratio_is_the_ratio_and_narrower_than_the_perplexities() -> None:
    source = np.random.default_rng(5)
    baseline = source.gamma(1, 3, 2048)
    nll = baseline + source.normal(0.05, 0.2, 2048)
    ours, theirs, ratio = st.perplexity(nll), st.perplexity(baseline), st.perplexity_ratio(nll, baseline)
    assert ratio.value == pytest.approx(ours.value / theirs.value)
    assert 1 < ratio.low < ratio.value < ratio.high < 1.1
    assert math.log(ratio.high / ratio.low) < math.log(ours.high / ours.low) / 5


def test_five_blocks_make_an_interval() -> None:
    for tokens, percent, has in ((319, 50, False), (320, 50, True), (900, 99, False), (1000, 99, True)):
        values = np.random.default_rng(7).normal(0, 1, tokens)
        found = [(st.blocked_percentile(values, percent, "nats"), np.percentile(values, percent))]
        if percent == 50:
            found.append((st.blocked_mean(values, "nats"), values.mean()))
        for measured, value in found:
            assert (measured.value, measured.samples) == (pytest.approx(value), tokens)
            assert (measured.low is not None, measured.high is not None) == (has, has)
            assert measured.note == (None if has else f"indicative: {tokens} samples")
    agreement = st.blocked_mean([True, True, True, False] * 512, "1")
    assert (agreement.value, agreement.unit, agreement.low, agreement.high) == (0.75, "1", 0.75, 0.75)


def test_more_samples() -> None:
    for value, low, high, samples, limit, more in (
        (0.0, -0.2, 0.4, 40, -0.1, 120),  # half the half-width towards the limit: four times the samples
        (0.0, -0.4, 0.2, 40, 0.1, 120),
        (1.0, 0.5, 1.5, 10, 5.0, 1),  # settled already
        (1.0, 0.9, 1.1, 10, 1.0, None),
        (1.0, None, None, 3, 2.0, None),
        (1.0, 0.0, 2.0, 100, 1.01001, 997_900),
        (1.0, 0.0, 2.0, 100, 1.0099, None),
        (0.0, -1.0, 1.0, 100, 5e-324, None),
    ):
        got = st.more_samples(Measurement(value=value, unit="1", samples=samples, low=low, high=high), limit)
        assert got == (more if more is None else pytest.approx(more, rel=0.01, abs=1)), (value, low, high, limit)
        assert got is None or isinstance(got, int)


def test_noise() -> None:
    for samples, percent in (
        *(([5], 0), ([5, 5, 5], 0), ([0, 0, 0], 0), ([-1, 0, 1], math.inf)),
        *(([9, 10, 11], 14.826), ([-9, -10, -11], 14.826), ([9, 10, 11, 1000], 1.4826 / 10.5 * 100)),
    ):
        assert st.noise_percent(samples) == pytest.approx(percent, rel=1e-4), samples


def test_the_same_samples_give_the_same_interval() -> None:
    samples = np.random.default_rng(10).lognormal(0, 1, 30)
    for function, *arguments in ((st.of_mean, samples), (st.percentile_of_rounds, [samples[:10], samples[10:]], 50)):
        assert function(*arguments, "ms") == function(*arguments, "ms")


def test_ratios_have_students_interval_on_logarithms() -> None:
    ratios = [0.8, 0.82, 0.9]
    found = st.of_ratios(ratios)
    logs = np.log(ratios)
    low, high = np.exp(stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs)))
    assert (found.value, found.low, found.high) == pytest.approx((np.exp(logs.mean()), low, high))
    assert st.of_ratios([0.5]).low is None


ENOUGH = [(5, 50), (100, 90), (100, 10), (10000, 99.9)]


@pytest.mark.parametrize(("count", "percent"), [*ENOUGH, (1, 50), (4, 50), (99, 90), (99, 10), (50, 100)])
def test_percentile_has_an_interval_from_enough_samples(count: int, percent: float) -> None:
    samples = np.random.default_rng(8).lognormal(0, 0.5, count)
    measured = st.of_percentile(samples.tolist(), percent, "ms")
    assert measured.value == pytest.approx(np.percentile(samples, percent))
    assert (measured.unit, measured.samples) == ("ms", count)
    if (count, percent) in ENOUGH:
        assert measured.note is None
        assert measured.low < measured.value < measured.high
    else:
        assert (measured.low, measured.high) == (None, None)
        assert measured.note == ("indicative: 1 sample" if count == 1 else f"indicative: {count} samples")


def test_few_samples_have_a_mean_and_no_interval_and_equal_ones_no_width() -> None:
    for count in (1, 4):
        measured = st.of_mean([3.0] * count, "ms")
        assert (measured.value, measured.low, measured.high, measured.samples) == (3.0, None, None, count)
        few = st.paired_mean_difference([0.5] * count, [0.25] * count)
        assert (few.value, few.low, few.high) == (0.25, None, None)
    for value in (0.0, 0.1, -7.5, 1e-300, 1e9):
        for measured in (st.of_mean([value] * 30, "ms"), st.of_percentile([value] * 30, 50, "ms")):
            assert (measured.value, measured.low, measured.high) == pytest.approx((value, value, value))
            assert measured.low <= measured.value <= measured.high
        assert st.slope([value] * 30, "MB").value == 0


def test_equal_scores_have_a_width() -> None:
    # Forty equal answers do not show that no answer would ever differ.
    same = st.paired_mean_difference([0.3] * 40, [0.3] * 40)
    alike = st.paired_difference([True] * 40, [True] * 40)
    assert same.value == alike.value == 0
    assert (same.low, same.high) == (alike.low, alike.high)


def test_slope_of_a_line_with_odd_samples_at_the_start_or_single_spikes() -> None:
    for count in (10, 11, 19, 20, 49, 50, 300, 329):
        measured = st.slope([7 + 0.25 * step for step in range(count)], "MB/request")
        assert (measured.value, measured.low, measured.high) == pytest.approx((0.25, 0.25, 0.25))
        assert measured.samples == count
    measured = st.slope([900.0] * 4 + [0.25 * step for step in range(25)], "MB/request")
    assert (measured.low, measured.high) == (0.25, 0.25)
    values = [0.5 * step for step in range(300)]
    values[290] = values[299] = 1e6
    assert st.slope(values, "MB/request").value == pytest.approx(0.5, rel=0.01)


NAN, INF, EMPTY = math.nan, math.inf, "no samples"
INFINITE = "not finite"


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        *((function, ([], 50, "ms"), EMPTY) for function in (st.of_percentile, st.blocked_percentile)),
        *((st.of_ratios, ([],), EMPTY), (st.paired_difference, ([], []), EMPTY), (st.perplexity, ([INF],), INFINITE)),
        *((st.percentile_of_rounds, ([[1.0], [NAN]], 50, "ms"), INFINITE), (st.noise_percent, ([1.0, NAN],), INFINITE)),
        *((st.perplexity_ratio, ([NAN], [1.0]), INFINITE), (st.slope, ([1.0] * 20 + [NAN], "MB"), INFINITE)),
        *((st.of_proportion, (0, 0), "not less than 1"), (st.of_proportion, (-1, 2), "not less than 0")),
        *((st.of_proportion, (3, 2), "3.*2"), (st.slope, ([1.0] * 9, "MB"), "10 samples or more, not 9")),
        (st.paired_difference, ([True], []), "different lengths: 1 and 0"),
        (st.perplexity_ratio, ([1.0] * 3, [1.0] * 2), "different lengths: 3 and 2"),
        *((st.paired_mean_difference, scores, "between 0 and 1") for scores in (([1.5], [1.0]), ([0.5], [-0.1]))),
    ],
)
def test_what_makes_no_sense_is_refused(function: Callable[..., object], arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments)


# --- against simulated truth: a 95 % interval is right if it holds the truth in 95 % of the worlds

WORLDS = 150  # they tell that to +-3.5 %
FEW = 15  # where each world takes long: enough to tell 0.8 from half of them
World = Callable[[np.random.Generator], Measurement]


def correlated(source: np.random.Generator, count: int, rho: float) -> Any:
    """AR(1) with standard deviation 1, past its start."""
    noise = source.standard_normal(count + 100) * math.sqrt(1 - rho**2)
    return signal.lfilter([1], [1, -rho], noise)[100:]


def rounds(source: np.random.Generator, differ: float = 1) -> list[Any]:
    return [source.normal(differ * source.standard_normal(), 1, 30) for _ in range(3)]


def scores(differ: float, source: np.random.Generator) -> Measurement:
    theirs = source.uniform(0.25, 0.75, 40)
    ours = theirs + np.where(source.random(40) < differ, source.uniform(-0.25, 0.15, 40), 0)
    return st.paired_mean_difference(ours.tolist(), theirs.tolist())


def slope(count: int, rho: float, source: np.random.Generator) -> Measurement:
    """MB after each request: noise of 2 MB, and every fiftieth request leaves 100 MB until the next."""
    noise, spikes = correlated(source, count, rho), source.random(count) < 0.02
    return st.slope(900 + 2 * noise + np.where(spikes, 100, 0), "MB/request")


@pytest.mark.parametrize(
    ("truth", "world", "least", "most", "worlds"),
    [
        (1, lambda source: st.of_percentile(source.lognormal(0, 0.5, 5), 50, "ms"), 0.92, 0.98, WORLDS),
        # Defect 8: rounds differ, and tokens are correlated.
        (0, lambda source: st.percentile_of_rounds(rounds(source, 0), 50, "ms"), 0.94, 1, FEW),
        (0, lambda source: st.percentile_of_rounds(rounds(source), 50, "ms"), 0.8, 1, FEW),
        (0, lambda source: st.blocked_percentile(correlated(source, 640, 0.6), 50, "nats"), 0.9, 1, FEW),
        (0, lambda source: st.blocked_mean(correlated(source, 2048, 0.6), "1"), 0.92, 0.98, WORLDS),
        # Where hardly any pair differs, it errs on the wide side.
        *((-0.05 * differ, partial(scores, differ), 0.92, 1, WORLDS) for differ in (0.1, 0.3)),
        (-0.05, partial(scores, 1), 0.92, 0.98, WORLDS),
        (0, partial(slope, 12, 0), 0.92, 1, WORLDS),  # five blocks: their interval is nearly all there is
        *((0, partial(slope, count, rho), 0.92, 0.98, WORLDS) for count, rho in ((100, 0.5), (300, 0.5), (1000, 0.8))),
    ],
)
def test_coverage(truth: float, world: World, least: float, most: float, worlds: int) -> None:
    source = np.random.default_rng(1)
    measured = [world(source) for _ in range(worlds)]
    assert least <= np.mean([one.low <= truth <= one.high for one in measured]) <= most
