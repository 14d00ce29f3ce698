"""Pareto front and choice as tables: only what is good enough is taken, and the reason says why."""

import re
from typing import Any

import pytest

from slmops.core.values import Measurement, VariantResult
from slmops.selection import policy
from slmops.selection.choice import NO_BASELINE, apply, choose, pareto
from slmops.selection.policy import Gate, Policy
from tests.values import failed, result

DEFAULT = policy.load()
NAN = float("nan")
FP32 = result("fp32", 600)
FP16 = result("fp16", 300)
INT8 = result("int8", 180, 1.01, 0.48)
INT4 = result("int4", 110, 1.08, 0.45)
BAD_INT4 = result("int4", 110, 1.44, 0.45)
BAD_INT8 = result("int8", 180, 1.2, 0.5)
BROKEN = result("int4", 110, 50.0, 0.0)


def exact(value: float) -> Measurement:
    return Measurement.exact(value, "1")


def near(kl: float, top1: float) -> dict[str, Measurement | None]:
    """Distance to the checkpoint itself."""
    return {"hf_kl_mean": exact(kl), "hf_top1_agreement": exact(top1)}


FAR = result("fp32", 600, changes=near(0.3, 0.9))


def test_a_baseline_that_is_no_variant_is_judged_by_and_never_taken() -> None:
    own = result("checkpoint", 1200)
    found, judged = choose([INT8, BAD_INT4], DEFAULT, None, own)
    assert (found.variant, [one.name for one in judged]) == ("int8", ["int8", "int4"])
    assert "int4 is refused" in found.reason
    assert choose([BAD_INT8, BAD_INT4], DEFAULT, None, own)[0].variant is None


@pytest.mark.parametrize(
    ("figures", "dominated"),
    [
        pytest.param([], {}, id="nothing"),
        pytest.param([(1, 9, 1, 9), (2, 8, 2, 8)], {}, id="each better in something"),
        pytest.param([(1, 9, 1, 1), (1, 9, 1, 1)], {}, id="equal in all"),
        pytest.param([(1, 9, 1, 1), (2, 9, 1, 1)], {"b": "a"}, id="larger"),
        pytest.param([(1, 9, 1, 1), (1, 8, 1, 1)], {"b": "a"}, id="slower"),
        pytest.param([(1, 9, 1, 1), (1, 9, 2, 1)], {"b": "a"}, id="more memory"),
        pytest.param([(1, 9, 1, 1), (1, 9, 1, 2)], {"b": "a"}, id="worse"),
        pytest.param([(3, 7, 3, 3), (2, 8, 2, 2), (1, 9, 1, 1)], {"a": "c", "b": "c"}, id="by one of the front"),
        pytest.param([(1, 9, 1, 1), (1, 9, 1, 1), (2, 9, 1, 1)], {"c": "a"}, id="by the first of equals"),
        pytest.param([(1, 9, 1, 1), (2, 8, 2, None)], {"b": "a"}, id="perplexity without KL divergence"),
        pytest.param([(1, 9, 1, NAN), (2, 8, 2, 2)], {"b": "a"}, id="nor is NaN one"),
        pytest.param([(1, NAN, 1, 1), (2, 8, 2, 2), (3, 7, 3, 3)], {"c": "b"}, id="without speed it takes no part"),
    ],
)
def test_pareto(figures: list[tuple[float, float, float, float | None]], dominated: dict[str, str]) -> None:
    """Variants a, b, ... with size, speed, memory and KL divergence."""
    names = ("size_mb", "decode_tok_s", "memory_peak_mb", "kl_mean", "perplexity")
    found = [{metric: value for metric, value in zip(names, (*row, 10), strict=True) if value} for row in figures]
    results = [VariantResult(name=name, status="ok", metrics=of) for name, of in zip("abc", found, strict=False)]
    assert pareto(results) == dominated


