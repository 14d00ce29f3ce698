"""A person's decision: the flow run is suspended, without a process or a lock, until somebody answers its form."""

from prefect import runtime, suspend_flow_run
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound
from prefect.input import RunInput
from prefect.utilities.urls import url_for
from pydantic import BaseModel

from slmops.core.errors import GateError, PrerequisiteError
from slmops.delivery import promotion
from slmops.delivery.promotion import Decision
from slmops.foundry.versions import Promotion


class Approval(RunInput):
    """The form on the Prefect page."""

    promote: bool = True
    comment: str = ""


def check_can_wait(*, approval: bool) -> None:
    """A PrerequisiteError if a run that is to wait is not one of a deployment: nobody could go on with it."""
    if approval and runtime.deployment.id is None:
        raise PrerequisiteError(
            "Only a run of a deployment can wait for approval: a worker goes on with it when somebody has decided.",
            "Start `slmops up --worker`, then use the command with --approval, or the Run button on the Prefect page.",
        )


def ask_person(decision: Decision, request: Promotion) -> str:
    """Have a person decide on the Prefect page; returns the comment.

    The first call suspends the flow run, which ends its process. When somebody has answered, a worker runs the flow
    from its beginning, and this call returns; if the answer is no, that is a GateError. If nobody answers in time,
    Prefect fails the flow run.
    """
    form = Approval.with_initial_data(
        description=promotion.text(decision, request), promote=not decision.against, comment=""
    )
    answer = suspend_flow_run(wait_for_input=form, timeout=request.approval_timeout_s, key="approval")
    comment = answer.comment or "no comment"
    if not answer.promote:
        raise GateError(f"{decision.challenger.label} was turned down on the Prefect page: {comment}")
    return comment


def hand_over(flow: str, request: BaseModel) -> str:
    """Start a run of our deployment of a flow, and return its page; a PrerequisiteError if no worker could do it."""
    said = f"No worker runs that could {flow} after an approval."
    missing = PrerequisiteError(said, "`slmops up --worker` starts one.")
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"{flow}/{flow}")
        except ObjectNotFound:
            raise missing from None
        pool = deployment.work_pool_name
        workers = client.read_workers_for_work_pool(pool) if pool else []
        if not any(worker.status == WorkerStatus.ONLINE for worker in workers):
            raise missing
        parameters = {"request": request.model_dump(mode="json", exclude_unset=True)}
        run = client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
    return url_for(run) or str(run.id)
