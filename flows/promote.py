"""Promotion and its way back: which version of a model is deployed."""

import logging
from contextlib import AbstractContextManager

from prefect import flow, runtime

from flows.approval import ask_person, check_can_wait
from flows.running import named, plainly
from slmops.core import locks
from slmops.core.settings import Settings
from slmops.core.values import Name
from slmops.delivery import promotion
from slmops.foundry.versions import Promoted, Promotion
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
        check_files(previous, settings, uri)
        tags = {"slmops.promoted_by": runtime.flow_run.ui_url or "", "slmops.forced": ""}
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
        if champion is not None and champion.version == challenger.version:
            log.info("%s is the champion already", challenger.label)
            return move_aliases(uri, challenger, champion, {}, decision, settings)
        refused = promotion.refuse(decision)
        if refused is not None and request.force is None:
            raise refused
        checked = check_files(challenger, settings, uri)
        # Before a person decides, because after that another machine may go on.
        challenger = upload_files(Registry(uri), challenger, checked.folder)
        tags = {"slmops.promoted_by": runtime.flow_run.ui_url or "", "slmops.forced": "", "slmops.approved": ""}
        if request.approval:
            tags["slmops.approved"] = ask_person(decision, request)
        if refused is not None and request.force is not None:
            log.warning("forced against: %s", refused.message)
            tags["slmops.forced"] = f"{request.force} (against: {'; '.join(decision.against)})"[:4000]
        promoted = move_aliases(uri, challenger, champion, tags, decision, settings)
        log.info("%s is the champion of %s", challenger.label, request.name)
        return promoted


def _alone(name: str, settings: Settings) -> AbstractContextManager[None]:
    """Of two promotions at once one goes on, and the other is refused."""
    return locks.exclusive(settings.locks / f"promote-{name}.lock", f"the promotion of {name!r}", wait=False)
