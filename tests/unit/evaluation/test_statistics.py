"""Percentiles against NumPy's."""

from __future__ import annotations

import random

import numpy as np
import pytest

from slmops.evaluation.statistics import percentile

PERCENTS = (0, 1, 12.5, 25, 50, 75, 90, 99, 99.9, 100)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 15, 101, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_same_as_numpy(count: int, seed: int) -> None:
    source = random.Random(seed)
    samples = [source.lognormvariate(0, 2) * source.choice((-1, 1)) for _ in range(count)]
    got = [percentile(samples, percent) for percent in PERCENTS]
    assert got == pytest.approx(np.percentile(samples, PERCENTS).tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("samples", "percent", "value"),
    [
        ([7.0], 0, 7),
        ([7.0], 99, 7),
        ([3, 1], 50, 2),
        ([3, 1], 0, 1),
        ([3, 1], 100, 3),
        ([4, 1, 3, 2], 50, 2.5),
        ([1, 2, 3, 4, 5], 90, 4.6),
        ([5, 5, 5], 50, 5),
        ([0, 0, 100], 50, 0),
    ],
)
def test_by_hand(samples: list[float], percent: float, value: float) -> None:
    assert percentile(samples, percent) == pytest.approx(value)


def test_samples_are_left_in_their_order() -> None:
    samples = (3.0, 1.0, 2.0)
    assert percentile(samples, 50) == 2
    assert samples == (3.0, 1.0, 2.0)


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)
