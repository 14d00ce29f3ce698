"""What Python programs and notebooks call; the command line does the same."""

import sys

from slmops.core.job import Job
from slmops.core.values import Comparison


def optimize(job: Job) -> Comparison:
    """Convert, register, measure and compare one checkpoint, as ``slmops run`` does; choose the variant to deploy.

    What it was given is checked first. Then the local Prefect and MLflow servers are started if they do not run, and
    are left running; ``slmops down`` stops them. Where things are comes from ``SLMOPS_*`` variables and ``.env``, and
    progress goes to the logger ``slmops``.

    Raises:
        UsageError: Something in the job cannot be used; all that is wrong is named at once.
        PrerequisiteError: Something this machine needs is missing.
        GateError: No variant passes the policy's gates; the error's ``comparison`` is what was measured.
        WorkError: A variant failed; the error's ``comparison`` has the others.
    """
    from slmops import preflight
    from slmops.core.settings import Settings
    from slmops.local.stack import session

    settings = Settings()
    job = preflight.check(job, settings)
    imported = "prefect" in sys.modules
    with session(settings):
        from flows.optimize import optimize as flow
        from flows.running import reread_environment

        if imported:
            reread_environment()
        return flow(job)
