"""Which variant to take: the policy's gates, then its objective among the variants that no gate refuses.

A gate is a test of non-inferiority with a margin. It does not ask whether a variant differs from the baseline, because
every quantized variant does. It asks whether the whole 95 % interval of the difference stays within the limit. An
interval that straddles the limit proves neither, so a bad variant does not pass because there were few samples, unless
the gate accepts that.
"""

import math
from collections.abc import Mapping, Sequence

from slmops.core.job import BASELINE
from slmops.core.targets import split, target_of
from slmops.core.values import Choice, GateResult, Measurement, Outcome, VariantResult
from slmops.selection.policy import Gate, Policy

# Comparisons with the baseline that were measured pair by pair (the same tokens, the same questions); their intervals
# are far narrower than those of two independent figures. The sign is for a drop, which is baseline - variant.
PAIRED = {
    ("perplexity", "ratio"): ("perplexity_ratio", 1),
    ("accuracy", "difference"): ("accuracy_drop", -1),
    ("score", "difference"): ("score_drop", -1),
}
# The figures relative to the baseline, of the baseline itself, whether they were measured or not.
OF_ITSELF = {
    **dict.fromkeys(("size_ratio", "perplexity_ratio", "top1_agreement", "mcnemar_p"), 1.0),
    **dict.fromkeys(("kl_mean", "kl_median", "kl_p99", "kl_max", "accuracy_drop", "score_drop", "flips"), 0.0),
}
NO_BASELINE = f"No variant is chosen: there is no {BASELINE} baseline to judge the others against."
TOLERANCE = 1e-9  # relative: 0.8 - 0.7 is no more than 0.1


def choose(
    results: list[VariantResult],
    policy: Policy,
    champion: dict[str, Measurement] | None = None,
    baseline: VariantResult | None = None,
) -> tuple[Choice, list[VariantResult]]:
    """Judge the measured variants of a job, and take one.

    ``champion`` is what was measured of the variant in use, if there is one; ``baseline`` is given if it is not one of
    the variants. Returns the choice, and all results in the same order with ``gates`` and ``dominated_by`` filled in.
    """
    baseline = baseline or find_baseline(results)
    front = pareto(results)
    judged = [
        result.model_copy(
            update={"gates": apply(policy, result, baseline, champion), "dominated_by": front.get(result.name)}
        )
        if result.status == "ok"
        else result
        for result in results
    ]
    if baseline is None:
        return Choice(variant=None, reason=NO_BASELINE), judged
    refused: list[str] = []
    candidates = _in_order([result for result in judged if result.status == "ok"], policy)
    for candidate in candidates:
        against = [gate.detail for gate in candidate.gates if gate.refuses]
        if not against:
            because = _because(candidate, policy, alone=len(candidates) == 1)
            reason = f"{candidate.name} is taken, {because}: {_quality(candidate, baseline)}."
            return Choice(variant=candidate.name, reason=" ".join([reason, *refused])), judged
        refused.append(f"{candidate.name} is refused ({', and '.join(against)}).")
    return Choice(variant=None, reason=" ".join(["No variant is chosen: a gate refuses each.", *refused])), judged


def choose_variants(
    targets: Sequence[str],
    results: list[VariantResult],
    policy: Policy,
    champions: Mapping[str, dict[str, Measurement] | None],
    baseline: VariantResult | None = None,
) -> tuple[dict[str, Choice], list[VariantResult]]:
    """Take one variant for each target, by :func:`choose` among those that are made for it.

    ``champions`` has for each target what was measured of the version in use, as far as that compares.
    """
    baseline = baseline or find_baseline(results)
    choices, judged = {}, {result.name: result for result in results}
    for target in targets:
        made_for_it = [result for result in results if target_of(result.name) == target]
        choices[target], of_target = choose(made_for_it, policy, champions.get(target), baseline)
        judged |= {result.name: result for result in of_target}
    return choices, list(judged.values())


def find_baseline(results: Sequence[VariantResult]) -> VariantResult | None:
    """The variant that the others are judged against, if it was measured."""
    return next((result for result in results if result.status == "ok" and result.name == BASELINE), None)


def apply(
    policy: Policy, result: VariantResult, baseline: VariantResult | None, champion: dict[str, Measurement] | None
) -> tuple[GateResult, ...]:
    """Judge one variant by each gate of the policy, in the policy's order."""
    return tuple(_judge(gate, result, baseline, champion) for gate in policy.gates)


