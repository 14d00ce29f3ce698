"""The intervals against simulated truth.

A 95 % interval is right if it holds the truth in 95 % of the worlds; 300 simulated ones tell that to +-2.5 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import signal, stats

import slmops.evaluation.statistics as st
from slmops.core.values import Measurement

WORLDS = 300


def coverage(truth: float, world: Callable[[np.random.Generator], Measurement], worlds: int = WORLDS) -> float:
    source = np.random.default_rng(1)
    hits = 0
    for _ in range(worlds):
        measured = world(source)
        hits += measured.low <= truth <= measured.high
    return hits / worlds


def correlated(source: np.random.Generator, count: int, rho: float) -> Any:
    """AR(1) with standard deviation 1, past its start."""
    noise = source.standard_normal(count + 100) * math.sqrt(1 - rho**2)
    return signal.lfilter([1], [1, -rho], noise)[100:]


@pytest.mark.parametrize("count", [5, 12, 30])
def test_median_covers(count: int) -> None:
    share = coverage(8.0, lambda source: st.of_percentile(8 * source.lognormal(0, 0.5, count), 50, "ms"))
    assert 0.92 <= share <= 0.98


@pytest.mark.parametrize(("differ", "least"), [(0, 0.94), (1, 0.8)])
def test_median_of_rounds_covers(differ: float, least: float) -> None:
    def rounds(source: np.random.Generator) -> list[Any]:
        return [source.normal(differ * source.standard_normal(), 1, 30) for _ in range(3)]

    assert coverage(0, lambda source: st.percentile_of_rounds(rounds(source), 50, "ms"), worlds=100) >= least
    if differ:
        assert coverage(0, lambda source: st.of_percentile(np.concatenate(rounds(source)), 50, "ms"), worlds=60) < 0.6


def test_defect_8_percentile_of_correlated_tokens_covers() -> None:
    def world(percentile: Callable[..., Measurement]) -> Callable[[np.random.Generator], Measurement]:
        return lambda source: percentile(correlated(source, 640, 0.6), 50, "nats")

    assert coverage(0, world(st.blocked_percentile), worlds=60) >= 0.9
    assert coverage(0, world(st.of_percentile), worlds=40) < 0.85


def test_tail_percentile_covers_from_where_it_has_an_interval() -> None:
    truth = math.exp(0.5 * stats.norm.ppf(0.9))
    share = coverage(truth, lambda source: st.of_percentile(source.lognormal(0, 0.5, 100), 90, "ms"), worlds=300)
    assert 0.90 <= share <= 0.98


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda source: source.normal(10, 2, 30), 10),
        (lambda source: source.lognormal(0, 0.5, 30), math.exp(0.125)),
        (lambda source: source.normal(10, 2, 8), 10),
    ],
    ids=["normal", "log-normal", "8 samples"],
)
def test_mean_covers(draw: Callable[[np.random.Generator], Any], truth: float) -> None:
    assert 0.92 <= coverage(truth, lambda source: st.of_mean(draw(source), "ms")) <= 0.98


@pytest.mark.parametrize("total", [12, 40])
def test_proportion_covers(total: int) -> None:
    intervals = [st.of_proportion(successes, total) for successes in range(total + 1)]
    lows, highs = np.array([[one.low, one.high] for one in intervals], dtype=float).T
    exact = []
    for truth in np.arange(0.2, 0.96, 0.01):
        chance = stats.binom.pmf(np.arange(total + 1), total, truth)
        exact.append(chance[(lows <= truth) & (truth <= highs)].sum())
    assert 0.94 <= np.mean(exact) <= 0.97
    assert min(exact) >= 0.87  # Wilson's dips, as all intervals of counts have them


def test_paired_difference_covers() -> None:
    total = 40
    cells = [(gained, lost) for gained, lost in product(range(total + 1), repeat=2) if gained + lost <= total]
    pairs = [([1] * gained + [0] * (total - gained), [0] * gained + [1] * lost) for gained, lost in cells]
    measured = [st.paired_difference(ours, theirs + [0] * (total - len(theirs))) for ours, theirs in pairs]
    lows, highs = np.array([[one.low, one.high] for one in measured], dtype=float).T
    counts = np.array([(gained, lost, total - gained - lost) for gained, lost in cells])
    for gain, loss in [(0.05, 0.05), (0.1, 0.1), (0.2, 0.2), (0.05, 0.15), (0.02, 0.2), (0.3, 0.1), (0.1, 0.5)]:
        chance = stats.multinomial.pmf(counts, total, (gain, loss, 1 - gain - loss))
        exact = chance[(lows <= gain - loss) & (gain - loss <= highs)].sum()
        assert 0.92 <= exact <= 0.98, (gain, loss)
    rare = stats.multinomial.pmf(counts, total, (0.01, 0.01, 0.98))
    assert rare[(lows <= 0) & (highs >= 0)].sum() >= 0.95


@pytest.mark.parametrize("differ", [0.1, 0.3, 1.0])
def test_paired_mean_difference_covers(differ: float) -> None:
    def world(source: np.random.Generator) -> Measurement:
        theirs = source.uniform(0.25, 0.75, 40)
        ours = theirs + np.where(source.random(40) < differ, source.uniform(-0.25, 0.15, 40), 0)
        return st.paired_mean_difference(ours.tolist(), theirs.tolist())

    share = coverage(-0.05 * differ, world)
    # Where hardly any pair differs, it errs on the wide side.
    assert 0.92 <= share <= (0.98 if differ == 1 else 1)


@pytest.mark.parametrize("tokens", [1400, 2048])
def test_perplexity_ratio_covers_correlated_tokens(tokens: int) -> None:
    def world(source: np.random.Generator) -> Measurement:
        baseline = source.gamma(1, 3, tokens)
        return st.perplexity_ratio(baseline + 0.02 + 0.3 * correlated(source, tokens, 0.3), baseline)

    assert 0.92 <= coverage(math.exp(0.02), world) <= 0.98


def test_blocks_are_what_makes_it_cover() -> None:
    def naive(source: np.random.Generator) -> Measurement:
        values = correlated(source, 2048, 0.6)
        half = 1.96 * values.std() / math.sqrt(2048)
        return Measurement(value=0, unit="1", low=values.mean() - half, high=values.mean() + half)

    assert 0.92 <= coverage(0, lambda source: st.blocked_mean(correlated(source, 2048, 0.6), "1")) <= 0.98
    assert coverage(0, naive) < 0.75


@pytest.mark.parametrize(("count", "rho"), [(12, 0.0), (100, 0.5), (300, 0.5), (1000, 0.8)])
def test_slope_covers_correlated_series_with_spikes(count: int, rho: float) -> None:
    def world(source: np.random.Generator) -> Measurement:
        """MB after each request: noise of 2 MB, and every fiftieth request leaves 100 MB until the next."""
        noise, spikes = correlated(source, count, rho), source.random(count) < 0.02
        return st.slope(900 + 2 * noise + np.where(spikes, 100, 0), "MB/request")

    share = coverage(0, world)
    assert 0.92 <= share <= (0.98 if count >= 100 else 1)  # five blocks: their interval is nearly all there is
