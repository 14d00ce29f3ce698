"""The commands about this machine: doctor, up, down, status, prune."""

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from slmops.cli import deploy
from slmops.cli.terminal import Json, output, say, show
from slmops.core.settings import Settings
from slmops.local import stack

Fix = Annotated[bool, Parameter(help="Install the tested set of packages first.")]
GenaiCheckout = Annotated[
    Path | None, Parameter(help="Build ONNX Runtime GenAI from this source checkout and install the wheel first.")
]
Yes = Annotated[bool, Parameter(help="Remove it, rather than only say what would be removed.")]
Worker = Annotated[bool, Parameter(help="Also register the deployments and start a worker that runs them.")]


def doctor(*, fix: Fix = False, build_genai: GenaiCheckout = None, json: Json = False) -> int:
    from slmops.local import doctor as checks

    settings = Settings()
    if fix:
        checks.fix(settings)
    if build_genai is not None:
        say(f"installed {checks.build_genai(build_genai, settings)}")
    found = checks.check(settings)
    if json:
        output(jsonlib.dumps([asdict(check) for check in found], indent=2))
    else:
        for check in found:
            advice = f"\n{'':8}   {check.fix}" if check.fix and check.status != "ok" else ""
            output(f"{check.status:8} {check.name}: {check.detail}{advice}")
    return 2 if any(check.status == "failure" for check in found) else 0


def up(*, worker: Worker = False) -> None:
    running = stack.up(Settings(), worker=worker)
    output(f"Prefect {running.prefect_url}\nMLflow  {running.mlflow_url}")


def down() -> None:
    from slmops.serving import home_service

    settings = Settings()
    service = ["service"] if home_service.stop(settings) else []
    stopped = [*service, *stack.down(settings)]
    say(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


def prune(*, yes: Yes = False, json: Json = False) -> None:
    from slmops.delivery import prune as pruning

    settings = Settings()
    found = pruning.prune(settings, stack.tracking_uri(settings), remove=yes)
    show(found, found.text, json=json)


def status(name: str | None = None, /, *, json: Json = False) -> None:
    from slmops.serving import home_service

    if name is not None:
        deploy.versions(name, json=json)
        return
    settings = Settings()
    found = stack.status(settings).model_copy(update={"serving": home_service.status(settings.home)})
    if json:
        output(found.model_dump_json(indent=2))
        return
    lines = [f"home     {found.home}"]
    for title, server in (("prefect", found.prefect), ("mlflow", found.mlflow)):
        lines.append(f"{title:8} {server.url or '-'}  {'ok' if server.ok else 'not running'}")
    if serving := found.serving:
        lines.append(f"serving  {serving.url}  {serving.model}  {'ok' if serving.ok else 'not answering'}")
    output("\n".join(lines))
