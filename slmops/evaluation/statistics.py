"""Figures from samples, each with a 95 % interval. Pure functions; the same samples give the same interval.

All raise ValueError for no samples, a sample that is not finite, and pairs of different lengths. ``unit`` is that of
the samples, and ``percent`` runs from 0 to 100. SciPy is imported where it is needed, since that takes half a second.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.core.values import Measurement

Numbers = NDArray[np.float64]
Interval = tuple[float, float]

CONFIDENCE = 0.95
SEED = 20240229
RESAMPLES = 2000
RESAMPLED_AT_ONCE = 2_000_000  # numbers; more of a long series would fill the memory
MIN_SAMPLES = 5  # fewer have no interval; nor have fewer blocks, or pairs that differ
MIN_BEYOND = 10  # samples beyond a percentile in the tails, for an interval: p90 needs 100 samples, p99 1000
BLOCK_TOKENS = 64  # tokens that are resampled together
SLOPE_BLOCKS = 30
MAX_MORE = 1_000_000


def of_percentile(samples: Sequence[float], percent: float, unit: str) -> Measurement:
    """A percentile (NumPy's) of independent samples with its percentile-bootstrap interval.

    Not BCa: its jackknife is inconsistent for quantiles (Efron, 1982, The Jackknife, the Bootstrap and Other Resampling
    Plans). For the median of 5 to 30 log-normal samples, intervals of the level of ``_bootstrap`` cover 94 to 98 %. No
    resample reaches beyond the largest sample, so a percentile outside 25 to 75 % with fewer than ``MIN_BEYOND``
    samples beyond it has no interval but the note "indicative": p90 of 10 samples would be covered in 64 %.
    """
    values = _numbers(samples)
    return _percentile(values, percent, unit, values, partial(np.percentile, q=percent))


def percentile_of_rounds(rounds: Sequence[Sequence[float]], percent: float, unit: str) -> Measurement:
    """A percentile of all samples, with an interval that resamples the rounds first and then the samples in them.

    Requests to one process share its luck, so they are not independent (Davison and Hinkley, 1997, Bootstrap Methods
    and their Application, section 3.8): with three rounds of 30 that differ as much as the requests in one, resampling
    requests alone covers 42 %, this 88 %. A single round has the interval of its own samples. No round may be empty.
    """
    values = _numbers([sample for samples in rounds for sample in samples])
    if len(rounds) == 1 or max(map(len, rounds)) == 1:
        return of_percentile(values.tolist(), percent, unit)
    source = np.random.default_rng(SEED)

    def resampled(picked: Any) -> Any:
        pool = np.concatenate([rounds[number] for number in picked])
        return np.percentile(pool[source.integers(len(pool), size=len(values))], percent)

    return _percentile(values, percent, unit, np.arange(len(rounds)), resampled)


def blocked_percentile(values: Sequence[float], percent: float, unit: str) -> Measurement:
    """A percentile of one value per token, in the order of the text, with an interval over blocks of tokens."""
    tokens = _numbers(values)
    blocks = _blocks(tokens)
    if len(blocks) < MIN_SAMPLES:
        return _measurement(float(np.percentile(tokens, percent)), unit, len(tokens))

    def resampled(picked: Any) -> Any:
        return np.percentile(np.concatenate([blocks[number] for number in picked]), percent)

    return _percentile(tokens, percent, unit, np.arange(len(blocks)), resampled)


def of_mean(samples: Sequence[float], unit: str) -> Measurement:
    """The mean of independent samples with its BCa bootstrap interval; fewer than ``MIN_SAMPLES`` have none."""
    values = _numbers(samples)
    return _measurement(float(values.mean()), unit, len(values), _mean_interval(values))


def of_ratios(ratios: Sequence[float]) -> Measurement:
    """The geometric mean of a few log-normal ratios with Student's interval on their logarithms; one ratio has none."""
    from scipy.special import stdtrit

    logs = np.log(_numbers(ratios))
    value = float(np.exp(logs.mean()))
    if len(logs) < 2:
        return _measurement(value, "1", len(logs))
    half = stdtrit(len(logs) - 1, (1 + CONFIDENCE) / 2) * logs.std(ddof=1) / math.sqrt(len(logs))
    return _measurement(value, "1", len(logs), (value * math.exp(-half), value * math.exp(half)))


def of_proportion(successes: int, total: int) -> Measurement:
    """A proportion with its score interval (Wilson, 1927), which has a width even if all or none succeeded."""
    from scipy.stats import binomtest

    interval = binomtest(successes, total).proportion_ci(CONFIDENCE, method="wilson")
    return _measurement(successes / total, "1", total, (float(interval.low), float(interval.high)))


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> Measurement:
    """Difference of two proportions over the same items, ours less theirs, with its score interval.

    The interval is Tango's (1998, Statistics in Medicine 17, 891-908): all differences that the score test with the
    constrained maximum likelihood estimate does not reject. Without any discordant pair it is +-z^2 / (n + z^2),
    where those of Wald and of the bootstrap have no width.
    """
    gained, lost = _discordant(_differences(ours, theirs))
    return _measurement((gained - lost) / len(ours), "1", len(ours), _tango(gained, lost, len(ours)))


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Exact two-sided p-value that two variants are right equally often (McNemar, 1947); 1 without discordant pairs."""
    from scipy.stats import binomtest

    gained, lost = _discordant(_differences(ours, theirs))
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def paired_mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> Measurement:
    """Mean difference of scores from 0 to 1 over the same items, ours less theirs, with its paired bootstrap interval.

    Most answers of two precisions are the same, and only the pairs that differ show the spread: their number sets the
    level. Fewer than ``MIN_SAMPLES`` of them are too few to resample; then the interval includes the score interval of
    ``paired_difference``, as if each such pair differed by a whole point.
    """
    differences = _differences(ours, theirs)
    if min(*ours, *theirs) < 0 or max(*ours, *theirs) > 1:
        raise ValueError("scores must lie between 0 and 1")
    value, total = float(differences.mean()), len(differences)
    if total < MIN_SAMPLES:
        return _measurement(value, "1", total)
    gained, lost = _discordant(differences)
    low, high = _bootstrap(differences, np.mean, "percentile", informative=max(gained + lost, MIN_SAMPLES))
    if gained + lost < MIN_SAMPLES:
        score = _tango(gained, lost, total)
        low, high = min(low, score[0]), max(high, score[1])
    return _measurement(value, "1", total, (low, high))


def perplexity(nll: Sequence[float]) -> Measurement:
    """exp of the ``blocked_mean`` of the negative log-likelihood, in nats, of each token in the order of the text."""
    return blocked_mean(nll, "1").mapped(_exp)


def perplexity_ratio(nll: Sequence[float], baseline_nll: Sequence[float]) -> Measurement:
    """Perplexity divided by the baseline's on the same tokens, with the interval of ``blocked_mean`` over the pairs.

    Pairing removes the spread of the text, which is the same for both. Equal inputs give exactly 1.
    """
    differences = _differences(nll, baseline_nll)
    if not differences.any():
        return Measurement.exact(1.0, "1", len(differences))
    return blocked_mean(differences.tolist(), "1").mapped(_exp)


def blocked_mean(values: Sequence[float], unit: str) -> Measurement:
    """The mean of one value per token, with a BCa interval over blocks of ``BLOCK_TOKENS`` consecutive tokens.

    Neighbouring tokens are not independent; blocks much longer than the dependence nearly are (Carlstein, 1986,
    Annals of Statistics 14, 1171-1179). That of five blocks, the fewest, covers 91 %.
    """
    tokens = _numbers(values)
    interval = _mean_interval(np.array([block.mean() for block in _blocks(tokens)]))
    return _measurement(float(tokens.mean()), unit, len(tokens), interval)


def slope(values: Sequence[float], unit: str) -> Measurement:
    """Robust slope per step of an equally spaced series, such as the memory after each request; ``unit`` is of it.

    Theil-Sen with Sen's interval (1968, JASA 63, 1379-1389) over the medians of consecutive blocks, because samples
    spike and neighbours are correlated. About ``SLOPE_BLOCKS`` blocks of ten samples or more, or ``MIN_SAMPLES`` of
    fewer. Samples that fill no block are left out at the start, where a process is still warming up.
    """
    from scipy.stats import theilslopes

    series = _numbers(values)
    total = len(series)
    if total < 2 * MIN_SAMPLES:
        raise ValueError(f"a slope needs {2 * MIN_SAMPLES} samples or more, not {total}")
    length = max(total // SLOPE_BLOCKS, min(10, total // MIN_SAMPLES))
    medians = np.median(series[total % length :].reshape(-1, length), axis=1)
    fit = theilslopes(medians, alpha=CONFIDENCE)
    interval = (float(fit.low_slope) / length, float(fit.high_slope) / length)
    return _measurement(float(fit.slope) / length, unit, total, interval)


def more_samples(measurement: Measurement, limit: float) -> int | None:
    """About how many more samples would settle on which side of a limit the value lies; None: unknown, or too many.

    If value and spread stay the same, n (half-width / distance)^2 samples are enough.
    """
    end = measurement.low if measurement.value > limit else measurement.high
    distance = abs(measurement.value - limit)
    if end is None or distance == 0:
        return None
    ratio = abs(measurement.value - end) / distance
    more = measurement.samples * (ratio * ratio - 1)
    return max(1, math.ceil(more)) if more <= MAX_MORE else None


def noise_percent(samples: Sequence[float]) -> float:
    """Median absolute deviation, as a standard deviation, in percent of the median; infinity if only that is 0."""
    from scipy.stats import median_abs_deviation

    values = _numbers(samples)
    deviation = 100 * float(median_abs_deviation(values, scale="normal"))
    middle = abs(float(np.median(values)))
    return deviation / middle if middle else math.inf if deviation else 0.0


def _numbers(samples: Sequence[float]) -> Numbers:
    values = np.asarray(samples, dtype=float)
    if not len(values):
        raise ValueError("no samples")
    if not np.isfinite(values).all():
        raise ValueError("a sample is not finite")
    return values


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> Numbers:
    if len(ours) != len(theirs):
        raise ValueError(f"different lengths: {len(ours)} and {len(theirs)}")
    return _numbers(ours) - _numbers(theirs)


def _discordant(differences: Numbers) -> tuple[int, int]:
    return int((differences > 0).sum()), int((differences < 0).sum())


def _measurement(value: float, unit: str, samples: int, interval: Interval | None = None) -> Measurement:
    if interval is None:
        note = f"indicative: {samples} sample{'s' * (samples != 1)}"
        return Measurement(value=value, unit=unit, samples=samples, note=note)
    # Rounding must not put the value outside: charts take the distances to both ends.
    low, high = min(interval[0], value), max(interval[1], value)
    return Measurement(value=value, unit=unit, samples=samples, low=low, high=high)


def _exp(log: float) -> float:
    return math.exp(min(log, 700))  # about as far as it goes: the perplexity of a broken model stays a number


def _mean_interval(values: Numbers) -> Interval | None:
    if len(values) < MIN_SAMPLES:
        return None
    if np.ptp(values) <= 1e-12 * np.abs(values).max():  # BCa divides by the spread
        return float(values.min()), float(values.max())
    return _bootstrap(values, np.mean, "BCa")


def _percentile(
    values: Numbers, percent: float, unit: str, independent: Any, statistic: Callable[..., Any]
) -> Measurement:
    """A percentile; its interval, if there are enough samples for one, resamples what is independent."""
    value = float(np.percentile(values, percent))
    beyond = len(values) * min(percent, 100 - percent) / 100
    if len(values) < MIN_SAMPLES or (not 25 <= percent <= 75 and beyond < MIN_BEYOND - 1e-9):
        return _measurement(value, unit, len(values))
    return _measurement(value, unit, len(values), _bootstrap(independent, statistic, "percentile"))


def _blocks(tokens: Numbers) -> list[Numbers]:
    """Consecutive tokens in blocks of ``BLOCK_TOKENS`` or a few more, of equal length to within one."""
    return np.array_split(tokens, max(len(tokens) // BLOCK_TOKENS, 1))


def _bootstrap(values: Any, statistic: Callable[..., Any], method: str, informative: int | None = None) -> Interval:
    """At a level that covers 95 %, though a bootstrap knows neither n - 1 nor Student's t (Hesterberg, 2015, What
    Teachers Should Know About the Bootstrap, American Statistician 69, 371-386: expanded percentile interval)."""
    from scipy.special import ndtr, stdtrit
    from scipy.stats import bootstrap

    samples = informative or len(values)
    quantile = stdtrit(samples - 1, (1 + CONFIDENCE) / 2)
    interval = bootstrap(
        (values,),
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, RESAMPLED_AT_ONCE // len(values)),
        confidence_level=float(1 - 2 * ndtr(-quantile * math.sqrt(samples / (samples - 1)))),
        method=method,
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _tango(gained: int, lost: int, total: int) -> Interval:
    return -_tango_upper(lost, gained, total), _tango_upper(gained, lost, total)


def _tango_upper(gained: int, lost: int, total: int) -> float:
    from scipy.optimize import brentq
    from scipy.special import ndtri

    estimate = (gained - lost) / total
    if gained == total:
        return 1.0
    z = float(ndtri((1 + CONFIDENCE) / 2))

    def excess(difference: float) -> float:
        b = (2 * total - gained + lost) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        # Probability of "lost" that is the likeliest if this is the difference.
        likeliest = (math.sqrt(max(b * b - 8 * total * c, 0.0)) - b) / (4 * total)
        variance = (2 * likeliest + difference * (1 - difference)) / total
        return (estimate - difference) ** 2 - z * z * variance

    # The estimate itself is a root too where its variance is 0.
    return float(brentq(excess, estimate + 1e-9, 1.0))
