"""Promotion and its way back: which version of a model is deployed; and a person's decision about it.

A flow run that waits for a decision is suspended, without a process or a lock, until somebody answers its form.
"""

import logging
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from uuid import UUID

from prefect import flow, runtime, suspend_flow_run
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.input import RunInput, read_flow_run_input
from prefect.utilities.urls import url_for
from pydantic import BaseModel, Field

from flows.running import named, plainly
from slmops.core import locks, machine
from slmops.core.errors import GateError, PrerequisiteError, UsageError
from slmops.core.names import Name
from slmops.core.settings import Settings
from slmops.delivery import promotion
from slmops.delivery.promotion import Decision
from slmops.foundry.versions import RELEASE, Promoted, Promotion
from slmops.local import stack
from slmops.tracking.registry import Registry
from tasks.promote import (
    check_files,
    find_previous,
    judge_challenger,
    move_aliases,
    note_tags,
    show_decision,
    tell_of_rollback,
    upload_files,
)

log = logging.getLogger("slmops.promote")

APPROVED, TURNED_DOWN = "slmops.approved", "slmops.turned_down"  # tags: why; with _by: who; with _at: when
EXPIRED = "never resumed"  # in the message with which Prefect fails a run that nobody answered in time


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
        tell_of_rollback(rolled_back)
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
        tags = {**_promoter(), "slmops.forced": "", **dict.fromkeys(_decided(APPROVED), "")}
        if others or challenger.others:
            tags[RELEASE] = release
        if request.approval:
            tags |= ask_person(decision, request, uri)
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
    if tags[APPROVED]:
        why.append(f"approved by {tags[f'{APPROVED}_by']}: {tags[APPROVED]}")
    if tags["slmops.forced"]:
        why.append(f"forced: {tags['slmops.forced']}")
    return "; ".join(why)[:4000]


def _alone(name: str, settings: Settings) -> AbstractContextManager[None]:
    """Of two promotions at once one goes on, and the other is refused."""
    return locks.exclusive(settings.locks / f"promote-{name}.lock", f"the promotion of {name!r}", wait=False)


class Approval(RunInput):
    """The form on the Prefect page, and what ``slmops approve`` sends."""

    promote: bool = True
    approver: str = Field(min_length=1, description="Your name.")
    reason: str = Field(min_length=3, description="Why.")


def check_can_wait(*, approval: bool) -> None:
    """A PrerequisiteError if a run that is to wait is not one of a deployment: nobody could go on with it."""
    if approval and runtime.deployment.id is None:
        raise PrerequisiteError(
            "Only a run of a deployment can wait for approval: a worker goes on with it when somebody has decided.",
            "Start `slmops up --worker`, then use the command with --approval, or the Run button on the Prefect page.",
        )


def ask_person(decision: Decision, request: Promotion, uri: str) -> dict[str, str]:
    """Have a person decide, on the Prefect page or with ``slmops approve``; returns tags: why, who and when.

    The first call suspends the flow run, which ends its process. When somebody has answered, a worker runs the flow
    from its beginning, and this call returns; if the answer is no, it is noted at the version, and a GateError. If
    nobody answers in time, Prefect fails the flow run.
    """
    form = Approval.with_initial_data(description=promotion.text(decision, request), promote=not decision.against)
    answer = suspend_flow_run(wait_for_input=form, timeout=request.approval_timeout_s, key="approval")
    said = (answer.reason, answer.approver, datetime.now(UTC).isoformat(timespec="seconds"))
    if answer.promote:
        return dict(zip(_decided(APPROVED), said, strict=True))
    note_tags(Registry(uri), decision.challenger, dict(zip(_decided(TURNED_DOWN), said, strict=True)))
    raise GateError(f"{decision.challenger.label} was turned down by {answer.approver}: {answer.reason}")


def _decided(tag: str) -> tuple[str, str, str]:
    return tag, f"{tag}_by", f"{tag}_at"


def question(run: str) -> str:
    """What a run that waits for approval asks, in Markdown: its gates, and what speaks against it.

    Args:
        run: The id of the flow run, or the address of its page.

    Raises:
        UsageError: There is no such run, or it does not wait, or no longer.
    """
    with get_client(sync_client=True) as client:
        found = _waiting(client, run)
        return str(read_flow_run_input(_keys(found)["description"], flow_run_id=found.id))


def approve(run: str, answer: Approval) -> None:
    """Answer what :func:`question` gives; see there for the argument and the error."""
    with get_client(sync_client=True) as client:
        found = _waiting(client, run)
        result = client.resume_flow_run(found.id, run_input=answer.model_dump())
        if result.status != SetStateStatus.ACCEPT:
            _waiting(client, run)  # it may be too late, or somebody was faster
            raise UsageError(f"{found.name} did not take the answer.", "Answer the form on its page.")


def _waiting(client: SyncPrefectClient, run: str) -> FlowRun:
    try:
        found = client.read_flow_run(UUID(run.rstrip("/").rpartition("/")[2]))
    except (ValueError, ObjectNotFound):
        raise UsageError(f"There is no run {run!r}.", "Give its id, or the address of its page.") from None
    state = found.state
    if state is not None and state.is_paused() and _keys(found):
        return found
    if state is not None and state.is_failed() and EXPIRED in (state.message or ""):
        late = f"Nobody decided about {found.name} in time, so it is refused. The champion stays."
        raise UsageError(late, "Start it again.")
    raise UsageError(f"{found.name} does not wait for approval: it is {state.name if state else 'not begun'}.")


def _keys(run: FlowRun) -> dict[str, str]:
    """Where Prefect keeps the form of a suspended run, and its answer."""
    return (run.state and run.state.state_details.run_input_keyset) or {}


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
