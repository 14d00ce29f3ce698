"""docker-compose.yml in containers: a project of its own, beside any other, with a tiny model to retrain in /data."""

import json
import shutil
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests import making, retraining
from tests.compose import APP, FILE, ROOT, free_ports

IMAGE = yaml.safe_load(FILE.read_text(encoding="utf-8"))["x-slmops"]["image"]
DOCKER = shutil.which("docker") or "docker"
NAME, TOKEN = "router", "token-of-the-tests"
POLICY = 'gates = [{metric = "accuracy", of = "difference", to = "baseline", min = -1, inconclusive = "accept"}]'
"""Whatever is made is promoted, for what a tiny model learns differs from seed to seed."""
RUN_S = 300.0
UP_S = 300.0
_DIGEST = f"find {' '.join(APP)} -type f -not -path '*/__pycache__/*' | LC_ALL=C sort | xargs sha256sum | sha256sum"


def missing() -> str | None:
    """Why nothing can be run here; None if it can."""
    if shutil.which(DOCKER) is None:
        return "there is no command docker"
    asked = subprocess.run([DOCKER, "info"], capture_output=True, text=True, check=False)
    return None if asked.returncode == 0 else f"no Docker engine answers: {asked.stderr.strip()[-200:]}"


def docker(*arguments: str, timeout_s: float = UP_S) -> str:
    """What a command says; an AssertionError with all that it has said if it fails."""
    ended = subprocess.run(
        [DOCKER, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ended.returncode == 0, f"docker {' '.join(arguments)}: {ended.stdout[-5000:]}"
    return ended.stdout


def build() -> None:
    """Build the image, unless there is one of this very checkout."""
    here = subprocess.run(["/bin/sh", "-c", _DIGEST], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    asked = [DOCKER, "run", "--rm", "--network", "none", IMAGE, "sh", "-c", _DIGEST]
    if subprocess.run(asked, capture_output=True, text=True, check=False).stdout != here:
        docker("build", "--file", "deployments/Dockerfile", "--tag", IMAGE, ".", timeout_s=1200)


class Containers:
    """The services of the file; ``folder`` holds the variables and, as /data, a model with its training data."""

    def __init__(self, project: str, folder: Path) -> None:
        self.project = project
        self.folder = folder
        self.data = folder / "data"
        self.data.mkdir()
        self.prefect, self.mlflow, self.serve = (f"http://127.0.0.1:{port}" for port in free_ports(3))
        ports = {name: url.rpartition(":")[2] for name, url in vars(self).items() if str(url).startswith("http")}
        variables = {
            "POSTGRES_PASSWORD": "p@ss w#rd",
            "SLMOPS_SERVE_TOKEN": TOKEN,
            "SLMOPS_SERVE_MODEL": NAME,
            "SLMOPS_DATA": str(self.data),
            **{f"SLMOPS_{name.upper()}_PORT": port for name, port in ports.items()},
        }
        environment = folder / "env"
        environment.write_text("".join(f"{name}='{value}'\n" for name, value in variables.items()))
        self._options = ["compose", "--project-name", project, "--env-file", str(environment)]
        retraining.base(self.data / "model")
        retraining.write_data(self.data / "tickets")
        making.evaluation_set(self.data)

    def __call__(self, *arguments: str, timeout_s: float = UP_S) -> str:
        return docker(*self._options, "--file", str(FILE), *arguments, timeout_s=timeout_s)

    def up(self, *arguments: str) -> None:
        self("up", "--detach", "--wait", *arguments)

    def let_read(self) -> None:
        """The user in the containers is another one."""
        for path in (self.folder, *self.folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)

    def retraining(self, seed: int) -> dict[str, Any]:
        """What a retraining of seconds is asked for; with the seed of an earlier one it has nothing to do."""
        training = retraining.TRAINING.model_copy(update={"seed": seed})
        policy = self.data / "lenient.toml"
        policy.write_text(POLICY)
        asked = retraining.request(self.data / "model", self.data / "tickets", NAME, training=training, policy=policy)
        self.let_read()
        request: dict[str, Any] = json.loads(asked.model_dump_json(exclude_unset=True).replace(str(self.data), "/data"))
        return {"request": request}

    def retrain(self, seed: int) -> str:
        """Start a retraining by the model's own deployment; returns the run's id."""
        return self.start("retrain", self.retraining(seed), NAME)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask Prefect, once it and its database are there."""
        method = "GET" if body is None else "POST"

        def answer() -> httpx.Response | None:
            with suppress(httpx.TransportError):
                response = httpx.request(method, f"{self.prefect}/api{path}", json=body, timeout=30, trust_env=False)
                return response if response.status_code < 500 else None
            return None

        response = making.until(answer, "Prefect answers", 120)
        assert response is not None
        assert response.is_success, response.text
        return response.json()

    def start(self, flow: str, parameters: dict[str, Any], model: str = "") -> str:
        """Start a run of a flow's deployment, or of that of a model; returns its id."""
        found = self.ask(f"/deployments/name/{flow}/{flow}{model and f'-{model}'}")
        run = self.ask(f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})
        return str(run["id"])

    def state(self, run: str) -> str:
        return str(self.ask(f"/flow_runs/{run}")["state_type"])

    def finish(self, run: str, state: str = "COMPLETED", within_s: float = RUN_S) -> None:
        """Wait until a run has ended in a state."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", state}  # from a crash it may go on
        making.until(lambda: self.state(run) in ends, f"{run} ends", within_s)
        assert self.state(run) == state, self.told(run)

    def wait_for_task(self, run: str, name: str) -> None:
        """Wait until a task of a run is at work."""
        asked = {"flow_runs": {"id": {"any_": [run]}}, "task_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}

        def at_work() -> bool:
            assert self.state(run) not in ("COMPLETED", "FAILED"), self.told(run)
            return any(name in one["name"] for one in self.ask("/task_runs/filter", asked))

        making.until(at_work, f"{name} of {run} is at work", RUN_S)

    def told(self, run: str) -> str:
        """States and last lines of a run's log."""
        states = [f"{one['name']}: {one['message']}" for one in self.ask(f"/flow_run_states/?flow_run_id={run}")]
        asked = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_DESC", "limit": 30}
        lines = [one["message"] for one in reversed(self.ask("/logs/filter", asked))]
        return "\n".join([*lines, *states])

    def slots_taken(self) -> int:
        """Of all deployments."""
        limits = [one.get("global_concurrency_limit") for one in self.ask("/deployments/filter", {})]
        return sum(limit["active_slots"] for limit in limits if limit)

    def job(self) -> str:
        """Start a quick job, which makes a version; returns the run's id."""
        asked = {"model": "/data/model", "name": NAME, "precision": ["fp32"], "evaluation_set": "/data/three.jsonl"}
        return self.start("optimize", {"job": {**asked, "quick": True, "upload": True}})

    def champion(self) -> int | None:
        query = {"name": NAME, "alias": "champion"}
        url = f"{self.mlflow}/api/2.0/mlflow/registered-models/alias"
        response = httpx.get(url, params=query, timeout=30, trust_env=False)
        return int(response.json()["model_version"]["version"]) if response.is_success else None

    def answer(self, token: str = TOKEN) -> httpx.Response:
        """Ask the service."""
        body = {"model": NAME, "messages": [{"role": "user", "content": "Who repairs the login?"}], "max_tokens": 4}
        return httpx.post(
            f"{self.serve}/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {token}"},
            timeout=60,
            trust_env=False,
        )

    def running(self, service: str) -> list[str]:
        """The containers of a service."""
        return self("ps", "--quiet", service).split()

    def crash(self, container: str) -> None:
        """End all processes of a container by SIGKILL, as if it had run out of memory; Docker starts it again."""
        before = docker("inspect", "--format", "{{.RestartCount}}", container)
        subprocess.run([DOCKER, "exec", container, "sh", "-c", "kill -9 -1"], capture_output=True, check=False)
        again = partial(docker, "inspect", "--format", "{{.RestartCount}}", container)
        making.until(lambda: again() != before, f"{container} starts again")