def test_pareto_leaves_out_what_failed_and_knows_the_baseline() -> None:
    worse = result("mine", 700, 1.2, changes={"decode_tok_s": exact(1)})
    assert pareto([result("fp32", 600, changes={"kl_mean": None}), worse, failed("int4", "r")]) == {"mine": "fp32"}
    assert pareto([failed("int4", "r"), VariantResult(name="int8", status="skipped")]) == {}


@pytest.mark.parametrize(
    ("results", "chosen"),
    [
        pytest.param([FP32, FP16, INT8, INT4], "int4", id="int4 is good"),
        pytest.param([FP32, FP16, INT8, BAD_INT4], "int8", id="int4's perplexity is too high"),
        pytest.param([FP32, FP16, INT8, result("int4", 110, 1.05, 0.3)], "int8", id="int4's answers are too bad"),
        pytest.param([FP32, BAD_INT8, BAD_INT4], "fp32", id="none is good"),
        pytest.param([FP32, failed("int4", "r"), INT8], "int8", id="int4 failed"),
        pytest.param([INT8, INT4], None, id="no baseline"),
        pytest.param([FP32, BAD_INT4, INT8, result("mine", 150)], "mine", id="the user's own by its size"),
        pytest.param([FP32, result("mine", 600)], "fp32", id="the user's own is as large as the baseline"),
        pytest.param([FP32, result("int4", 110, 1.08, spread=0.03)], "fp32", id="perplexity must be proven"),
        pytest.param([FP32, result("int4", 110, 1.0, 0.5, spread=0.099)], "int4", id="and is, if the interval fits"),
        pytest.param([FP32, result("int4", 110, 1.0, 0.45, spread=0.09)], "int4", id="accuracy need not be"),
        pytest.param([FP32, result("int4", 110, 1.0, 0.35, spread=0.06)], "fp32", id="but its value must keep it"),
        pytest.param([FP32, INT4.model_copy(update={"measurements": {}})], "fp32", id="nothing measured, none proven"),
        pytest.param([FP32, result("int4", 110, changes={"edge_cases_passed": exact(0.9)})], "fp32", id="it crashed"),
        pytest.param([FP32, result("int4", 110, changes=near(0.05, 0.9))], "int4", id="near the checkpoint"),
        pytest.param([FP32, result("int4", 110, changes=near(0.3, 0.9))], "fp32", id="far from the checkpoint"),
        pytest.param([FP32, result("int4", 110, changes=near(0.05, 0.6))], "fp32", id="other tokens than its"),
        pytest.param([FAR, result("int4", 110, changes=near(0.3, 0.9))], None, id="the export and all of it are far"),
        pytest.param([FP32, result("int4", 110, changes={"decode_consistency": exact(0.1)})], "int4", id="advisory"),
    ],
)
def test_choice_by_the_packaged_policy(results: list[VariantResult], chosen: str | None) -> None:
    assert choose(results, DEFAULT)[0].variant == chosen


def speed(name: str, size_mb: float, tok_s: float, perplexity_ratio: float = 1.0) -> VariantResult:
    return result(name, size_mb, perplexity_ratio, changes={"decode_tok_s": exact(tok_s)})


def busy(name: str, tok_s: float, size_mb: float = 110) -> VariantResult:
    """One that was disturbed."""
    made = exact(tok_s).model_copy(update={"disturbed": True})
    return result(name, size_mb, changes={"decode_tok_s": made})


NAMED = (
    speed("fp32", 600, 20),
    speed("fp16", 300, 15, 1.001),
    speed("int8", 180, 50, 1.01),
    speed("int4", 110, 40, 1.08),
)
SIX = [*NAMED, speed("mine", 150, 30, 1.02), speed("huge", 700, 10, 1.0005)]


