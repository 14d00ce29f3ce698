"""Compare what there is with what was there at the last look, which a Prefect variable remembers."""

import time
from typing import Any

from prefect.events import emit_event
from prefect.variables import Variable

from slmops.tracking.registry import Registry
from slmops.tracking.training import TrainingTracker
from slmops.training import data
from slmops.training.sources import Fetched
from slmops.training.values import News, Seen
from tasks.stage import stage

NEW_DATA, NEW_VERSION = "slmops.data.new", "slmops.version.new"


@stage("tell of data of {request.name}", tracking=True)
def tell_of_data(request: News, fetched: Fetched, uri: str) -> list[str]:
    """Emit an event if no retraining has used the training items yet."""
    digest = data.digest(fetched)
    seen, is_told = _seen(request.name).look_at_data(digest, TrainingTracker(uri).last_data(request.name), time.time())
    told = []
    if is_told:
        payload = {"name": request.name, "data": fetched.source, "digest": digest}
        told = [_tell(NEW_DATA, f"slmops.data.{request.name}", request.name, payload)]
    _remember(request.name, seen)  # last: a look that breaks tells of it once more
    return told


@stage("tell of versions of {request.name}", tracking=True)
def tell_of_versions(request: News, uri: str) -> list[str]:
    """Emit an event for each version with a higher number than any of the last look."""
    versions = sorted(Registry(uri).versions(request.name), key=lambda one: one.version)
    newest = versions[-1].version if versions else 0
    seen = _seen(request.name)
    last = newest if seen.version is None else seen.version
    told = []
    for one in versions:
        if one.version > last:
            payload = {"name": one.name, "version": one.version, "variant": one.variant}
            told.append(_tell(NEW_VERSION, f"slmops.version.{request.name}.{one.version}", one.label, payload))
    _remember(request.name, seen.model_copy(update={"version": newest}))
    return told


def _tell(event: str, resource: str, name: str, payload: dict[str, Any]) -> str:
    emit_event(event, {"prefect.resource.id": resource, "prefect.resource.name": name}, payload=payload)
    return resource


def _seen(name: str) -> Seen:
    return Seen.model_validate(Variable.get(_variable(name), {}))


def _remember(name: str, seen: Seen) -> None:
    Variable.set(_variable(name), seen.model_dump(exclude_none=True), overwrite=True)


def _variable(name: str) -> str:
    """Prefect's names of variables take neither upper case nor dashes; a lower-case word spells the rest."""
    return "slmops_seen_" + "".join(c if c.isdigit() or c.islower() else f"_{ord(c)}_" for c in name)
