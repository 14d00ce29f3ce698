"""Find, check, decide, and move the aliases."""

from __future__ import annotations

from prefect import pause_flow_run
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput

from slmops.core.errors import PromotionError, UsageError
from slmops.core.settings import Settings
from slmops.core.values import to_name
from slmops.delivery import installed, promotion, pull
from slmops.delivery.promotion import Decision
from slmops.foundry.versions import Installed, ModelVersion, Promoted, Promotion
from slmops.tracking.registry import Registry
from slmops.tracking.tracker import Tracker
from tasks.stage import stage


class Approval(RunInput):
    """The form on the Prefect page."""

    promote: bool = True
    comment: str = ""


@stage("judge the challenger", tracking=True)
def judge_challenger(uri: str, request: Promotion) -> Decision:
    """The version that was asked for, and the job's gates against the champion of now."""
    registry, tracker = Registry(uri), Tracker(uri)
    challenger = promotion.pick(registry, tracker, request)
    return promotion.judge(tracker, challenger, registry.champion(request.name))


@stage("check the files of version {version.version}")
def check_files(uri: str, version: ModelVersion, settings: Settings) -> Installed:
    """Fetch it as a device would: each SHA-256, registered in Foundry Local, and it answers."""
    return pull.install(version, settings, uri)


@stage(tracking=True)
def find_previous(uri: str, name: str) -> tuple[ModelVersion, ModelVersion]:
    """The champion, and what to go back to.

    Raises:
        UsageError: There is nothing to go back to.
    """
    registry = Registry(uri)
    champion, previous = registry.champion(name), registry.previous(name)
    if champion is None:
        raise UsageError(f"Nothing of {name} is deployed.", f"`slmops promote {name}` deploys it.")
    if previous is None or previous.version == champion.version:
        raise UsageError(f"{champion.label} is the first that was deployed: there is nothing to go back to.")
    return champion, previous


@stage("version {version.version} becomes the champion")
def move_aliases(
    uri: str,
    version: ModelVersion,
    champion: ModelVersion | None,
    tags: dict[str, str],
    decision: Decision | None,
    settings: Settings,
) -> Promoted:
    """Make it the champion. Not retried: a second attempt would find the first one's result in its way."""
    registry = Registry(uri)
    registry.promote(version, champion, tags)
    kept = [one for one in (version, champion) if one is not None]
    # What this and earlier promotions fetched for their checks goes.
    installed.tidy(version.name, [one.foundry_id for one in kept], settings)
    return Promoted(
        model=version.name,
        version=version.version,
        variant=version.variant,
        replaced=champion.version if champion else None,
        changed=True,
        forced=tags.get("slmops.forced"),
        gates=decision.gates if decision else (),
        url=registry.page(version),
    )


def show_decision(decision: Decision, request: Promotion) -> None:
    """Publish what speaks for and against it as an artifact of the flow run."""
    create_markdown_artifact(
        promotion.text(decision, request),
        key=f"promotion-{to_name(request.name).replace('_', '-')}",
        description=f"{request.name}: version {decision.challenger.version} as champion",
    )


def ask_person(decision: Decision, request: Promotion) -> str:
    """Pause the flow until somebody decides on the Prefect page; returns the comment.

    Raises:
        PromotionError: The answer is no, or nobody answered in time.
    """
    form = Approval.with_initial_data(description=promotion.text(decision, request), promote=not decision.against)
    label = decision.challenger.label
    try:
        answer = pause_flow_run(wait_for_input=form, timeout=request.approval_timeout_s, poll_interval=2)
    except FlowPauseTimeout:
        raise PromotionError(
            f"Nobody decided about {label} within {request.approval_timeout_s} s.", "Promote it again."
        ) from None
    if not answer.promote:
        raise PromotionError(f"{label} was turned down on the Prefect page: {answer.comment or 'no comment'}")
    return answer.comment or "no comment"