@pytest.mark.parametrize(
    ("policy_", "order"),
    [
        ({"preference": ["int4", "int8", "fp16"]}, "int4 mine int8 fp16 fp32 huge"),
        ({"preference": ["fp16", "int8"]}, "int4 mine fp16 int8 fp32 huge"),
        ({"preference": ["huge", "mine"]}, "int4 huge int8 fp16 mine fp32"),
        ({"preference": ["none", "int8"]}, "int4 mine int8 fp16 fp32 huge"),
        ({}, "int4 mine int8 fp16 fp32 huge"),
        ({"objective": "smallest"}, "int4 mine int8 fp16 fp32 huge"),
        ({"objective": "smallest", "preference": ["fp16"]}, "int4 mine int8 fp16 fp32 huge"),
        ({"objective": "fastest"}, "int8 int4 mine fp32 fp16 huge"),
        ({"objective": "best_quality"}, "huge fp16 int8 mine int4 fp32"),
    ],
)
@pytest.mark.parametrize("results", [SIX, SIX[::-1]])
def test_order_of_each_objective(policy_: dict[str, Any], order: str, results: list[VariantResult]) -> None:
    taken: list[str | None] = []
    for _ in results:  # one that is refused makes way for the next
        passed = [{"edge_cases_passed": exact(float(one.name not in taken))} for one in results]
        marked = [one.model_copy(update={"measurements": of}) for one, of in zip(results, passed, strict=True)]
        taken.append(choose(marked, Policy(gates=(Gate(metric="edge_cases_passed", min=1),), **policy_))[0].variant)
    assert taken == order.split()


@pytest.mark.parametrize(
    ("objective", "results", "chosen"),
    [
        ("fastest", [FP32, speed("int8", 180, 45.67)], "int8"),
        ("fastest", [speed("mine", 600, 45.67), FP32], "fp32"),
        ("fastest", [FP32, result("int8", 180, changes={"decode_tok_s": None})], "fp32"),
        ("fastest", [speed("fp32", 600, 20), speed("int8", 180, 50), busy("int4", 90)], "int8"),
        ("fastest", [busy("fp32", 20, 600), busy("int8", 50, 180), busy("int4", 40)], "int4"),  # the smallest
        ("best_quality", [FP32, result("fp16", 300), result("int8", 180)], "int8"),
        ("best_quality", [FP32, result("fp16", 300, 1.01), result("int8", 180, changes={"kl_mean": None})], "fp16"),
        ("smallest", [FP32, result("int8", 600)], "fp32"),
        ("smallest", [FP32, result("int8", 100, changes={"size_mb": None})], "fp32"),
    ],
)
def test_ties_and_what_is_missing(objective: Any, results: list[VariantResult], chosen: str) -> None:
    assert choose(results, Policy(objective=objective))[0].variant == chosen


def test_a_disturbed_speed_is_not_called_the_fastest_and_dominates_nothing() -> None:
    rough, steady = [speed("fp32", 600, 20), busy("int4", 90)], [speed("fp32", 600, 20), speed("int4", 110, 90)]
    assert (pareto(steady), pareto(rough)) == ({"fp32": "int4"}, {})
    said = choose([busy("fp32", 20, 600), busy("int4", 90)], Policy(objective="fastest"))[0]
    assert said.variant == "int4"
    assert "as none that passes has a speed that was not disturbed" in said.reason
    gate = Gate(metric="decode_tok_s", of="ratio", to="baseline", min=2)
    judged = choose(rough, Policy(gates=(gate,)))[1][1].gates[0]
    assert judged.disturbed
    assert "4.5*" in judged.detail


STRICT = DEFAULT.model_copy(update={"gates": (*DEFAULT.gates, Gate(metric="accuracy", min=0.6))})
FASTEST = DEFAULT.model_copy(update={"objective": "fastest"})
CLOSE = Policy(objective="best_quality", gates=(Gate(metric="kl_mean", max=0.1),))
QUICK = [FP32, speed("int8", 150, 50), speed("int4", 110, 60, 1.44)]
SURE = result("int4", 110, 1.02, 0.45, spread=0.01)
UNKNOWN = result("int8", 150, changes=dict.fromkeys(("perplexity_ratio", "accuracy", "size_ratio")))


