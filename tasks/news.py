"""Compare what there is with what was there at the last look, which a Prefect variable remembers."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.variables import Variable

from slmops.core.settings import Settings
from slmops.tracking.registry import Registry
from slmops.training import data, sources
from slmops.training.values import News, Retrain
from tasks.track import tracking_task
from tasks.train import fetch_data

NEW_DATA, NEW_VERSION = "slmops.data.new", "slmops.version.new"


@task(name="tell of data", task_run_name="tell of data of {request.name}", cache_policy=NO_CACHE)
def tell_of_data(request: News, settings: Settings, uri: str) -> list[str]:
    """Emit an event if the training items differ from those of the last look."""
    asked = Retrain(model="-", data=request.data or "", evaluation_set=request.evaluation_set, name=request.name)
    digest = data.digest(fetch_data.fn(asked, settings, uri))
    seen = _seen(request.name)
    resource = f"slmops.data.{request.name}"
    is_new = seen.get("data", digest) != digest
    if is_new:
        emit_event(
            NEW_DATA,
            {"prefect.resource.id": resource, "prefect.resource.name": request.name},
            payload={"name": request.name, "data": sources.public(asked.data), "digest": digest},
        )
    _remember(request.name, {**seen, "data": digest})  # last: a look that breaks tells of it once more
    return [resource] if is_new else []


@tracking_task(name="tell of versions", task_run_name="tell of versions of {request.name}")
def tell_of_versions(request: News, uri: str) -> list[str]:
    """Emit an event for each version with a higher number than any of the last look."""
    versions = Registry(uri).versions(request.name)
    newest = max((version.version for version in versions), default=0)
    seen = _seen(request.name)
    told = []
    for version in sorted(versions, key=lambda one: one.version):
        if version.version > seen.get("version", newest):
            resource = f"slmops.version.{request.name}.{version.version}"
            emit_event(
                NEW_VERSION,
                {"prefect.resource.id": resource, "prefect.resource.name": version.label},
                payload={"name": version.name, "version": version.version, "variant": version.variant},
            )
            told.append(resource)
    _remember(request.name, {**seen, "version": newest})
    return told


def _seen(name: str) -> dict[str, Any]:
    found: Any = Variable.get(_variable(name), {})
    return found if isinstance(found, dict) else {}


def _remember(name: str, seen: dict[str, Any]) -> None:
    Variable.set(_variable(name), seen, overwrite=True)


def _variable(name: str) -> str:
    """Prefect's names of variables take no upper case and no dashes; a lower-case word spells the rest."""
    return "slmops_seen_" + "".join(c if c.isdigit() or c.islower() else f"_{ord(c)}_" for c in name)
