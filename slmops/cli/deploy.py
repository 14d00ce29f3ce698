"""The commands that deploy: promote, rollback, deploy, undeploy, serve, pull, catalog, list, status of a model."""

import json as jsonlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from slmops.cli.prefect import hand_over, prefect_running
from slmops.cli.terminal import Flat, Json, Model, output, say, show
from slmops.core import machine
from slmops.core.errors import PrerequisiteError, UsageError
from slmops.core.settings import Settings
from slmops.core.validation import check_name
from slmops.foundry.versions import CHAMPION, Promotion, reigns
from slmops.local import stack
from slmops.serving.limits import Serve
from slmops.training.values import Deploy

NOTES = ("withdrawn", "forced", "files")
Source = Annotated[
    str | None, Parameter(name="--from", help="MLflow tracking server; the one that runs here by default.")
]
Reference = Annotated[
    str,
    Parameter(
        help="NAME, NAME@ALIAS or NAME@VERSION. NAME alone is the champion; on a device on which that does not run, it "
        "is a version that was accepted with the champion and runs there."
    ),
]
RetrainingFile = Annotated[Path, Parameter(help="The job file of its retraining, TOML or YAML; flags win.")]
WaitingRun = Annotated[str, Parameter(help="The run that waits: its id, or the address of its page.")]
Reason = Annotated[str | None, Parameter(help="Why. Without it, only the gates are shown.")]
Person = Annotated[str | None, Parameter(help="Who decides; the name of your account by default.")]
Reject = Annotated[bool, Parameter(help="Turn it down.")]
Host = Annotated[
    str, Parameter(help="Address to listen at. Everybody who can reach it can read names and sizes of the models.")
]
_SERVE = Serve()


def promote(promotion: Annotated[Promotion, Flat], /, *, json: Json = False) -> None:
    with prefect_running() as servers:
        from flows.promote import promote

        if promotion.approval:
            from slmops.delivery import promotion as deciding

            refused = deciding.refuse(deciding.decide(servers.tracking_uri, promotion))
            if refused is not None and promotion.force is None:
                raise refused  # what a gate refuses needs no person
            hand_over("promote", promotion, json=json)
        else:
            promoted = promote(promotion)
            show(promoted, promoted.text, json=json, page=promoted.url)


def approve(run: WaitingRun, /, *, reason: Reason = None, by: Person = None, reject: Reject = False) -> None:
    with prefect_running():
        from flows.promote import Approval, approve, question

        output(question(run))
        if reason is None:
            say("`--reason TEXT` approves it, with `--reject` it is turned down.")
        else:
            approve(run, Approval(promote=not reject, approver=by or machine.person(), reason=reason))
            say("A worker goes on with it.")


def rollback(name: Model, /, *, json: Json = False) -> None:
    check_name(name)
    with prefect_running():
        from flows.promote import rollback

        promoted = rollback(name)
        show(promoted, promoted.text, json=json, page=promoted.url)


def deploy(job_file: RetrainingFile, /, *, request: Annotated[Deploy, Flat]) -> None:
    del job_file  # read before the flags are parsed
    with prefect_running():
        from flows.deploy import deploy

        output("\n".join(deploy(request.absolute())))
    say("A worker of their pool runs them, such as that of `slmops up --worker`.")


def undeploy(name: Model, /) -> None:
    check_name(name)
    with prefect_running():
        from flows.deploy import undeploy

        output("\n".join(undeploy(name)))


def list(*, json: Json = False) -> None:
    from slmops.delivery.overview import overview

    with prefect_running() as servers:
        from flows.deploy import schedules

        found = overview(Settings(), servers.tracking_uri, schedules())
    show(found, found.text, json=json)


def serve(name: Model, /, *, options: Annotated[Serve, Flat] = _SERVE) -> None:
    from slmops.serving import service

    check_name(name)
    settings = Settings()
    try:
        uri = stack.tracking_uri(settings)
    except PrerequisiteError:
        # The last champion can be served without the registry, and a local server will have this address again.
        uri = f"http://127.0.0.1:{settings.mlflow_port}"
    service.run(name, options, settings, uri)


def pull(reference: Reference, /, *, source: Source = None, json: Json = False) -> None:
    from slmops.delivery import pull as pulling

    settings = Settings()
    name, which = pulling.split(reference)
    installed = pulling.pull(name, which, settings, source or stack.tracking_uri(settings))
    show(installed, f"{installed.foundry_id}\n{installed.folder}", json=json)


def catalog(*, source: Source = None, host: Host = "127.0.0.1", port: int = 8090) -> None:
    from slmops.delivery import catalog as offering

    offering.serve(source or stack.tracking_uri(Settings()), host, port)


def versions(name: str, *, json: bool) -> None:
    """Print what the registry knows about a model: what ``slmops status NAME`` does."""
    from slmops.tracking.registry import Registry

    check_name(name)
    registry = Registry(stack.tracking_uri(Settings()))
    found = registry.versions(name)
    if not found:
        known = ", ".join(registry.models()) or "none"
        raise UsageError(f"There is no model {name!r} in the registry.", f"Known models: {known}.")
    history = reigns(found)
    if json:
        dumped, told = ([one.model_dump(mode="json") for one in ones] for ones in (found, history))
        output(jsonlib.dumps({"model": name, "versions": dumped, "history": told}, indent=2))
        return
    from tabulate import tabulate

    rows = [
        {
            "version": one.version,
            "variant": one.variant,
            "size MB": f"{one.size_mb:.1f}",
            "gates": one.tags.get("slmops.gates", ""),
            "created": f"{one.created:%Y-%m-%d %H:%M}",
            "": ", ".join(alias for alias in one.aliases if alias != one.variant),
            "note": "; ".join(f"{key}: {said}" for key in NOTES if (said := one.tags.get(f"slmops.{key}"))),
        }
        for one in found
    ]
    output(tabulate(rows, headers="keys", disable_numparse=True))
    if history:
        champion = next((one.version for one in found if CHAMPION in one.aliases), None)
        times = [
            {
                "champion": f"version {one.version} ({one.variant})",
                "from": f"{one.since.astimezone():%Y-%m-%d %H:%M}",
                "until": f"{one.until.astimezone():%Y-%m-%d %H:%M}" if one.until else "now" * (one.version == champion),
                "promoted by": one.promoter or one.run,
                "because": one.reason,
                "data": f"{one.data} ({one.data_digest[:12]})" if one.data_digest else "",
                "checkpoint": one.checkpoint,
            }
            for one in history
        ]
        output(f"\n{tabulate(times, headers='keys', disable_numparse=True)}")
