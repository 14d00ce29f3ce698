"""Which runs Prefect's automations take up again."""

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent

from flows.automations import LOST_RUNS, STARTS

FLOW = {"prefect.resource.id": "prefect.flow.1", "prefect.resource.role": "flow", "prefect.resource.name": "retrain"}
DEPLOYMENT = {"prefect.resource.id": "prefect.deployment.1", "prefect.resource.role": "deployment"}


@pytest.mark.parametrize(
    ("count", "related", "taken_up"),
    [
        (1, [FLOW, DEPLOYMENT], True),
        (STARTS - 1, [FLOW, DEPLOYMENT], True),
        (STARTS, [FLOW, DEPLOYMENT], False),  # it crashes each time
        (0, [FLOW, DEPLOYMENT], False),  # its process could not even be started
        (1, [FLOW], False),  # no worker could go on with it
        (1, [{**FLOW, "prefect.resource.name": "promote"}, DEPLOYMENT], False),
    ],
)
def test_which_crashed_runs_go_on(count: int, related: list[dict[str, Any]], taken_up: bool) -> None:
    event = ReceivedEvent(
        id=uuid4(),
        occurred=datetime.now(UTC),
        event="prefect.flow-run.Crashed",
        resource={"prefect.resource.id": f"prefect.flow-run.{uuid4()}", "prefect.run-count": str(count)},
        related=related,
    )
    triggers = [EventTrigger.model_validate(one.trigger.model_dump()) for one in LOST_RUNS]
    assert [one.covers(event) and one.starts_after(event.event) for one in triggers] == [False, False, taken_up]


@pytest.mark.parametrize("name", ["Running", "heartbeat"])
def test_a_run_is_watched_from_its_first_moment(name: str) -> None:
    silent = EventTrigger.model_validate(LOST_RUNS[0].trigger.model_dump())
    assert silent.starts_after(f"prefect.flow-run.{name}")
    assert silent.expects("prefect.flow-run.heartbeat")
    assert not silent.expects("prefect.flow-run.Running")
