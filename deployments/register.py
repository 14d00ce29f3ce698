"""Register the work pools, deployments and automations with the Prefect server of PREFECT_API_URL.

    python deployments/register.py [FILE]

The deployments are those of a prefect.yaml; the automations deal with runs that were lost. What somebody has set on the
Prefect page stays: parameters, schedules, whether it is paused, and whether an automation is switched on.
`prefect deploy` by itself would reset all of that. If nothing of slmops has changed since the last time, nothing is
touched.
"""

import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import yaml
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleUpdate, DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.workers.process import ProcessWorker

from flows.automations import LOST_RUNS, put

ROOT = Path(__file__).parents[1]
KEPT = ("slug", "schedule", "active", "parameters", "max_scheduled_runs")


def version_of(file: Path) -> str:
    """A digest over the definitions and over the code that the forms are made of."""
    digest = hashlib.sha256(file.read_bytes())
    for path in sorted(path for folder in ("flows", "slmops") for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


async def registered(client: PrefectClient, names: list[str]) -> dict[str, DeploymentResponse]:
    """Those of our deployments that are there; one of the same name for another flow is somebody else's."""
    found = {}
    for name in names:
        with contextlib.suppress(ObjectNotFound):
            found[name] = await client.read_deployment_by_name(f"{name}/{name}")
    return found


async def restore(client: PrefectClient, before: DeploymentResponse, now: DeploymentResponse) -> None:
    """Give a deployment the parameters and schedules that it had."""
    known = {schedule.slug for schedule in before.schedules}
    schedules = [*before.schedules, *(schedule for schedule in now.schedules if schedule.slug not in known)]
    updates = [DeploymentScheduleUpdate(**{key: getattr(schedule, key) for key in KEPT}) for schedule in schedules]
    await client.update_deployment(
        now.id, DeploymentUpdate(parameters=before.parameters, schedules=updates, paused=before.paused)
    )


async def main(file: Path) -> int:
    """Register what is new or changed; returns the exit status."""
    defined = yaml.safe_load(file.read_text(encoding="utf-8"))["deployments"]
    names = [one["name"] for one in defined]
    version = version_of(file)
    async with get_client() as client:
        # `prefect work-pool create` would ask GitHub for a list of templates first.
        template = ProcessWorker.get_default_base_job_template()
        for pool in {one["work_pool"]["name"] for one in defined}:
            with contextlib.suppress(ObjectAlreadyExists):
                await client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=template))
        before = await registered(client, names)
        if len(before) == len(names) and all(one.version == version for one in before.values()):
            return 0
        deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        env = {**os.environ, "SLMOPS_DEPLOYMENTS": version}
        status = subprocess.run(deploy, cwd=file.parents[1], env=env, check=False).returncode
        now = await registered(client, names)
        for name in before.keys() & now.keys():
            await restore(client, before[name], now[name])
        with get_client(sync_client=True) as plain:
            put(plain, LOST_RUNS)
        return status if len(now) == len(names) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "deployments" / "prefect.yaml")))
