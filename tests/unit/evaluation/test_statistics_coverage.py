"""The intervals against simulated truth.

A 95 % interval is right if it holds the truth in 95 % of the worlds; 150 simulated ones tell that to +-3.5 %.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy import signal, stats

import slmops.evaluation.statistics as st
from slmops.core.values import Measurement

WORLDS = 150
FEW = 15
"""Where each world takes long: enough to tell 0.8 from half of them."""
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


def ratio(tokens: int, source: np.random.Generator) -> Measurement:
    baseline = source.gamma(1, 3, tokens)
    return st.perplexity_ratio(baseline + 0.02 + 0.3 * correlated(source, tokens, 0.3), baseline)


def slope(count: int, rho: float, source: np.random.Generator) -> Measurement:
    """MB after each request: noise of 2 MB, and every fiftieth request leaves 100 MB until the next."""
    noise, spikes = correlated(source, count, rho), source.random(count) < 0.02
    return st.slope(900 + 2 * noise + np.where(spikes, 100, 0), "MB/request")


def median(count: int, source: np.random.Generator) -> Measurement:
    return st.of_percentile(8 * source.lognormal(0, 0.5, count), 50, "ms")


P90 = math.exp(0.5 * stats.norm.ppf(0.9))


@pytest.mark.parametrize(
    ("truth", "world", "least", "most", "worlds"),
    [
        *((8, partial(median, count), 0.92, 0.98, WORLDS) for count in (5, 30)),
        (P90, lambda source: st.of_percentile(source.lognormal(0, 0.5, 100), 90, "ms"), 0.9, 0.98, 100),
        # Defect 8: rounds differ, and tokens are correlated.
        (0, lambda source: st.percentile_of_rounds(rounds(source, 0), 50, "ms"), 0.94, 1, FEW),
        (0, lambda source: st.percentile_of_rounds(rounds(source), 50, "ms"), 0.8, 1, FEW),
        (0, lambda source: st.of_percentile(np.concatenate(rounds(source)), 50, "ms"), 0, 0.59, FEW),
        (0, lambda source: st.blocked_percentile(correlated(source, 640, 0.6), 50, "nats"), 0.9, 1, FEW),
        (0, lambda source: st.of_percentile(correlated(source, 640, 0.6), 50, "nats"), 0, 0.84, FEW),
        (0, lambda source: st.blocked_mean(correlated(source, 2048, 0.6), "1"), 0.92, 0.98, WORLDS),
        (10, lambda source: st.of_mean(source.normal(10, 2, 8), "ms"), 0.92, 0.98, WORLDS),
        (math.exp(0.125), lambda source: st.of_mean(source.lognormal(0, 0.5, 30), "ms"), 0.92, 0.98, WORLDS),
        # Where hardly any pair differs, it errs on the wide side.
        *((-0.05 * differ, partial(scores, differ), 0.92, 1, WORLDS) for differ in (0.1, 0.3)),
        (-0.05, partial(scores, 1), 0.92, 0.98, WORLDS),
        *((math.exp(0.02), partial(ratio, tokens), 0.92, 0.98, WORLDS) for tokens in (1400, 2048)),
        (0, partial(slope, 12, 0), 0.92, 1, WORLDS),  # five blocks: their interval is nearly all there is
        *((0, partial(slope, count, rho), 0.92, 0.98, WORLDS) for count, rho in ((100, 0.5), (300, 0.5), (1000, 0.8))),
    ],
)
def test_coverage(truth: float, world: World, least: float, most: float, worlds: int) -> None:
    source = np.random.default_rng(1)
    measured = [world(source) for _ in range(worlds)]
    assert least <= np.mean([one.low <= truth <= one.high for one in measured]) <= most
