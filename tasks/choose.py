"""Apply the policy and take one."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from slmops.core.values import Choice, Measurement, VariantResult
from slmops.selection import choice as selection
from slmops.selection.policy import Policy


@task(name="choose", task_run_name="choose", cache_policy=NO_CACHE)
def choose_variant(
    results: list[VariantResult], policy: Policy, champion: dict[str, Measurement] | None
) -> tuple[Choice, list[VariantResult]]:
    """The choice with its reason, and the variants with their gates."""
    return selection.choose(results, policy, champion)
