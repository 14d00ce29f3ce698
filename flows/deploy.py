"""A model's own deployments: they retrain it, look for news of it and measure it again.

They are made from its job file, on the work pool of the deployments that all models share.
"""

import hashlib
import json
from collections import defaultdict
from datetime import timedelta
from itertools import chain, count, takewhile
from typing import Any

from prefect import Flow, flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.types.entrypoint import EntrypointType
from pydantic import ValidationError

from flows import automations
from flows.news import look_for_news
from flows.remeasure import remeasure
from flows.retrain import retrain
from flows.running import named, plainly
from slmops.core.errors import PrerequisiteError, UsageError
from slmops.training.values import Deploy, News
from tasks.news import NEW_DATA, NEW_VERSION

FLOWS: tuple[Flow[..., Any], ...] = (retrain, look_for_news, remeasure)
PAGE = 200  # deployments that the server lists at once
KEPT = {"slug", "schedule", "active", "parameters", "max_scheduled_runs"}


@flow(name="deploy", flow_run_name=named("deploy {request.name}"), persist_result=False)
@plainly
def deploy(request: Deploy) -> list[str]:
    """Make the deployments of a model, or renew them.

    What was changed on the Prefect page (parameters, schedules, what is switched on) stays until something else is
    asked of the deployment than the last time.

    Returns:
        Their full names, such as retrain/retrain-support-bot.

    Raises:
        SlmopsError: A schedule or a block is not one, or the deployments that all models share are not there.
    """
    with get_client(sync_client=True) as client:
        asked = _deployments(request, _shared(client))
        names = [str(one.name) for one in asked]
        told = automations.notifications(client, request.name, names, request.notify) if request.notify else []
        for one in asked:
            before = _find(client, one.full_name)
            if before is not None:
                one.paused = before.paused
                if before.version == one.version:
                    _keep(client, before, one)
            one.apply()
        automations.put(client, told)
    return [one.full_name for one in asked]


def undeploy(name: str) -> list[str]:
    """Remove the deployments of a model, and what starts them; returns their full names."""
    gone = []
    with get_client(sync_client=True) as client:
        for full_name in (f"{one.name}/{one.name}-{name}" for one in FLOWS):
            if (found := _find(client, full_name)) is not None:
                client.delete_resource_owned_automations(f"prefect.deployment.{found.id}")
                client.delete_deployment(found.id)
                gone.append(full_name)
        automations.remove_notifications(client, name)
    if not gone:
        raise UsageError(f"{name} has no deployments.", "`slmops list` shows what there is.")
    return gone


def schedules() -> dict[str, list[str]]:
    """What the deployments of each model do by themselves, such as "retrain at 0 2 * * * (UTC)"."""
    found: dict[str, list[str]] = defaultdict(list)
    of_ours = DeploymentFilter(tags=DeploymentFilterTags(all_=["slmops"]))
    with get_client(sync_client=True) as client:
        pages = (
            client.read_deployments(deployment_filter=of_ours, limit=PAGE, offset=start) for start in count(0, PAGE)
        )
        for one in chain.from_iterable(takewhile(bool, pages)):
            kind = next((kind for kind in FLOWS if one.name.startswith(f"{kind.name}-")), None)
            if kind is not None:
                said = [_said(schedule, paused=one.paused) for schedule in one.schedules]
                found[one.name.removeprefix(f"{kind.name}-")] += [f"{kind.name} {when}" for when in said]
    return found


def _said(schedule: DeploymentSchedule, *, paused: bool) -> str:
    said = "by a rule"
    match schedule.schedule:
        case CronSchedule(cron=cron, timezone=timezone):
            said = f"at {cron} ({timezone})"
        case IntervalSchedule(interval=interval):
            said = f"every {interval.total_seconds() / 60:g} min"
    return said if schedule.active and not paused else f"{said}, switched off"


def _deployments(request: Deploy, shared: DeploymentResponse) -> list[RunnerDeployment]:
    """What a job file asks for."""
    name, when = request.name, request.schedule

    def made(one: Flow[..., Any], asked: dict[str, Any], tags: list[str], **more: Any) -> RunnerDeployment:
        return RunnerDeployment.from_flow(
            one,
            f"{one.name}-{name}",
            version=hashlib.sha256(json.dumps([asked, when.model_dump()]).encode()).hexdigest()[:16],
            parameters={"request": asked},
            tags=["slmops", *tags, name],
            work_pool_name=shared.work_pool_name,
            work_queue_name=shared.work_queue_name,
            job_variables=shared.job_variables,
            entrypoint_type=EntrypointType.MODULE_PATH,
            **more,
        )

    news = News(name=name, data=request.data, evaluation_set=request.evaluation_set)
    every = None if when.news_minutes is None else IntervalSchedule(interval=timedelta(minutes=when.news_minutes))
    new_data = DeploymentEventTrigger(
        name=f"retrain {name} on new data",
        enabled=every is not None,
        expect={NEW_DATA},
        match={"prefect.resource.id": f"slmops.data.{name}"},
    )
    new_version = DeploymentEventTrigger(
        name=f"measure a new version of {name} again",
        enabled=False,
        expect={NEW_VERSION},
        match={"prefect.resource.id": f"slmops.version.{name}.*"},
        parameters={"request": {"name": name, "version": "{{ event.payload.version }}"}},
    )
    at = [_cron(cron, when.timezone) for cron in (when.retrain, when.remeasure)]
    # Both limits are of one model: no other waits for it. A retraining compares with a record that all machines share,
    # and a look that starts while the last one is still going on finds nothing that the last one does not.
    no_second = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    looked_for = news.model_dump(mode="json", exclude_none=True)
    trains = ["trains", "measures", "deploys"]
    return [
        made(retrain, request.retraining, trains, schedule=at[0], triggers=[new_data], concurrency_limit=1),
        made(look_for_news, looked_for, [], schedule=every, concurrency_limit=no_second),
        made(remeasure, {"name": name}, ["measures"], schedule=at[1], triggers=[new_version]),
    ]


def _cron(cron: str | None, timezone: str) -> CronSchedule | None:
    try:
        return None if cron is None else CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        said = error.errors()[0]["ctx"]["error"]
        raise UsageError(f"{said}.", "Correct the schedule in the job file.") from None


def _keep(client: SyncPrefectClient, before: DeploymentResponse, now: RunnerDeployment) -> None:
    """Take over what was changed on the page."""
    now.parameters = before.parameters
    now.schedules = [DeploymentScheduleCreate(**one.model_dump(include=KEPT)) for one in before.schedules]
    owner = f"prefect.deployment.{before.id}"
    on = {one.name for one in client.read_resource_related_automations(owner) if one.enabled}
    triggers: list[Any] = now.triggers
    for trigger in triggers:
        trigger.enabled = trigger.name in on


def _shared(client: SyncPrefectClient) -> DeploymentResponse:
    """The deployment of retrainings of any model."""
    found = _find(client, f"{retrain.name}/{retrain.name}")
    if found is None:
        raise PrerequisiteError(
            "The deployments that all models share are not there, and with them the work pool.",
            "`slmops up --worker` registers them, or deployments/register.py.",
        )
    return found


def _find(client: SyncPrefectClient, full_name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(full_name)
    except ObjectNotFound:
        return None
