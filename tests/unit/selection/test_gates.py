"""Gates as a table: a limit is kept or broken only if the whole interval says so."""

import math
from functools import partial
from typing import Any

import pytest

from slmops.core.values import GateResult, Measurement, VariantResult
from slmops.evaluation import statistics
from slmops.selection.choice import apply
from slmops.selection.policy import Gate, Policy

NAN = float("nan")
Figures = dict[str, Measurement]


def measured(value: float, low: float | None = None, high: float | None = None, samples: int = 100) -> Measurement:
    """A figure with an interval; without ends, one that has too few samples."""
    return Measurement(value=value, unit="1", samples=samples, low=low, high=high)


exact = partial(Measurement.exact, unit="1")


def judge(
    gate: dict[str, Any],
    own: Figures,
    baseline: Figures | None = None,
    champion: Figures | None = None,
    name: str = "int4",
) -> GateResult:
    """One gate, applied to a variant of which nothing but ``own`` is known."""
    variant = VariantResult(name=name, status="ok", measurements=own)
    beside = None if baseline is None else VariantResult(name="fp32", status="ok", measurements=baseline)
    (made,) = apply(Policy(gates=(Gate(**gate),)), variant, variant if name == "fp32" else beside, champion)
    return made


def numbers(made: GateResult) -> tuple[float | None, float | None, float | None]:
    return made.value, made.low, made.high


AT_MOST = {"metric": "kl_mean", "max": 0.1}
AT_LEAST = {"metric": "top1_agreement", "min": 0.9}


@pytest.mark.parametrize(
    ("gate", "figure", "outcome"),
    [
        pytest.param(AT_MOST, exact(0.1), "pass", id="at max"),
        pytest.param(AT_MOST, exact(0.1 + 1e-12), "pass", id="at max but for rounding"),
        pytest.param(AT_MOST, exact(0.1001), "fail", id="above max"),
        pytest.param(AT_MOST, measured(0.09, 0.08, 0.1), "pass", id="interval up to max"),
        pytest.param(AT_MOST, measured(0.09, 0.08, 0.11), "inconclusive", id="value below max, interval not"),
        pytest.param(AT_MOST, measured(0.11, 0.09, 0.13), "inconclusive", id="value above max, interval not"),
        pytest.param(AT_MOST, measured(0.12, 0.1, 0.14), "inconclusive", id="interval down to max"),
        pytest.param(AT_MOST, measured(0.12, 0.11, 0.13), "fail", id="interval above max"),
        pytest.param(AT_MOST, measured(0.01), "inconclusive", id="no interval, below max"),
        pytest.param(AT_MOST, measured(9.0), "inconclusive", id="no interval, above max"),
        pytest.param(AT_MOST, exact(NAN), "fail", id="no number"),
        pytest.param(AT_MOST, exact(-math.inf), "fail", id="no finite number"),
        pytest.param(AT_LEAST, exact(0.9), "pass", id="at min"),
        pytest.param(AT_LEAST, exact(0.8999), "fail", id="below min"),
        pytest.param(AT_LEAST, measured(0.95, 0.9, 0.97), "pass", id="interval down to min"),
        pytest.param(AT_LEAST, measured(0.95, 0.89, 0.97), "inconclusive", id="interval straddles min"),
        pytest.param(AT_LEAST, measured(0.85, 0.8, 0.9), "inconclusive", id="interval up to min"),
    ],
)
@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, {"fail", "inconclusive"}),
        ({"inconclusive": "accept"}, {"fail", "value beyond"}),
        ({"advisory": True}, set()),
        ({"advisory": True, "inconclusive": "accept"}, set()),
    ],
)
def test_outcome(
    gate: dict[str, Any], figure: Measurement, outcome: str, changes: dict[str, Any], refused: set[str]
) -> None:
    made = judge({**gate, **changes}, {gate["metric"]: figure})
    assert made.outcome == outcome
    kept = figure.value <= gate["max"] if "max" in gate else figure.value >= gate["min"]
    beyond = outcome == "inconclusive" and not kept and "value beyond" in refused
    assert made.refuses is (outcome in refused or beyond)
    assert (made.advisory, made.limit) == ("advisory" in changes, gate.get("max", gate.get("min")))
    assert numbers(made) == pytest.approx((figure.value, figure.low, figure.high), nan_ok=True)


PERPLEXITY = {"metric": "perplexity", "of": "ratio", "to": "baseline", "max": 1.1}
ACCURACY = {"metric": "accuracy", "of": "difference", "to": "baseline", "min": -0.1}
SCORE = {"metric": "score", "of": "difference", "to": "baseline", "min": -0.1}


