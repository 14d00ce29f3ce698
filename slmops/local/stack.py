"""The local Prefect and MLflow servers: started when they are needed, left running, stopped by ``slmops down``.

Everything that they keep is below ``settings.home``, and ``stack.json`` there says which processes they are. Both are
only started as processes, never imported.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import SecretStr, TypeAdapter

from slmops.core import web
from slmops.core.errors import PrerequisiteError, WorkError
from slmops.core.files import write_atomic
from slmops.core.locks import exclusive
from slmops.core.settings import Settings
from slmops.core.values import Frozen
from slmops.processes import children, daemon
from slmops.processes.daemon import HOST, Daemon
from slmops.serving.home_service import ServingStatus

Server = Literal["prefect", "mlflow", "worker"]
_SERVERS = TypeAdapter(dict[Server, Daemon])

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]  # the source tree, if slmops was installed from one
REGISTER = ROOT / "deployments" / "register.py"
DEPLOYMENTS = Path("deployments", "prefect.yaml")
POOL = "slmops"
START_S = 120.0
RECOVER_S = 20.0
DEPLOY_S = 300.0

QUIET = {
    "DO_NOT_TRACK": "true",  # Prefect also takes "1", MLflow only this word
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # the server's heartbeat, and what its UI sends
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",  # the new page asks amplitude.com for its settings whatever one says
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Variables with which neither Prefect nor MLflow sends anything to its makers."""

_TITLES: dict[Server, str] = {"worker": "Prefect worker", "prefect": "Prefect server", "mlflow": "MLflow server"}
_VARIABLES: dict[Server, str] = {
    "prefect": "SLMOPS_PREFECT_API_URL and PREFECT_API_URL",
    "mlflow": "SLMOPS_TRACKING_URI and MLFLOW_TRACKING_URI",
}
_PORTS: dict[Server, str] = {"prefect": "SLMOPS_PREFECT_PORT", "mlflow": "SLMOPS_MLFLOW_PORT"}
_HEALTH: dict[Server, tuple[str, str]] = {
    "prefect": ("/api/health", "true"),
    "mlflow": ("/health", "OK"),
    "worker": ("/health", '{"message":"OK"}'),
}


class ServerLostError(WorkError):
    """Prefect's server stopped answering in the middle of a run."""


class Stack(Frozen):
    """Where the servers are, and which of them this call started. People reach their pages at the first two."""

    prefect_url: str
    mlflow_url: str
    prefect_api_url: str
    tracking_uri: str
    started: tuple[Server, ...] = ()


class ServerStatus(Frozen):
    """One server: the root URL for people, and whether it answers."""

    url: str | None
    ok: bool


class StackStatus(Frozen):
    """What ``slmops status --json`` prints."""

    home: Path
    prefect: ServerStatus
    mlflow: ServerStatus
    serving: ServingStatus | None = None


def up(settings: Settings, *, worker: bool = False) -> Stack:
    """Start what is not running, and wait until it answers.

    A server that the settings name is used instead of one of ours, and only asked whether it is healthy. For a
    ``worker`` the deployments are registered first; a WorkError if they cannot be. If a given server does not answer,
    or one of ours does not start, that is a PrerequisiteError, and what this call has started is stopped again.
    """
    if worker and not (ROOT / DEPLOYMENTS).is_file():
        missing = f"There are no deployments to register: {ROOT / DEPLOYMENTS} is missing."
        raise PrerequisiteError(missing, "Install slmops from its source tree (pip install -e .) to use a worker.")
    for name, url in _given(settings).items():
        if url and (problem := _problem(name, url)):
            advice = f"Start it or correct the URL; or unset {_VARIABLES[name]}, and slmops starts a server of its own."
            raise PrerequisiteError(f"The {_TITLES[name]} at {url} does not answer: {problem}.", advice)
    with exclusive(settings.locks / "stack.lock", "the local servers", wait=True):
        servers = _read(settings)
        started: list[Server] = []
        try:
            for name, url in _given(settings).items():
                if url is None and not _runs_well(name, servers):
                    _start(settings, servers, name)
                    started.append(name)
            for name in list(started):
                _wait_until_healthy(settings, servers, name)
            stack = _stack(settings, servers)
            if worker:
                _work(settings, stack, servers, started)
        except BaseException:
            for name in reversed(started):
                if name in servers:
                    daemon.stop(servers.pop(name))
            _write(settings, servers)
            raise
    return stack.model_copy(update={"started": tuple(started)})


def down(settings: Settings) -> list[Server]:
    """Stop what we started, the worker first; returns what was running."""
    if not _state(settings).exists():
        return []
    stopped: list[Server] = []
    with exclusive(settings.locks / "stack.lock", "the local servers", wait=True):
        servers = _read(settings)
        for name in _TITLES:
            if name in servers and daemon.stop(servers.pop(name)):
                stopped.append(name)
            _write(settings, servers)
    return stopped