def pareto(results: list[VariantResult]) -> dict[str, str]:
    """The variants that are not worth having, each with a variant that is no worse in size, decoding speed, peak memory
    and quality, and better in one of them.

    Quality is ``kl_mean``, or ``perplexity`` if a variant lacks that. Values are compared, not intervals. A variant
    that lacks one of the figures, or whose figure was disturbed, takes no part.
    """
    measured = [result for result in results if result.status == "ok"]
    quality = "kl_mean" if all(math.isfinite(_cost(result, "kl_mean")) for result in measured) else "perplexity"
    metrics = ("size_mb", "decode_tok_s", "memory_peak_mb", quality)
    costs = {result.name: tuple(_cost(result, metric) for metric in metrics) for result in measured}
    costs = {name: cost for name, cost in costs.items() if all(map(math.isfinite, cost))}

    def dominates(one: str, other: str) -> bool:
        return costs[one] != costs[other] and all(a <= b for a, b in zip(costs[one], costs[other], strict=True))

    # "No worse" is transitive, so each dominated variant is dominated by one of these.
    best = [name for name in costs if not any(dominates(other, name) for other in costs)]
    return {name: next(one for one in best if dominates(one, name)) for name in costs if name not in best}


def _judge(
    gate: Gate, result: VariantResult, baseline: VariantResult | None, champion: dict[str, Measurement] | None
) -> GateResult:
    outcome: Outcome = "inconclusive"
    more = figure = None
    if gate.to == "champion" and champion is None:
        outcome, detail = "skipped", "no champion yet"
    elif result.not_run and gate.metric not in result.measurements and _needs_the_device(gate.metric):
        outcome, detail = "skipped", f"{gate.metric} was not measured, as {result.not_run}"
    elif isinstance(compared := _compare(gate, result, baseline, champion), str):
        detail = compared
    else:
        figure = compared
        outcome, more, detail = _verdict(gate, figure)
    doubtful = gate.inconclusive == "refuse" or (figure is not None and not _keeps(gate, figure.value))
    refuses = outcome == "fail" or (outcome == "inconclusive" and doubtful)
    return GateResult(
        gate=gate.text,
        metric=gate.metric,
        outcome=outcome,
        advisory=gate.advisory,
        refuses=refuses and not gate.advisory,
        value=figure and figure.value,
        low=figure and figure.low,
        high=figure and figure.high,
        disturbed=figure is not None and figure.disturbed,
        limit=gate.limit,
        more_samples=more,
        detail=detail,
    )


def _needs_the_device(metric: str) -> bool:
    from slmops.evaluation.summary import OF_MACHINE

    return metric.startswith((*OF_MACHINE, "edge_cases_"))


def _keeps(gate: Gate, value: float) -> bool:
    slack = TOLERANCE * max(1.0, abs(gate.limit))
    return value <= gate.limit + slack if gate.max is not None else value >= gate.limit - slack


def _verdict(gate: Gate, figure: Measurement) -> tuple[Outcome, int | None, str]:
    said = _said(gate, figure)
    if not math.isfinite(figure.value):
        return "fail", None, f"{said}, which is no usable figure"
    if figure.low is None or figure.high is None:
        return "inconclusive", None, f"{said}: too few samples for an interval"
    ends = [_keeps(gate, end) for end in (figure.low, figure.high)]
    if all(ends):
        return "pass", None, f"{said}: {gate.bound} is kept"
    if not any(ends):
        return "fail", None, f"{said}: {gate.bound} is broken"
    from slmops.evaluation import statistics

    more = statistics.more_samples(figure, gate.limit)
    settle = f"about {_rounded(more):,} more samples" if more else "no practical number of samples"
    return "inconclusive", more, f"{said}: {gate.bound} is neither kept nor broken; {settle} would settle it"


def _compare(
    gate: Gate, result: VariantResult, baseline: VariantResult | None, champion: dict[str, Measurement] | None
) -> Measurement | str:
    """What the gate's limit applies to; or why there is no such figure."""
    metric = gate.metric
    own = result.measurements.get(metric)
    if own is None and result.name == BASELINE and metric in OF_ITSELF:
        own = Measurement.exact(OF_ITSELF[metric], "1")
    if own is None:
        return f"{metric} was not measured"
    if gate.of == "value" or not math.isfinite(own.value):
        return own
    if gate.to == "champion":
        others = champion or {}
    elif baseline is None:
        return f"{metric}: there is no baseline to compare with"
    elif result.name == baseline.name:
        return Measurement.exact(1.0 if gate.of == "ratio" else 0.0, own.unit, own.samples)
    else:
        others = baseline.measurements
        paired, sign = PAIRED.get((metric, gate.of), ("", 1))
        if paired in result.measurements:
            return _negated(result.measurements[paired]) if sign < 0 else result.measurements[paired]
    other = others.get(metric)
    if other is None:
        return f"{metric} was not measured of the {gate.to}"
    if not math.isfinite(other.value):
        return f"{metric} of the {gate.to} is {other.value}: nothing to compare with"
    if gate.of == "difference":
        return _difference(own, other)
    if min(x for one in (own, other) for x in (one.value, one.low, one.high) if x is not None) <= 0:
        return f"{metric}: a ratio to the {gate.to}'s needs figures and intervals above 0"
    apart = _difference(own.mapped(math.log), other.mapped(math.log))
    return apart.mapped(math.exp).model_copy(update={"unit": "1"})


