"""Is everything there that the job needs?"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from slmops.core.errors import PrerequisiteError
from slmops.core.settings import Settings
from slmops.local import doctor


@task(name="check environment", task_run_name="check environment", cache_policy=NO_CACHE)
def check_environment(settings: Settings, *, imports: bool = False) -> list[doctor.Check]:
    """All checks of ``slmops doctor``; importing each package only if ``imports``.

    Raises:
        PrerequisiteError: A check failed.
    """
    checks = doctor.check(settings, imports=imports)
    failed = [check for check in checks if check.status == "failure"]
    if failed:
        raise PrerequisiteError(
            "\n".join(f"{check.name}: {check.detail}" for check in failed),
            "; ".join(dict.fromkeys(check.fix for check in failed if check.fix)) or "See `slmops doctor`.",
        )
    return checks