@pytest.mark.parametrize(
    ("gate", "own", "numbers_of_pairs"),
    [
        (PERPLEXITY, {"perplexity_ratio": measured(1.05, 1.04, 1.07)}, (1.05, 1.04, 1.07)),
        (ACCURACY, {"accuracy_drop": measured(0.03, -0.01, 0.08)}, (-0.03, -0.08, 0.01)),
        (SCORE, {"score_drop": measured(0.03, -0.01, 0.08)}, (-0.03, -0.08, 0.01)),
        (ACCURACY, {"accuracy_drop": measured(0.03)}, (-0.03, None, None)),
    ],
)
def test_pairs_go_before_independent_intervals(
    gate: dict[str, Any], own: Figures, numbers_of_pairs: tuple[float, ...]
) -> None:
    rough = {gate["metric"]: measured(10, 5, 20)}
    assert numbers(judge(gate, {**rough, **own}, rough)) == pytest.approx(numbers_of_pairs)
    # The champion was measured another day: nothing is paired with it.
    other = judge({**gate, "to": "champion"}, {**rough, **own}, rough, champion=rough)
    assert numbers(other) != pytest.approx(numbers_of_pairs)
    # Nor is the other kind of comparison.
    of, limit = ("difference", {"max": 1.1}) if gate["of"] == "ratio" else ("ratio", {"min": 0.9})
    swapped = {"metric": gate["metric"], "of": of, "to": "baseline", **limit}
    assert numbers(judge(swapped, {**rough, **own}, rough)) != pytest.approx(numbers_of_pairs)


DIFFERENCE = {"metric": "accuracy", "of": "difference", "min": -0.1}
RATIO = {"metric": "decode_tok_s", "of": "ratio", "min": 0.9}


@pytest.mark.parametrize("to", ["baseline", "champion"])
@pytest.mark.parametrize(
    ("gate", "own", "other", "expected", "outcome"),
    [
        # -0.05, down by hypot(0.03, 0.04) and up by hypot(0.12, 0.05): each side with the far side of the other.
        (DIFFERENCE, measured(0.5, 0.47, 0.62), measured(0.55, 0.5, 0.59), (-0.05, -0.1, 0.08), "pass"),
        (DIFFERENCE, measured(0.5, 0.4, 0.6), measured(0.55, 0.5, 0.6), (-0.05, -0.161803, 0.061803), "inconclusive"),
        (DIFFERENCE, exact(0.5), measured(0.7, 0.65, 0.72), (-0.2, -0.22, -0.15), "fail"),
        (DIFFERENCE, measured(0.5), exact(0.55), (-0.05, None, None), "inconclusive"),
        (DIFFERENCE, exact(0.5), measured(0.55), (-0.05, None, None), "inconclusive"),
        # Twice as fast, each known up to a factor of e^0.3 and e^0.4: e^0.5 together.
        (RATIO, measured(20, 14.81636, 26.99718), measured(10, 6.70320, 14.91825), (2, 1.213061, 3.297443), "pass"),
        (RATIO, measured(10, 9, 11), exact(10), (1, 0.9, 1.1), "pass"),
        (RATIO, measured(10), measured(10), (1, None, None), "inconclusive"),
        # No ratio can be made of these, so there is nothing to show.
        (RATIO, measured(10, -1, 20), exact(10), (None, None, None), "inconclusive"),
        (RATIO, exact(10), measured(10, 0, 20), (None, None, None), "inconclusive"),
        (RATIO, exact(10), exact(NAN), (None, None, None), "inconclusive"),
        (RATIO, exact(math.inf), exact(10), (math.inf, math.inf, math.inf), "fail"),
    ],
)
def test_independent_intervals(
    to: str, gate: dict[str, Any], own: Measurement, other: Measurement, expected: tuple[Any, ...], outcome: str
) -> None:
    beside = {gate["metric"]: other}
    made = judge({**gate, "to": to}, {gate["metric"]: own}, beside, champion=beside)
    assert numbers(made) == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert made.outcome == outcome


LOAD = {"metric": "load_s", "of": "ratio", "max": 2}


@pytest.mark.parametrize(
    ("gate", "own", "said"),
    [
        (AT_MOST, {"kl_mean": exact(0.05)}, "kl_mean 0.05: at most 0.1 is kept"),
        (AT_LEAST, {"top1_agreement": exact(0.85)}, "top1_agreement 0.85: at least 0.9 is broken"),
        (AT_MOST, {"kl_mean": measured(0.05)}, "kl_mean 0.05: too few samples"),
        (AT_MOST, {"kl_mean": measured(12345.6, 11000, 13000)}, "kl_mean 12,346 [11,000, 13,000]: at most"),
        (ACCURACY, {"accuracy": exact(0.3), "accuracy_drop": measured(0.2, 0.15, 0.25)}, "by -0.2 [-0.25, -0.15]: at"),
        ({**RATIO, "to": "champion"}, {"decode_tok_s": measured(10, 0, 20)}, "intervals above 0"),
        ({**LOAD, "to": "champion"}, {"load_s": exact(1)}, "load_s was not measured of the champion"),
        ({**LOAD, "to": "baseline"}, {"load_s": exact(1)}, "load_s of the baseline is nan"),
    ],
)
def test_detail_says_figure_and_limit(gate: dict[str, Any], own: Figures, said: str) -> None:
    baseline = {"accuracy": exact(0.5), "load_s": exact(NAN)}
    assert said in judge(gate, own, baseline, champion={"decode_tok_s": exact(10)}).detail


