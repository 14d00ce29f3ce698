"""Promotion and its way back: which version of a model is deployed; and a person's decision about it.

A flow run that waits for a decision is suspended, without a process or a lock, until somebody answers its form.
"""

import logging
from contextlib import AbstractContextManager

from prefect import flow, runtime, suspend_flow_run
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound
from prefect.input import RunInput
from prefect.utilities.urls import url_for
from pydantic import BaseModel

from flows.running import named, plainly
from slmops.core import locks, machine
from slmops.core.errors import GateError, PrerequisiteError
from slmops.core.names import Name
from slmops.core.settings import Settings
from slmops.delivery import promotion
from slmops.delivery.promotion import Decision
from slmops.foundry.versions import RELEASE, Promoted, Promotion
from slmops.local import stack
from slmops.tracking.registry import Registry
from tasks.promote import check_files, find_previous, judge_challenger, move_aliases, show_decision, upload_files

log = logging.getLogger("slmops.promote")


@flow(name="promote", flow_run_name=named("promote {request.name}"), persist_result=False)
@plainly
def promote(request: Promotion) -> Promoted:
    """Make a version the champion, if it is not worse than the present one.

    Raises:
        GateError: It is worse than the champion beyond the policy's margin, or somebody said no.
        SlmopsError: There is no such version, or its files are gone or altered.
    """
    settings = Settings()
    return make_champion(request, settings, stack.tracking_uri(settings))


@flow(name="rollback", flow_run_name=named("roll back {name}"), persist_result=False)
@plainly
def rollback(name: Name) -> Promoted:
    """Make the previous champion the champion again; a second rollback takes it back.

    Args:
        name: The model's name in the registry.

    Raises:
        SlmopsError: There is nothing to go back to, or its files are gone or altered.
    """
    settings = Settings()
    uri = stack.tracking_uri(settings)
    with _alone(name, settings):
        champion, previous = find_previous(uri, name)
        for version in Registry(uri).release(previous):
            check_files(version, settings, uri)
        tags = {**_promoter(), "slmops.forced": "", "slmops.promoted_because": f"rolled back from {champion.label}"}
        rolled_back = move_aliases(uri, previous, champion, tags, None, settings)
        log.info("%s is the champion of %s again", previous.label, name)
        return rolled_back


def make_champion(request: Promotion, settings: Settings, uri: str) -> Promoted:
    """What ``promote`` does, and ``retrain`` at its end.

    A run that waits for approval is suspended in the middle and begins again when somebody has decided: everything
    before that is quick the second time, and the gates are judged against the champion of that moment.
    """
    check_can_wait(approval=request.approval)
    with _alone(request.name, settings):
        decision = judge_challenger(uri, request)
        challenger, champion = decision.challenger, decision.champion
        show_decision(decision, request)
        others = [one.challenger for one in decision.others]
        release = " ".join(str(one.version) for one in others)
        if champion is not None and champion.version == challenger.version and champion.others == release.split():
            log.info("%s is the champion already", challenger.label)
            return move_aliases(uri, challenger, champion, {}, decision, settings)
        refused = promotion.refuse(decision)
        if refused is not None and request.force is None:
            raise refused
        checked = check_files(challenger, settings, uri)
        # Before a person decides, because after that another machine may go on.
        challenger = upload_files(Registry(uri), challenger, checked.folder)
        for other in others:
            upload_files(Registry(uri), other, check_files(other, settings, uri).folder)
        tags = {**_promoter(), "slmops.forced": "", "slmops.approved": ""}
        if others or challenger.others:
            tags[RELEASE] = release
        if request.approval:
            tags["slmops.approved"] = ask_person(decision, request)
        if refused is not None and request.force is not None:
            log.warning("forced against: %s", refused.message)
            tags["slmops.forced"] = f"{request.force} (against: {'; '.join(decision.against)})"[:4000]
        tags["slmops.promoted_because"] = _reason(decision, tags)
        promoted = move_aliases(uri, challenger, champion, tags, decision, settings)
        log.info("%s is the champion of %s", challenger.label, request.name)
        return promoted


def _promoter() -> dict[str, str]:
    """The run that promotes, and who or what started it."""
    who = runtime.deployment.name or machine.person()
    run = runtime.flow_run
    return {"slmops.promoted_by": run.ui_url or "", "slmops.promoter": f"{run.flow_name}, started by {who}"}


def _reason(decision: Decision, tags: dict[str, str]) -> str:
    against = f", against {decision.champion.label}" if decision.champion else ""
    why = [f"{decision.challenger.tags.get('slmops.gates', 'no')} gates{against}"]
    why += [f"{key}: {said}" for key in ("approved", "forced") if (said := tags[f"slmops.{key}"])]
    return "; ".join(why)[:4000]


def _alone(name: str, settings: Settings) -> AbstractContextManager[None]:
    """Of two promotions at once one goes on, and the other is refused."""
    return locks.exclusive(settings.locks / f"promote-{name}.lock", f"the promotion of {name!r}", wait=False)


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
