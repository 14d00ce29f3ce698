"""Which variant to take: the tutorial's advice as a rule.

Start from the smallest (int4); if its quality is not satisfactory take the next (int8), then the next (fp16), at last
the fp32 baseline itself. Satisfactory is settable, and always relative to the baseline of the same job.
"""

from __future__ import annotations

from slmops.job import BASELINE, Job
from slmops.models import Choice, VariantResult


def choose(results: list[VariantResult], job: Job) -> Choice:
    """Choose among the measured variants, smallest first."""
    measured = {result.name: result for result in results if result.status == "ok"}
    baseline = measured.get(BASELINE)
    if baseline is None:
        return Choice(
            variant=None, reason="No variant is chosen: there is no fp32 baseline to judge the others against."
        )
    candidates = sorted((r for r in measured.values() if r.name != BASELINE), key=lambda r: r.metrics["size_mb"])
    refused: list[str] = []
    for candidate in candidates:
        wrong = shortfalls(candidate, baseline, job)
        if not wrong:
            because = f" ({'; '.join(refused)})" if refused else ""
            quality = _quality(candidate, baseline)
            reason = f"{candidate.name} is the smallest satisfactory variant: {quality}{because}."
            return Choice(variant=candidate.name, reason=reason)
        refused.append(f"{candidate.name} is not: {' and '.join(wrong)}")
    because = f"no other variant is satisfactory: {'; '.join(refused)}" if refused else "there is no other variant"
    return Choice(variant=BASELINE, reason=f"{BASELINE} is taken: {because}.")


def shortfalls(candidate: VariantResult, baseline: VariantResult, job: Job) -> list[str]:
    """Where ``candidate`` falls short of ``baseline`` by more than the job allows; empty means satisfactory."""
    wrong = []
    size, limit = candidate.metrics["size_mb"], baseline.metrics["size_mb"]
    if not size < limit:  # a variant of the user's own can be
        wrong.append(f"its {size:.1f} MB are no less than the baseline's {limit:.1f}")
    ratio = candidate.metrics["perplexity_ratio"]
    if not ratio <= job.max_perplexity_ratio:
        wrong.append(f"its perplexity is {ratio:.3f} times the baseline's, above {job.max_perplexity_ratio:g}")
    drop = baseline.metrics["accuracy"] - candidate.metrics["accuracy"]
    if not drop <= job.max_accuracy_drop + 1e-9:
        wrong.append(
            f"its accuracy is {candidate.metrics['accuracy']:.2f}, more than {job.max_accuracy_drop:g} below the "
            f"baseline's {baseline.metrics['accuracy']:.2f}"
        )
    return wrong


def _quality(candidate: VariantResult, baseline: VariantResult) -> str:
    return (
        f"perplexity {candidate.metrics['perplexity_ratio']:.3f} times the baseline's, accuracy "
        f"{candidate.metrics['accuracy']:.2f} against {baseline.metrics['accuracy']:.2f}, "
        f"{candidate.metrics['size_ratio']:.2f} of its size"
    )
