"""Apply the policy and take one."""

from __future__ import annotations

from slmops.core.values import Choice, Measurement, VariantResult
from slmops.selection import choice as selection
from slmops.selection.policy import Policy
from tasks.stage import stage


@stage()
def choose_variant(
    results: list[VariantResult], policy: Policy, champion: dict[str, Measurement] | None
) -> tuple[Choice, list[VariantResult]]:
    """The choice with its reason, and the variants with their gates."""
    return selection.choose(results, policy, champion)