def status(settings: Settings) -> StackStatus:
    """Ask each server, ours or given, for its health. Never starts anything and never raises."""
    servers = _read(settings)
    shown = {"prefect": settings.prefect_ui_url, "mlflow": settings.mlflow_ui_url}
    found = {name: _status(name, url, shown[name], servers) for name, url in _given(settings).items()}
    return StackStatus(home=settings.home, prefect=found["prefect"], mlflow=found["mlflow"])


def tracking_uri(settings: Settings) -> str:
    """The address of MLflow, given or ours; a PrerequisiteError if there is neither."""
    if settings.tracking_uri is not None:
        return settings.tracking_uri
    server = _read(settings).get("mlflow")
    if server is None or daemon.leader(server) is None:
        raise PrerequisiteError("No MLflow server is running.", "Run `slmops up`.")
    return server.url


@contextmanager
def session(settings: Settings) -> Iterator[Stack]:
    """Start the servers if needed; within the block, import Prefect, which reads its environment then, and run a flow.

    If Prefect's server stops answering meanwhile, that is a ServerLostError.
    """
    import httpx

    os.environ.update(web.past_proxies())
    servers = up(settings)
    os.environ.update(prefect_environment(settings, servers))
    try:
        yield servers
    except httpx.TransportError as error:  # MLflow's client has errors of its own: this is Prefect's
        lost = f"Prefect at {servers.prefect_url} stopped answering, and the run with it."
        advice = "`slmops up` starts it again; then repeat the command: what was converted is kept."
        raise ServerLostError(lost, advice) from error


def prefect_environment(settings: Settings, stack: Stack) -> dict[str, str]:
    """Variables to set before Prefect is imported, here or in a child.

    Prefect's console handler is silenced, because our own logger prints on the terminal: at ERROR it would still print
    the traceback of each failed task. Its records and those of the logger ``slmops`` reach the server nevertheless. The
    caller must set that logger's level, which is WARNING by default.
    """
    return {
        **_client_environment(settings, stack),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
        # A server that restarts is back within these 14 s, and a run waits minutes for a dead one by default. It is
        # worth waiting longer if other machines work for us.
        "PREFECT_CLIENT_MAX_RETRIES": "6" if settings.pools else "3",
    }


def _client_environment(settings: Settings, stack: Stack) -> dict[str, str]:
    return {
        **QUIET,
        "PREFECT_API_URL": stack.prefect_api_url,
        **({"PREFECT_UI_URL": settings.prefect_ui_url} if settings.prefect_ui_url else {}),
        "PREFECT_HOME": str(settings.home / "prefect"),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "slmops",
        # Our logger also talks outside of flows, where there is no run to attach a record to.
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",  # seconds; flows.automations counts on some in five minutes
    }


def _given(settings: Settings) -> dict[Server, str | None]:
    """The servers that a job needs, and where the settings say that they are; None: it is for us to start it."""
    return {"prefect": settings.prefect_api_url, "mlflow": settings.tracking_uri}


def _start(settings: Settings, servers: dict[Server, Daemon], name: Server, above: int = 0) -> None:
    """Start a server, in place of one that died or hangs, on the first free port higher than ``above``."""
    if name in servers:
        daemon.stop(servers.pop(name))
    first = {"prefect": settings.prefect_port, "mlflow": settings.mlflow_port, "worker": settings.prefect_port + 1}
    port = daemon.free_port(max(first[name], above + 1), [server.port for server in servers.values()])
    if port != first[name] and name in _PORTS:
        log.warning("port %d is taken: %s is at %d (%s sets another)", first[name], _TITLES[name], port, _PORTS[name])
    recipe = {"prefect": _prefect_command, "mlflow": _mlflow_command, "worker": _worker_command}[name]
    command, env = recipe(settings, servers, port)
    command = [sys.executable, "-m", *command]
    mark = str(settings.home / name)
    servers[name] = daemon.spawn(command, port=port, mark=mark, env=env, log=settings.logs / f"{name}.log")
    # Written before it answers: should this process be killed now, the next one still knows what it started.
    _write(settings, servers)


def _prefect_command(settings: Settings, _: dict[Server, Daemon], port: int) -> tuple[list[str], dict[str, str]]:
    folder = settings.home / "prefect"
    # Of a server that was killed: the next one would wait for ever for whatever has its process id by now.
    (folder / "concurrency_leases" / "expirations.lock").unlink(missing_ok=True)
    env = {
        **_clean_environment(),
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),  # where the UI looks for the API, whatever --port says
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(folder / "ui"),  # by default it writes into site-packages
        # Below its home. In memory, a restart would forget which run holds a slot.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    return ["prefect", "server", "start", "--host", HOST, "--port", str(port)], env


