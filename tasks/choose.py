"""Take one."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from slmops.job import Job
from slmops.models import Choice, VariantResult
from slmops.selection import choose


@task(name="choose", task_run_name="choose", cache_policy=NO_CACHE)
def choose_variant(results: list[VariantResult], job: Job) -> Choice:
    """The choice and its reason."""
    return choose(results, job)
