"""Register the automation that marks lost flow runs as crashed with the Prefect server of PREFECT_API_URL.

    python deployments/automations.py

A flow run whose machine is gone says nothing any more, and Prefect would show it as running for ever. Runs that send
heartbeats (PREFECT_FLOWS_HEARTBEAT_FREQUENCY) are missed when these stop. Twice is harmless, and whether somebody has
switched the automation off on the Prefect page stays.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events import EventTrigger, Posture
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore

NAME = "slmops: crash flow runs that are lost"
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Suspended")
SILENCE = timedelta(seconds=90)
"""Three heartbeats: Prefect sends none more often than every 30 s."""


def automation(silence: timedelta = SILENCE) -> AutomationCore:
    """A heartbeat, and then for so long neither another nor an end of the run."""
    return AutomationCore(
        name=NAME,
        description="A flow run that sent heartbeats and then none is on a machine that is gone.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{end}" for end in ENDS)},
            posture=Posture.Proactive,
            threshold=1,
            within=silence,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"It sent no heartbeat for {silence.total_seconds():.0f} s."
            )
        ],
    )


async def register(wanted: AutomationCore) -> None:
    """Make the automation, or bring the one that there is up to date."""
    async with get_client() as client:
        known = await client.read_automations_by_name(NAME)
        if not known:
            await client.create_automation(wanted)
        for one in known:
            renewed = wanted.model_copy(update={"enabled": one.enabled})
            if one.model_dump(exclude={"id"}) != renewed.model_dump():
                await client.update_automation(one.id, renewed)


if __name__ == "__main__":
    asyncio.run(register(automation()))