def _difference(one: Measurement, other: Measurement) -> Measurement:
    """``one`` - ``other`` if they are independent: the sides of the intervals add up as squares.

    MOVER, which keeps the asymmetry of both intervals: Zou and Donner, Construction of confidence limits about effect
    measures: a general approach, Statistics in Medicine 27 (2008), 1693-1702.
    """
    value = one.value - other.value
    samples = min((side.samples for side in (one, other) if side.low != side.high), default=one.samples)
    made = Measurement(value=value, unit=one.unit, samples=samples, disturbed=one.disturbed or other.disturbed)
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return made
    low = value - math.hypot(one.value - one.low, other.high - other.value)
    high = value + math.hypot(one.high - one.value, other.value - other.low)
    return made.model_copy(update={"low": low, "high": high})


def _negated(one: Measurement) -> Measurement:
    low, high = (None if end is None else 0.0 - end for end in (one.high, one.low))  # 0.0 -: there is a -0.0
    return one.model_copy(update={"value": 0.0 - one.value, "low": low, "high": high})


def _cost(result: VariantResult, metric: str) -> float:
    """A metric turned so that less is better; infinite where there is no figure, or one that was disturbed."""
    if metric in result.disturbed:
        return math.inf
    value = result.metrics.get(metric, OF_ITSELF.get(metric, math.nan) if result.name == BASELINE else math.nan)
    if metric == "decode_tok_s":
        value = -value
    return math.inf if math.isnan(value) else value


def _in_order(candidates: list[VariantResult], policy: Policy) -> list[VariantResult]:
    """The order in which the objective takes them. If two are equal, the smaller comes first, then the baseline."""

    def by(*metrics: str) -> list[VariantResult]:
        return sorted(candidates, key=lambda r: (*(_cost(r, metric) for metric in metrics), r.name != BASELINE))

    if policy.objective == "fastest":
        return by("decode_tok_s", "size_mb")
    if policy.objective == "best_quality":
        return sorted(by("kl_mean", "size_mb"), key=lambda r: r.name == BASELINE)
    by_size = by("size_mb")
    return by_size if policy.objective == "smallest" else _preferred(by_size, policy.preference)


def _preferred(by_size: list[VariantResult], preference: tuple[str, ...]) -> list[VariantResult]:
    """The variants that ``preference`` names in its order, in the places that they hold by size. The baseline, unless
    named, comes after them, and so do those that are not named and no smaller than it."""
    names = [result.name for result in by_size]
    smaller = names[: names.index(BASELINE)] if BASELINE in names else names
    recipe = {result.name: split(result.name)[0] for result in by_size}
    before = [result for result in by_size if recipe[result.name] in preference or result.name in smaller]
    preferred = [result for result in before if recipe[result.name] in preference]
    named = iter(sorted(preferred, key=lambda r: preference.index(recipe[r.name])))
    ordered = [next(named) if result in preferred else result for result in before]
    return ordered + [result for result in by_size if result not in before]


def _because(chosen: VariantResult, policy: Policy, *, alone: bool) -> str:
    if alone:
        return "as there is no other variant"
    if chosen.name == BASELINE and policy.objective in {"preference", "best_quality"}:
        return "the baseline itself"
    if policy.objective == "fastest" and math.isinf(_cost(chosen, "decode_tok_s")):
        return "the smallest that no gate refuses, as none that passes has a speed that was not disturbed"
    first = {
        "preference": "the first in order of preference",
        "smallest": "the smallest",
        "fastest": "the fastest",
        "best_quality": "the closest to the baseline",
    }[policy.objective]
    return f"{first} that no gate refuses"


def _quality(chosen: VariantResult, baseline: VariantResult) -> str:
    """What was measured of the quality of the chosen one."""
    own, others = chosen.measurements, baseline.measurements
    said = []
    if chosen.name == BASELINE:
        said = [f"{metric} {own[metric].text}" for metric in ("perplexity", "accuracy") if metric in own]
    else:
        if "perplexity_ratio" in own:
            said.append(f"perplexity {own['perplexity_ratio'].text} times the baseline's")
        if "accuracy" in own and "accuracy" in others:
            said.append(f"accuracy {own['accuracy'].text} against {others['accuracy'].text}")
        if "size_ratio" in own:
            said.append(f"{own['size_ratio'].text} of its size")
    return ", ".join(said) or "its quality was not measured"


def _said(gate: Gate, figure: Measurement) -> str:
    if gate.of == "difference":
        return f"{gate.metric} differs from the {gate.to}'s by {figure.text}"
    return f"{gate.metric} {figure.text}" + (f" times the {gate.to}'s" if gate.of == "ratio" else "")


def _rounded(count: int) -> int:
    """Up to two figures: it is an estimate."""
    step = int(10 ** max(len(str(count)) - 2, 0))
    return -(-count // step) * step