def _mlflow_command(settings: Settings, _: dict[Server, Daemon], port: int) -> tuple[list[str], dict[str, str]]:
    folder = settings.home / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    env = {
        **_clean_environment(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a queue with worker processes, for LLM judges
        "MLFLOW_ENABLE_AI_GATEWAY": "false",
    }
    storage = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    storage += ["--artifacts-destination", (folder / "artifacts").as_uri()]  # C:\\ would be a scheme
    # One line for each request would fill the disk of a server that runs for months.
    options = ["--workers", "1", "--uvicorn-opts", "--no-access-log"]
    return ["mlflow", "server", *storage, "--host", HOST, "--port", str(port), *options], env


def _clean_environment() -> dict[str, str]:
    """Ours without what is meant for other servers, such as a database: everything that we keep is below home."""
    ours = {key: value for key, value in os.environ.items() if not key.lstrip("_").startswith(("PREFECT_", "MLFLOW_"))}
    return {**ours, **QUIET}


def _wait_until_healthy(settings: Settings, servers: dict[Server, Daemon], name: Server) -> None:
    """Wait for a server that was just started. If another program took its port, start it on the next one."""
    log = settings.logs / f"{name}.log"
    while not _runs_well(name, servers, START_S):
        alive = daemon.leader(servers[name]) is not None
        said = children.last_words(log, 8)
        if alive or "already in use" not in said:
            what = f"did not answer within {START_S:.0f} s" if alive else "did not start"
            raise PrerequisiteError(f"The {_TITLES[name]} {what}: {said}", f"Its log: {log}")
        _start(settings, servers, name, above=servers[name].port)


def _runs_well(name: Server, servers: dict[Server, Daemon], within_s: float = RECOVER_S) -> bool:
    """Whether it is alive and answers. It is given time, because its starter may have been killed a moment ago."""
    deadline = time.monotonic() + within_s
    while name in servers and daemon.leader(servers[name]) is not None and time.monotonic() < deadline:
        if daemon.healthy(servers[name], *_HEALTH[name]):
            return True
        time.sleep(0.1)
    return False


def _work(settings: Settings, stack: Stack, servers: dict[Server, Daemon], started: list[Server]) -> None:
    """Register the deployments, and start a worker unless one runs."""
    log = settings.logs / "deploy.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, str(REGISTER), str(ROOT / DEPLOYMENTS)]
    ended = children.run(command, log=log, timeout_s=DEPLOY_S, env=_worker_environment(settings, stack), cwd=ROOT)
    if ended.returncode != 0:
        raise WorkError(f"Prefect could not register the deployments: {children.last_words(log)}", f"Its log: {log}")
    if not _runs_well("worker", servers):
        _start(settings, servers, "worker")
        started.append("worker")
        _wait_until_healthy(settings, servers, "worker")


def _worker_command(settings: Settings, servers: dict[Server, Daemon], port: int) -> tuple[list[str], dict[str, str]]:
    env = {
        **os.environ,
        **_worker_environment(settings, _stack(settings, servers)),
        "PREFECT_WORKER_WEBSERVER_HOST": HOST,
        "PREFECT_WORKER_WEBSERVER_PORT": str(port),
    }
    command = ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--limit", "1"]
    return [*command, "--install-policy", "never", "--with-healthcheck"], env


def _worker_environment(settings: Settings, stack: Stack) -> dict[str, str]:
    """The settings of this process, for flow runs that share neither its ``.env`` nor its folder."""
    variables = _client_environment(settings, stack)
    for key, value in settings.model_dump(exclude_none=True).items():
        plain = value.get_secret_value() if isinstance(value, SecretStr) else value
        variables[f"SLMOPS_{key.upper()}"] = json.dumps(plain) if isinstance(plain, tuple) else str(plain)
    return variables


def _problem(name: Server, url: str) -> str | None:
    """Why a server that the user named cannot be used; None if it can."""
    if not url.startswith(("http://", "https://")):
        return None  # a database, or a service with its own protocol: MLflow will say what is wrong with it
    path, body = _HEALTH[name]
    return daemon.problem(url.rstrip("/") + path.removeprefix("/api"), body, given=True)


def _status(name: Server, given: str | None, shown: str | None, servers: dict[Server, Daemon]) -> ServerStatus:
    if given is not None:
        url = _root(given) if name == "prefect" else given
        return ServerStatus(url=shown or url, ok=_problem(name, given) is None)
    if name not in servers:
        return ServerStatus(url=None, ok=False)
    return ServerStatus(url=shown or servers[name].url, ok=daemon.healthy(servers[name], *_HEALTH[name]))


def _stack(settings: Settings, servers: dict[Server, Daemon]) -> Stack:
    api_url = settings.prefect_api_url or f"{servers['prefect'].url}/api"
    tracking = settings.tracking_uri or servers["mlflow"].url
    return Stack(
        prefect_url=settings.prefect_ui_url or _root(api_url),
        mlflow_url=settings.mlflow_ui_url or tracking,
        prefect_api_url=api_url,
        tracking_uri=tracking,
    )


def _root(api_url: str) -> str:
    return api_url.rstrip("/").removesuffix("/api")


def _state(settings: Settings) -> Path:
    return settings.home / "stack.json"


def _read(settings: Settings) -> dict[Server, Daemon]:
    try:
        return _SERVERS.validate_json(_state(settings).read_bytes())
    except (OSError, ValueError):
        return {}


def _write(settings: Settings, servers: dict[Server, Daemon]) -> None:
    if servers:
        write_atomic(_state(settings), _SERVERS.dump_json(servers, indent=2).decode())
    else:
        _state(settings).unlink(missing_ok=True)
