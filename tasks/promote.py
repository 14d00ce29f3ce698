"""Find a version, check it, and move the aliases."""

from prefect import runtime
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event

from slmops.core.errors import UsageError
from slmops.core.settings import Settings
from slmops.delivery import installed, promotion, pull
from slmops.delivery.promotion import Decision
from slmops.delivery.trouble import ROLLED_BACK
from slmops.foundry.versions import RELEASE, ModelVersion, Promoted, Promotion
from slmops.tracking.registry import Registry
from tasks.stage import artifact_key, stage

judge_challenger = stage("judge the challenger", tracking=True)(promotion.decide)
# As a device would fetch it: each SHA-256, registered in Foundry Local, and it answers.
check_files = stage("check the files of version {version.version}")(pull.install)
note_tags = stage("note what was decided", tracking=True)(Registry.note)
upload_files = stage("upload version {version.version}", tracking=True)(Registry.upload)


@stage(tracking=True)
def find_version(uri: str, name: str, which: str | None) -> ModelVersion:
    """The version that an alias or a number names, the champion without one; a UsageError if there is none."""
    registry = Registry(uri)
    return _champion(registry, name) if which is None else registry.find(name, which)


@stage(tracking=True)
def find_previous(uri: str, name: str) -> tuple[ModelVersion, ModelVersion]:
    """The champion, and what to go back to; a UsageError if there is nothing."""
    registry = Registry(uri)
    champion, previous = _champion(registry, name), registry.previous(name)
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
    is_new = champion is None or champion.version != version.version
    changed = is_new or RELEASE in tags
    if changed:
        registry.promote(version, champion, tags)
        version = registry.find(version.name, str(version.version))
        releases = [registry.release(one) for one in (version, champion) if one is not None]
        kept = [one.foundry_id for release in releases for one in release]
        installed.tidy(version.name, kept, settings)  # what this and earlier promotions fetched for their checks
    return Promoted(
        model=version.name,
        version=version.version,
        variant=version.variant,
        replaced=champion.version if champion and is_new else None,
        changed=changed,
        forced=tags.get("slmops.forced"),
        gates=decision.gates if decision else (),
        url=registry.page(version),
        others={one.variant: one.version for one in registry.release(version)[1:]},
    )


def tell_of_rollback(promoted: Promoted) -> None:
    emit_event(
        ROLLED_BACK,
        {"prefect.resource.id": f"slmops.champion.{promoted.model}", "prefect.resource.name": promoted.model},
        payload={"reason": promoted.text, "links": "\n".join(filter(None, (runtime.flow_run.ui_url, promoted.url)))},
    )


@stage()
def show_decision(decision: Decision, request: Promotion) -> None:
    """Publish what speaks for and against it as an artifact of the flow run."""
    about = f"{request.name}: version {decision.challenger.version} as champion"
    create_markdown_artifact(promotion.text(decision, request), artifact_key("promotion", request.name), about)


def _champion(registry: Registry, name: str) -> ModelVersion:
    champion = registry.champion(name)
    if champion is None:
        raise UsageError(f"Nothing of {name} is deployed.", f"`slmops promote {name}` deploys it.")
    return champion
