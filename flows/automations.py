"""Prefect's automations: what becomes of runs that were lost, and who is told when something goes wrong with a model.

A flow run sends heartbeats. The server notices when they stop, or when a run crashes, and changes the run's state.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events import EventTrigger
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, Posture
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_UI_URL

from slmops.core.errors import UsageError
from slmops.delivery.trouble import FAILED_DEVICE, ROLLED_BACK

SILENT = timedelta(minutes=5)
"""As long as the lease of a concurrency slot. A server that is away for longer finds its runs silent."""
UNSTARTED = timedelta(minutes=15)  # a container may have to wait for its image
PAUSE = timedelta(seconds=30)
"""Before a crashed run begins again. On SQLite, a state may not be taken while the server still writes of the last."""
STARTS = 4
NOTIFIED = ("runs that failed", "roll-backs", "devices")

_ENDS = ["Completed", "Failed", "TimedOut", "Cancelled", "Crashed", "Suspended", "Paused", "AwaitingRetry", "Scheduled"]


def _if_missing(
    name: str,
    description: str,
    after: list[str],
    expect: list[str],
    within: timedelta,
    action: ChangeFlowRunState,
    counts: list[int] | None = None,
    **match: Any,
) -> AutomationCore:
    """Do something with a run of which nothing that is expected is heard for a while."""
    run: dict[str, str | list[str]] = {"prefect.resource.id": "prefect.flow-run.*"}
    if counts is not None:
        run["prefect.run-count"] = [str(count) for count in counts]
    trigger = EventTrigger(
        posture=Posture.Proactive,
        after={f"prefect.flow-run.{name}" for name in after},
        expect={f"prefect.flow-run.{name}" for name in expect},
        match=run,
        for_each={"prefect.resource.id"},
        threshold=1,
        within=within,
        **match,
    )
    return AutomationCore(name=name, description=description, trigger=trigger, actions=[action])


LOST_RUNS = (
    _if_missing(
        "slmops: silent runs crash",
        "Without it, a run whose machine is gone would be running for ever, and hold its concurrency slot.",
        ["Running", "heartbeat"],  # a machine that is lost within a second has sent no heartbeat yet
        # Not "Running": it comes after a first heartbeat, too, and would make up for all that are missing.
        ["heartbeat", *_ENDS],
        SILENT,
        ChangeFlowRunState(state=StateType.CRASHED, message="Its process gives no sign of life any more."),
    ),
    _if_missing(
        "slmops: unstarted runs wait again",
        "Without it, a run would wait for ever if its worker is gone before the run's process has begun.",
        ["Pending"],
        ["Running", *_ENDS],
        UNSTARTED,
        ChangeFlowRunState(state=StateType.SCHEDULED, name="Scheduled", message="Its process did not start."),
    ),
    _if_missing(
        "slmops: crashed retrainings go on",
        f"Their training goes on from its last step. A run is started {STARTS} times in all.",
        ["Crashed"],
        ["AwaitingRetry", "Scheduled", "Pending", "Running"],
        PAUSE,
        ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="It crashed, and begins again."),
        counts=list(range(1, STARTS)),
        # A run without a deployment has no worker that could go on with it.
        match_related=[
            {"prefect.resource.role": "flow", "prefect.resource.name": "retrain"},
            {"prefect.resource.role": "deployment"},
        ],
    ),
)


def notifications(client: SyncPrefectClient, name: str, deployments: list[str], block: str) -> list[AutomationCore]:
    """What sends messages about a model through a notification block, given as TYPE/NAME; a UsageError if it is none.

    Args:
        client: Of the server that has the block.
        name: The model.
        deployments: Names of its deployments, whose runs are told of if they fail.
        block: Such as slack-webhook/team.
    """
    kind, _, title = block.partition("/")
    try:
        found = client.read_block_document_by_name(title, kind)
    except ObjectNotFound:
        there = "The Prefect page 'Blocks' makes and lists them; give TYPE/NAME, such as slack-webhook/team."
        raise UsageError(f"Prefect has no block {block!r}.", there) from None
    if found.block_schema is None or "notify" not in found.block_schema.capabilities:
        raise UsageError(
            f"The block {block!r} sends no notifications.", "Give one for Slack, Teams, e-mail, a webhook."
        )
    runs, events = f"{PREFECT_UI_URL.value()}/runs/flow-run/", f"{PREFECT_UI_URL.value()}/events/event/"
    of_model = [{"prefect.resource.role": "deployment", "prefect.resource.name": deployments}]

    def told(what: str, subject: str, body: str, **trigger: Any) -> AutomationCore:
        message = SendNotification(block_document_id=found.id, subject=f"{name}: {subject}", body=body)
        on = EventTrigger(posture=Posture.Reactive, threshold=1, for_each={"prefect.resource.id"}, **trigger)
        return AutomationCore(name=_title(name, what), trigger=on, actions=[message])

    return [
        told(
            NOTIFIED[0],
            "{{ flow_run.name }}: {{ flow_run.state.name }}",
            "{{ flow_run.state.message }}\n\n" + runs + "{{ flow_run.id }}",
            expect={f"prefect.flow-run.{state}" for state in ("Failed", "TimedOut", "Crashed")},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=of_model,
        ),
        told(
            NOTIFIED[1],
            "rolled back",
            "{{ event.payload.reason }}\n\n{{ event.payload.links }}",
            expect={ROLLED_BACK},
            match={"prefect.resource.id": f"slmops.champion.{name}"},
        ),
        told(
            NOTIFIED[2],
            "{{ event.payload.device }} cannot get or serve a version",
            "{{ event.payload.reason }}\n\n" + events + "{{ event.occurred.date() }}/{{ event.id }}",
            expect={FAILED_DEVICE},
            match={"prefect.resource.id": f"slmops.device.{name}.*"},
            within=timedelta(hours=1),  # a device tries again and again
        ),
    ]


def remove_notifications(client: SyncPrefectClient, name: str) -> None:
    for one in (one for what in NOTIFIED for one in client.read_automations_by_name(_title(name, what))):
        client.delete_automation(one.id)


def _title(name: str, what: str) -> str:
    return f"tell of {name}: {what}"


def put(client: SyncPrefectClient, automations: Iterable[AutomationCore]) -> None:
    """Make automations, or renew those of the same names. One that somebody has switched off stays off."""
    for one in automations:
        there = client.read_automations_by_name(one.name)
        if there:
            client.update_automation(there[0].id, one.model_copy(update={"enabled": there[0].enabled}))
        else:
            client.create_automation(one)
