"""The commands that deploy: promote, rollback, serve, pull, catalog, and what ``slmops status NAME`` prints."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import TypeAdapter, ValidationError

from slmops.cli import flows as cli_flows
from slmops.core.errors import PrerequisiteError, UsageError
from slmops.core.settings import Settings
from slmops.core.values import Name
from slmops.foundry.versions import Promotion
from slmops.serving.options import Serve

CATALOG_PORT = 8090
Source = Annotated[str | None, Parameter(name="--from")]
_SERVE = Serve()


def promote(promotion: Annotated[Promotion, Parameter(name="*")], /, *, json: bool = False) -> int:
    """Make a version of a model the champion, if it is not worse than the one that is.

    Parameters
    ----------
    json
        Print the result as JSON.
    """
    return cli_flows.promote(promotion, json=json)


def rollback(name: str, /, *, json: bool = False) -> int:
    """Make the version that was the champion before the champion again; a second rollback returns.

    Parameters
    ----------
    name
        The model.
    json
        Print the result as JSON.
    """
    return cli_flows.rollback(_name(name), json=json)


def serve(name: str, /, *, options: Annotated[Serve, Parameter(name="*")] = _SERVE) -> int:
    """Serve the champion of a model over an OpenAI-compatible API, and each newer champion as soon as there is one.

    Parameters
    ----------
    name
        The model.
    """
    from slmops.local import stack
    from slmops.serving import service

    settings = Settings()
    try:
        uri = stack.tracking_uri(settings)
    except PrerequisiteError:
        # The last champion can be served without the registry, and the local server gets the same address again.
        uri = f"http://127.0.0.1:{settings.mlflow_port}"
    service.run(_name(name), options, settings, uri)
    return 0


def pull(reference: str, /, *, source: Source = None, json: bool = False) -> int:
    """Fetch a deployed version onto this device, verify it, register it in Foundry Local and ask it something.

    Parameters
    ----------
    reference
        NAME, NAME@ALIAS or NAME@VERSION; NAME alone is the champion, or where that does not fit, what was accepted
        beside it and does.
    source
        MLflow tracking server; the one that runs here by default.
    json
        Print the result as JSON.
    """
    from slmops.delivery import pull as pulling
    from slmops.local import stack

    settings = Settings()
    name, which = pulling.split(reference)
    installed = pulling.pull(name, which, settings, source or stack.tracking_uri(settings))
    if json:
        print(installed.model_dump_json(indent=2))
    else:
        print(f"{installed.foundry_id}\n{installed.folder}")
    return 0


def catalog(*, source: Source = None, host: str = "127.0.0.1", port: int = CATALOG_PORT) -> int:
    """Offer the promoted models to Foundry Local applications as a private catalog.

    Parameters
    ----------
    source
        MLflow tracking server; the one that runs here by default.
    host
        Address to listen at. There is no token: whoever reaches it can read names and sizes of the models.
    port
        Port to listen at.
    """
    from slmops.delivery import catalog as offering
    from slmops.local import stack

    offering.serve(source or stack.tracking_uri(Settings()), host, port)
    return 0


def versions(name: str, *, json: bool) -> int:
    """What the registry knows of a model."""
    from slmops.local import stack
    from slmops.tracking.registry import Registry

    registry = Registry(stack.tracking_uri(Settings()))
    found = registry.versions(_name(name))
    if not found:
        known = ", ".join(registry.models()) or "none"
        raise UsageError(f"There is no model {name!r} in the registry.", f"Known models: {known}.")
    if json:
        rows: list[dict[str, Any]] = [one.model_dump(mode="json") for one in found]
        print(jsonlib.dumps({"model": name, "versions": rows}, indent=2))
        return 0
    from tabulate import tabulate

    headers = ["version", "variant", "size MB", "gates", "created", "", "note"]
    cells = [
        [
            one.version,
            one.variant,
            f"{one.size_mb:.1f}",
            one.tags.get("slmops.gates", ""),
            f"{one.created:%Y-%m-%d %H:%M}",
            ", ".join(alias for alias in one.aliases if alias != one.variant),
            _note(one.tags),
        ]
        for one in found
    ]
    print(tabulate(cells, headers=headers, disable_numparse=True))
    return 0


def _note(tags: dict[str, str]) -> str:
    if said := tags.get("slmops.withdrawn"):
        return f"withdrawn: {said}"
    if said := tags.get("slmops.forced"):
        return f"forced: {said}"
    return ""


def _name(name: str) -> str:
    """A name that may become part of a path."""
    try:
        return TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise UsageError(
            f"{name!r} is no model name.", "Names have letters, digits, - and _, and begin with a letter or digit."
        ) from None