@pytest.mark.parametrize(
    ("policy_", "results", "said"),
    [
        (DEFAULT, [FP32, INT8, INT4], "int4 preference 1.08 0.45 0.5 0.1833"),
        (Policy(objective="smallest"), [FP32, SURE], "int4 smallest 1.02 [1.01, 1.03] 0.45 [0.44, 0.46] 0.5 0.1833"),
        (FASTEST, QUICK, "int8 fastest 1 0.5 0.5 0.25 int4 refused perplexity 1.44 1.1"),
        (Policy(objective="best_quality"), [FP32, UNKNOWN], "int8 closest not measured"),
        (
            DEFAULT,
            [FP32, result("mine", 700), BROKEN],
            "fp32 baseline itself perplexity 10 accuracy 0.5 int4 refused perplexity 50 1.1 accuracy -0.5 0.1",
        ),
        (CLOSE, [FP32, BAD_INT4], "fp32 baseline itself 10 0.5 int4 refused kl_mean 0.22 0.1"),
        (DEFAULT, [FP32], "fp32 no other variant 10 0.5"),
        (
            STRICT,
            [FP32, BAD_INT4, failed("int8", "r")],
            "No variant int4 refused 1.44 1.1 0.45 0.6 fp32 refused 0.5 0.6",
        ),
        (DEFAULT, [failed("fp32", "r"), INT4], NO_BASELINE),
    ],
)
def test_reason_says_what_was_taken_and_why_with_the_numbers(
    policy_: Policy, results: list[VariantResult], said: str
) -> None:
    reason = choose(results, policy_)[0].reason
    assert re.search(r"(?!\w).*?".join(map(re.escape, said.split())), reason), reason  # in this order


def test_the_broken_is_refused_however_few_the_samples_and_whatever_the_objective() -> None:
    drop = {"accuracy_drop": Measurement(value=0.5, unit="1", samples=10, low=0.18, high=0.82)}
    broken = speed("int4", 50, 1000, 50).model_copy(update={"name": "broken"})
    broken = broken.model_copy(update={"measurements": {**broken.measurements, **drop, "accuracy": exact(0)}})
    for objective in ("preference", "smallest", "fastest", "best_quality"):
        made = DEFAULT.model_copy(update={"objective": objective, "preference": ("broken",)})
        choice, judged = choose([FP32, broken], made)
        assert choice.variant == "fp32"
        assert [gate.metric for gate in judged[1].gates if gate.refuses] == ["perplexity", "accuracy"]


def test_champion_holds_back_what_is_worse_than_it() -> None:
    made = Policy(gates=(Gate(metric="decode_tok_s", of="ratio", to="champion", min=0.95),))
    results = [FP32, speed("int4", 110, 60), speed("int8", 180, 100)]
    assert choose(results, made)[0].variant == "int4"
    choice, judged = choose(results, made, {"decode_tok_s": exact(90)})
    assert choice.variant == "int8"
    assert [gate.outcome for result_ in judged for gate in result_.gates] == ["fail", "fail", "pass"]
    assert "int4 is refused (decode_tok_s 0.6667 times the champion's: at least 0.95 is broken)." in choice.reason


def test_results_come_back_judged_and_in_order() -> None:
    broken, skipped = failed("int8", "r"), VariantResult(name="mine", status="skipped")
    given = [INT4, broken, FP32, skipped, result("fp16", 700, 1.5)]
    _, judged = choose(given, DEFAULT)
    assert [result_.name for result_ in judged] == ["int4", "int8", "fp32", "mine", "fp16"]
    assert (judged[1], judged[3]) == (broken, skipped)
    texts = [gate.text for gate in DEFAULT.gates]
    assert [[gate.gate for gate in one.gates] for one in judged] == [texts, [], texts, [], texts]
    assert [result_.dominated_by for result_ in judged] == [None, None, None, None, "int4"]
    assert judged[0].gates == apply(DEFAULT, INT4, FP32, None)
    assert [result_.gates for result_ in given] == [()] * 5  # what was given is left alone
    _, (alone,) = choose([INT4], DEFAULT)  # without a baseline they are still shown
    assert [gate.outcome for gate in alone.gates] == [*["inconclusive"] * 5, *["skipped"] * 2, "pass"]
