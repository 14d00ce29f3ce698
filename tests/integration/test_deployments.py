"""All deployments on a real Prefect server: registered twice, changed by a user, started by an event, lost."""

import asyncio
import contextlib
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from mlflow import MlflowClient
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Completed, Crashed, Failed, Pending, Running
from prefect.variables import Variable

from flows import automations
from flows.deploy import deploy, undeploy
from flows.news import look_for_news
from slmops.core.errors import UsageError
from slmops.core.settings import Settings
from slmops.delivery import trouble
from slmops.foundry.versions import Promoted
from slmops.local import stack
from slmops.local.stack import Stack
from slmops.processes import daemon
from slmops.tracking.training import TrainingTracker
from slmops.training.data import digest
from slmops.training.sources import Fetched
from slmops.training.values import Deploy, News, Schedule
from tasks.promote import tell_of_rollback
from tests import deployed, making, retraining, shown, values
from tests.answering import answering

pytestmark = pytest.mark.integration

SEEN = "slmops_seen_ticket_45_router"


PASSING = ["Pending", "Running", "Crashed"]
PROCESS = """
import sys, time
from uuid import UUID
from prefect import flow, flow_engine
from prefect.client.orchestration import get_client

flow_engine.MINIMUM_HEARTBEAT_INTERVAL = 3
flow_engine.BaseFlowRunEngine.heartbeat_seconds = 3  # Prefect's settings allow no less than 30

@flow(name="retrain")
def at_work():
    print("at work", flush=True)
    time.sleep(600)

with get_client(sync_client=True) as client:
    found = client.read_flow_run(UUID(sys.argv[1]))
flow_engine.run_flow(at_work, flow_run=found)
"""
"""What a worker starts for a run of a retraining, as far as Prefect sees it."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, databases: Path) -> Settings:
    home = tmp_path_factory.mktemp("deployments")
    making.put_databases(home, databases)
    return Settings(home=home, prefect_port=4800, mlflow_port=5800)


@pytest.fixture(scope="module")
def servers(settings: Settings) -> Iterator[Stack]:
    """The local servers, which are also those of this process."""
    running = stack.up(settings)
    prefect = {PREFECT_API_URL: running.prefect_api_url, PREFECT_HOME: settings.home / "prefect"}
    with pytest.MonkeyPatch.context() as patch, temporary_settings(prefect):
        patch.setenv("SLMOPS_HOME", str(settings.home))
        patch.setenv("SLMOPS_TRACKING_URI", running.tracking_uri)
        for name, value in {**stack.QUIET, "PREFECT_API_URL": running.prefect_api_url}.items():
            patch.setenv(name, value)
        yield running
    stack.down(settings)


@pytest.fixture(scope="module")
def api(servers: Stack) -> Iterator[httpx.Client]:
    register()
    with shown.api(servers.prefect_api_url) as client:
        yield client


def register() -> None:
    """As the script does, but in this process, which has imported Prefect."""
    main = runpy.run_path(str(stack.REGISTER))["main"]
    assert asyncio.run(main(stack.ROOT / stack.DEPLOYMENTS)) == 0


def deployments(api: httpx.Client) -> dict[str, Any]:
    """By name, in this order."""
    tagged = {"deployments": {"tags": {"all_": ["slmops"]}}, "sort": "NAME_ASC"}
    return {one["name"]: one for one in api.post("deployments/filter", json=tagged).json()}


def test_all_are_there_and_name_modules(api: httpx.Client) -> None:
    found = deployments(api)
    assert " ".join(found) == "deploy optimize prepare-environment promote remeasure retrain rollback soak sweep"
    for one in found.values():
        assert (one["path"], one["pull_steps"], one["work_pool_name"]) == (None, [], "slmops")
        assert one["enforce_parameter_schema"]
        assert (one["parameters"], one["schedules"]) == ({}, [])  # for any model, and nothing by itself
        assert one["global_concurrency_limit"] is None  # which would be one of all models together


def test_what_a_user_has_set_and_what_is_somebody_elses_stays_and_unchanged_ones_are_not_touched(
    api: httpx.Client,
) -> None:
    before = deployments(api)["retrain"]
    mine = {"request": {"model": "/my/model", "data": "/my/data"}}
    weekly = {"active": True, "schedule": {"cron": "0 2 * * 6", "timezone": "Asia/Tokyo"}}
    [silent] = [one for one in triggers(api) if one["name"] == automations.LOST_RUNS[0].name]
    assert api.patch(f"automations/{silent['id']}", json={"enabled": False}).status_code == 204
    path, soak = f"deployments/{before['id']}", f"deployments/{deployments(api)['soak']['id']}"
    assert api.patch(path, json={"parameters": mine}).status_code == 204
    assert api.post(f"{path}/schedules", json=[weekly]).status_code == 201
    assert api.patch(soak, json={"concurrency_limit": 1}).status_code == 204  # as an older version had it
    # Somebody else's deployment has the name of ours.
    flow = {"name": "retrain", "flow_id": api.post("flows/", json={"name": "theirs"}).json()["id"]}
    theirs = api.post("deployments/", json={**flow, "version": "1", "parameters": {"request": "theirs"}}).json()
    for one in deployments(api).values():  # as if slmops had changed since: all are registered anew
        assert api.patch(f"deployments/{one['id']}", json={"version": "older"}).status_code == 204
    register()
    registered = deployments(api)
    after = registered["retrain"]
    assert after["version"] != "older"
    assert after["parameters"] == mine
    assert [(one["schedule"]["cron"], one["active"]) for one in after["schedules"]] == [("0 2 * * 6", True)]
    assert not [name for name, one in registered.items() if one["global_concurrency_limit"]]
    ours = {one.name: one.name != silent["name"] for one in automations.LOST_RUNS}
    assert sorted((one["name"], one["enabled"]) for one in triggers(api)) == sorted(ours.items())  # none is there twice
    assert api.patch(f"automations/{silent['id']}", json={"enabled": True}).status_code == 204
    path = f"deployments/{theirs['id']}"
    assert api.get(path).json()["updated"] == theirs["updated"]
    register()  # with theirs there, too, nothing has changed
    assert [one["updated"] for one in deployments(api).values()] == [one["updated"] for one in registered.values()]
    assert api.delete(path).status_code == 204


def asked(**schedule: Any) -> Deploy:
    when = Schedule(retrain="0 2 * * *", news_minutes=5, timezone="Europe/Berlin")
    return Deploy(model="/base", data="/tickets", name="Support_bot", schedule=when.model_copy(update=schedule))


def of_model(api: httpx.Client) -> dict[str, Any]:
    return {name: one for name, one in deployments(api).items() if "Support_bot" in one["tags"]}


def test_a_model_has_deployments_of_its_own_and_what_a_user_has_set_stays(api: httpx.Client) -> None:
    others = {name: one["updated"] for name, one in deployments(api).items()}
    names = ["look-for-news-Support_bot", "remeasure-Support_bot", "retrain-Support_bot"]
    made = deploy(asked())
    assert sorted(made) == [f"{name.removesuffix('-Support_bot')}/{name}" for name in names]
    found = of_model(api)
    assert list(found) == names
    look, remeasured, retrained = found.values()
    news = {"name": "Support_bot", "data": "/tickets"}
    assert [one["parameters"]["request"] for one in (look, remeasured)] == [news, {"name": "Support_bot"}]
    assert retrained["parameters"]["request"] == {"model": "/base", **news}
    assert [one["entrypoint"] for one in (look, retrained)] == ["flows.news.look_for_news", "flows.retrain.retrain"]
    assert {one["work_pool_name"] for one in found.values()} == {"slmops"}
    assert [one["schedule"]["interval"] for one in look["schedules"]] == [300]
    [nightly] = retrained["schedules"]
    assert (nightly["schedule"]["cron"], nightly["schedule"]["timezone"]) == ("0 2 * * *", "Europe/Berlin")
    assert nightly["active"]
    # A limit of its own: no other model's run takes its place.
    limits = [one["global_concurrency_limit"]["name"] for one in (look, retrained)]
    assert limits == [f"deployment:{one['id']}" for one in (look, retrained)]
    on = {one["name"]: one["enabled"] for one in triggers(api) if "Support_bot" in one["name"]}
    assert on == {"retrain Support_bot on new data": True, "measure a new version of Support_bot again": False}

    path = f"deployments/{retrained['id']}"
    mine = {"request": {**retrained["parameters"]["request"], "quick": True}}
    [trigger] = [one for one in triggers(api) if one["name"] == "retrain Support_bot on new data"]
    assert api.patch(path, json={"parameters": mine, "paused": True}).status_code == 204
    assert api.patch(f"{path}/schedules/{nightly['id']}", json={"active": False}).status_code == 204
    assert api.patch(f"automations/{trigger['id']}", json={"enabled": False}).status_code == 204
    deploy(asked())
    after = of_model(api)["retrain-Support_bot"]
    assert (after["id"], after["parameters"], after["paused"]) == (retrained["id"], mine, True)
    assert [(one["schedule"]["cron"], one["active"]) for one in after["schedules"]] == [("0 2 * * *", False)]
    assert not [one for one in triggers(api) if "Support_bot" in one["name"] and one["enabled"]]

    deploy(asked(retrain="0 3 * * *"))  # something else than the last time
    after = of_model(api)["retrain-Support_bot"]
    assert [(one["schedule"]["cron"], one["active"]) for one in after["schedules"]] == [("0 3 * * *", True)]
    assert after["parameters"] == retrained["parameters"]
    for wrong in ({"retrain": "0 2 * *"}, {"timezone": "Mars"}):
        with pytest.raises(UsageError, match="Invalid"):
            deploy(asked(**wrong))

    assert sorted(undeploy("Support_bot")) == sorted(made)
    assert not [one for one in triggers(api) if "Support_bot" in one["name"]]
    assert {name: one["updated"] for name, one in deployments(api).items()} == others
    with pytest.raises(UsageError, match="Support_bot has no deployments"):
        undeploy("Support_bot")


def test_new_data_start_a_retraining(api: httpx.Client, servers: Stack, tmp_path: Path) -> None:
    data = retraining.write_data(tmp_path / "data")
    request = retraining.request(Path("x"), data, "ticket-router")
    deploy(Deploy(**request.model_dump(exclude_unset=True), schedule=Schedule(news_minutes=5)))
    news, told = News(name="ticket-router", data=str(data)), ["slmops.data.ticket-router"]
    assert look_for_news(news) == []  # at the first look nothing is new
    assert look_for_news(news) == []
    retraining.write_data(tmp_path / "data", answer="yes")
    assert look_for_news(news) == told
    of_it = {"deployments": {"id": {"any_": [deployments(api)["retrain-ticket-router"]["id"]]}}}
    runs = partial(api.post, "flow_runs/filter", json=of_it)
    [run] = making.until(lambda: [run for run in runs().json() if not run["auto_scheduled"]], "the event starts one")
    assert run["parameters"] == {"request": request.model_dump(mode="json", exclude_unset=True)}
    # It is not told every five minutes, but again and again until a retraining has used them.
    assert look_for_news(news) == []
    half_an_hour_later()
    assert look_for_news(news) == told
    half_an_hour_later()
    # A retraining on these data leaves this in MLflow.
    tracker = TrainingTracker(servers.tracking_uri)
    begun = tracker.start("ticket-router", request, values.checkpoint(), "input", "flow")
    items = Fetched(source="x", files=(data / "train.jsonl",), evaluation=data / "evaluation.jsonl")
    MlflowClient(servers.tracking_uri).set_tag(begun.run_id, "slmops.data_digest", digest(items))
    tracker.finish(begun)
    assert look_for_news(news) == []


def test_a_killed_run_crashes_and_leaves_its_slot_which_it_has_also_after_a_restart_of_the_server(
    api: httpx.Client, settings: Settings
) -> None:
    first, second = (of_a_retraining(api) for _ in range(2))
    assert propose(first, Pending()) == "Pending"
    with subprocess.Popen([sys.executable, "-c", PROCESS, str(first)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"at work\n"
            lease = deployed.state(first).state_details.deployment_concurrency_lease_id
            assert lease is not None
            daemon.stop(stack._read(settings)["prefect"])
            # As if it was killed at the wrong moment, and its number given to another process.
            (settings.home / "prefect/concurrency_leases/expirations.lock").write_text(str(os.getpid()))
            assert stack.up(settings).started == ("prefect",)
            with get_client(sync_client=True) as client:
                client.renew_concurrency_lease(lease, 300)  # as the run does, which ends if the server does not know it
            assert propose(second, Pending()) == "AwaitingConcurrencySlot"
            renew(*quick())
            time.sleep(5)  # a heartbeat arrives
        finally:
            process.kill()
    assert making.until(lambda: "Crashed" in states(first), "it crashes")
    assert propose(second, Pending()) == "Pending"
    assert propose(second, Completed()) == "Completed"


def test_a_crashed_retraining_is_taken_up_again(api: httpx.Client) -> None:
    renew(*quick())
    for _ in range(3):  # the server takes over a renewed automation when it gets to it, and misses what is before
        run = of_a_retraining(api)
        assert [propose(run, Pending()), propose(run, Running()), propose(run, Crashed())] == PASSING
        with contextlib.suppress(AssertionError):
            making.until(lambda run=run: deployed.state(run).name == "AwaitingRetry", "it is taken up again", 30)
            return
    raise AssertionError("No crashed retraining was taken up again.")


def test_people_are_told_of_what_goes_wrong_with_a_model(api: httpx.Client, servers: Stack) -> None:
    messages: dict[str, str] = {}

    def respond(_: object, body: dict[str, str]) -> tuple[int, str]:
        messages[body["subject"]] = body["text"]
        return 200, ""

    template = {"subject": "{{subject}}", "text": "{{body}}"}
    told = asked().model_copy(update={"notify": "custom-webhook/team"})
    with pytest.raises(UsageError, match="Prefect has no block 'custom-webhook/team'"):
        deploy(told)
    with answering(respond) as address:
        CustomWebhookNotificationBlock(name="team", url=address, json_data=template).save("team")
        assert deploy(told) == deploy(told)
        ours = [one["name"] for one in triggers(api) if one["name"].startswith("tell of Support_bot")]
        assert len(ours) == len(automations.NOTIFIED)  # none is there twice
        deployment = of_model(api)["remeasure-Support_bot"]["id"]
        failed = api.post(f"deployments/{deployment}/create_flow_run", json={"name": "remeasure"}).json()["id"]
        propose(UUID(failed), Failed(message="It is slower."))
        trouble.tell("Support_bot", "The disk is full.", Settings(prefect_api_url=servers.prefect_api_url))
        back = Promoted(model="Support_bot", version=1, variant="int8", replaced=2, changed=True, url="http://version")
        tell_of_rollback(back)
        making.until(lambda: len(messages) == len(ours), "all messages arrive")
    device = f"Support_bot: {socket.gethostname()} cannot get or serve a version"
    said, link = messages.pop(device).split("\n\n")
    assert said == "The disk is full."
    assert link.startswith(f"{servers.prefect_url}/events/event/")
    assert messages == {
        "Support_bot: remeasure: Failed": f"It is slower.\n\n{servers.prefect_url}/runs/flow-run/{failed}",
        "Support_bot: rolled back": f"{back.text}\n\nhttp://version",
    }
    undeploy("Support_bot")
    assert not [one for one in triggers(api) if "Support_bot" in one["name"]]


def of_a_retraining(api: httpx.Client) -> UUID:
    """A run that waits for a worker, of a deployment of the test's own with one slot."""
    asked = {"name": "one at a time", "flow_id": deployments(api)["retrain"]["flow_id"], "concurrency_limit": 1}
    deployment = api.post("deployments/", json=asked).json()["id"]
    with get_client(sync_client=True) as client:
        return client.create_flow_run_from_deployment(UUID(deployment)).id


def propose(run: UUID, state: State[Any]) -> str | None:
    """What a worker proposes as the state of a run; returns the name of the state that the server gives it."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, state)
    return deployed.state(run).name


def states(run: UUID) -> list[str | None]:
    with get_client(sync_client=True) as client:
        return [state.name for state in client.read_flow_run_states(run)]


def quick() -> list[AutomationCore]:
    """Ours, with the shortest waits that Prefect takes."""
    ours = [one.model_copy(deep=True) for one in automations.LOST_RUNS]
    for one in ours:
        one.trigger.within = timedelta(seconds=10)  # type: ignore[union-attr]
    return ours


def renew(*ours: AutomationCore) -> None:
    with get_client(sync_client=True) as client:
        automations.put(client, ours)


def triggers(api: httpx.Client) -> list[dict[str, Any]]:
    return list(api.post("automations/filter", json={}).json())


def half_an_hour_later() -> None:
    Variable.set(SEEN, {**Variable.get(SEEN), "again": 0}, overwrite=True)
