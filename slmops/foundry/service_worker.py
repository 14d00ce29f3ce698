"""Child process: one version behind Foundry Local's own web service, until standard input closes.

The web service offers what a catalog lists, so this process is its own catalog, of one entry. It also has its own model
cache: the runtime reads every folder in its cache, even hidden ones, and of two folders that claim one name it may load
the unfinished one that an interrupted download left.
"""

import logging
import os
import socket
import sys
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slmops.core.errors import PrerequisiteError, ServingError, SlmopsError
from slmops.core.targets import of_model
from slmops.core.values import Frozen
from slmops.foundry.layout import PUBLISHER, claimed
from slmops.processes import child
from slmops.processes.daemon import HOST

log = logging.getLogger(__name__)

START_MESSAGE_LIMIT = 4000  # characters of the longest error message, so that the line fits a pipe


class ServiceRequest(Frozen):
    """A version on this device, and where its process may write."""

    foundry_id: str
    folder: Path
    scratch: Path
    logs: Path


class ServiceStart(Frozen):
    """The one line on standard output: where the service listens, or the error that prevented it."""

    url: str = ""
    error: str | None = None
    message: str = ""
    fix: str | None = None


def main() -> None:
    """Serve the request in the first argument, print one line about it, and wait."""
    # Native libraries write to standard output too: from here on that goes to standard error.
    line = os.dup(1)
    os.dup2(2, 1)
    child.die_with_parent()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        try:
            manager = serve(ServiceRequest.model_validate_json(sys.argv[1]))
            answer = ServiceStart(url=manager.urls[0])
        except SlmopsError as error:
            traceback.print_exc()
            said = error.message[:START_MESSAGE_LIMIT]
            answer = ServiceStart(error=type(error).__name__, message=said, fix=error.fix)
        os.write(line, f"{answer.model_dump_json()}\n".encode())
        os.close(line)
        if not answer.error:
            threading.Event().wait()
    except BaseException:
        traceback.print_exc()
    finally:
        child.leave(1)


def serve(request: ServiceRequest) -> Any:
    """Load the version and start the web service, whose address the manager knows; else a ServingError.

    A PrerequisiteError says that the device of the version is not here.
    """
    import foundry_local_sdk as sdk
    import uvicorn

    from slmops.foundry import runtime
    from slmops.foundry.private_catalog import PATH, Entry, app

    # It listens before the server runs, so the runtime's first request waits in the queue.
    listening = socket.create_server((HOST, 0))
    name, _, version = request.foundry_id.rpartition(":")
    made_for = of_model(name)
    entry = Entry(
        alias=name.removesuffix(f"-{made_for.suffix}"),
        name=name,
        version=int(version),
        display_name=name,
        device=made_for.device,
        provider=made_for.provider,
        size_bytes=sum(file.stat().st_size for file in request.folder.rglob("*") if file.is_file()),
        created=datetime.now(UTC),
        abilities=claimed(request.folder),
    )
    server = uvicorn.Server(uvicorn.Config(app(lambda: [entry]), lifespan="off", log_level="warning"))
    threading.Thread(target=server.run, args=([listening],), daemon=True).start()
    try:
        manager = runtime.manager(
            request.scratch,
            models=_cache(request),
            logs=request.logs,
            catalog=f"http://{HOST}:{listening.getsockname()[1]}{PATH}",
            web=sdk.Configuration.WebService(urls=f"http://{HOST}:0"),
        )
        if (why := runtime.missing(manager, made_for.provider)) is not None:
            # Not the version's fault, so its promotion is not withdrawn.
            raise PrerequisiteError(
                f"{request.foundry_id} cannot be served here: {why}.", "`slmops pull` takes what fits this device."
            )
        model = manager.get_catalog().get_model_variant(request.foundry_id)
        if model is None or not model.is_cached or Path(model.get_path()).resolve() != request.folder.resolve():
            raise ServingError(
                f"Foundry Local does not find {request.foundry_id} in {request.folder}.",
                "Remove the folder and pull the version again.",
            )
        model.load()
        manager.start_web_service()
    except runtime.Fault as error:
        raise ServingError(f"Foundry Local refuses {request.foundry_id}: {error}") from error
    log.info("%s listens at %s", request.foundry_id, manager.urls[0])
    return manager


def _cache(request: ServiceRequest) -> Path:
    """A model cache with this version alone in it."""
    cache = request.scratch / "models"
    link = cache / PUBLISHER / request.folder.name
    link.parent.mkdir(parents=True)
    try:
        link.symlink_to(request.folder, target_is_directory=True)
    except OSError:  # a file system without links: use the shared cache
        return request.folder.parent.parent
    return cache


if __name__ == "__main__":
    main()