@pytest.mark.parametrize(
    ("more", "settle"),
    [(3999, "about 4,000 more"), (12_345, "about 13,000 more"), (7, "about 7 more"), (None, "no practical number of")],
)
def test_how_many_samples_would_settle_it(monkeypatch: pytest.MonkeyPatch, more: int | None, settle: str) -> None:
    asked: list[tuple[Measurement, float]] = []
    monkeypatch.setattr(statistics, "more_samples", lambda *about: asked.append(about) or more)
    figure = measured(1.105, 1.082, 1.129, samples=3072)
    made = judge(PERPLEXITY, {"perplexity": exact(11), "perplexity_ratio": figure}, {"perplexity": exact(10)})
    assert asked == [(figure, 1.1)]
    assert made.more_samples == more
    assert made.detail == (
        "perplexity 1.105 [1.082, 1.129] times the baseline's: at most 1.1 is neither kept nor broken; "
        f"{settle} samples would settle it"
    )


def test_samples_of_a_difference_are_those_of_the_uncertain_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "more_samples", lambda measurement, _: measurement.samples)
    forty, thirty = measured(0.5, 0.3, 0.7, 40), measured(0.5, 0.3, 0.7, 30)
    for own, other, samples in ((forty, thirty, 30), (forty, exact(0.5), 40), (exact(0.5), forty, 40)):
        made = judge({**DIFFERENCE, "to": "champion"}, {"accuracy": own}, champion={"accuracy": other})
        assert made.more_samples == samples


def test_what_was_not_measured_is_inconclusive_and_without_a_baseline_nothing_is_proven() -> None:
    for changes in ({}, {"inconclusive": "accept"}, {"advisory": True}):
        made = judge({"metric": "energy_j_per_token", "max": 1, **changes}, {"kl_mean": exact(0)})
        assert (made.outcome, made.value, made.refuses) == ("inconclusive", None, not changes)
    made = judge(ACCURACY, {"accuracy": exact(1), "accuracy_drop": exact(0)}, baseline=None)
    assert (made.outcome, made.refuses) == ("inconclusive", True)
    assert made.detail == "accuracy: there is no baseline to compare with"


def test_no_champion_yet_refuses_nothing() -> None:
    gate = {**DIFFERENCE, "to": "champion"}
    for own in ({"accuracy": exact(0)}, {}):
        made = judge(gate, own, {"accuracy": exact(1)})
        assert (made.outcome, made.refuses, made.value, made.detail) == ("skipped", False, None, "no champion yet")
    assert judge(gate, {"accuracy": exact(0)}, champion={"accuracy": exact(1)}).refuses


@pytest.mark.parametrize(
    ("gate", "own", "outcome", "value"),
    [
        pytest.param(PERPLEXITY, {"perplexity": measured(10, 8, 13)}, "pass", 1.0, id="ratio to itself"),
        pytest.param(ACCURACY, {"accuracy": measured(0.5, 0.3, 0.7)}, "pass", 0.0, id="difference from itself"),
        pytest.param({**PERPLEXITY, "max": 0.9}, {"perplexity": exact(10)}, "fail", 1.0, id="others must be better"),
        pytest.param(PERPLEXITY, {"perplexity": exact(NAN)}, "fail", NAN, id="broken itself"),
        pytest.param(PERPLEXITY, {}, "inconclusive", None, id="not measured"),
        pytest.param(AT_MOST, {}, "pass", 0.0, id="its distance from itself needs no measuring"),
        pytest.param(AT_LEAST, {}, "pass", 1.0, id="nor does its agreement"),
        pytest.param({"metric": "accuracy", "min": 0.9}, {"accuracy": exact(0.5)}, "fail", 0.5, id="an absolute gate"),
    ],
)
def test_baseline_beside_itself(gate: dict[str, Any], own: Figures, outcome: str, value: float | None) -> None:
    made = judge(gate, own, name="fp32")
    assert (made.outcome, made.value) == (outcome, value if value is None else pytest.approx(value, nan_ok=True))
