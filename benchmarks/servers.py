"""Print what the two servers take: flow runs and variants a minute, looks at the registry and artifacts a second.

    python benchmarks/servers.py [SECONDS]

With SLMOPS_PREFECT_API_URL and SLMOPS_TRACKING_URI those servers are asked, else local ones on SQLite are started in a
home of their own. Servers and clients share this machine's cores, so what is printed is less than what the servers take
by themselves. A flow run here has the ten task runs of a job with two variants, which do nothing; a variant is what
slmops logs of one: a run with 60 parameters, 80 metrics and 12 small files.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slmops.tracking.client import talking

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from slmops.core import machine
from slmops.core.settings import Settings
from slmops.local import stack

CLIENTS = (1, 4)
FILE_MB = 256
FLOWS = """
import sys, time
from prefect import flow, task

@task
def step(number: int) -> None: ...

@flow
def job() -> None:
    for number in range(10):
        step(number)

job()
deadline, count = time.monotonic() + float(sys.argv[1]), 0
while time.monotonic() < deadline:
    job()
    count += 1
print(count)
"""


def main(seconds: float) -> None:
    """Measure, print, clean up."""
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home), prefect_port=4900, mlflow_port=5900)
        running = stack.up(settings)
        try:
            here = machine.hardware()
            print(f"{here.processor}, {here.cores} cores, {here.memory_gb} GB, {here.system}")
            for clients in CLIENTS:
                print(f"\n{clients} client(s) at once")
                print(f"  flow runs of 10 tasks a minute  {_flow_runs(settings, running, clients, seconds):8.0f}")
                print(f"  variants logged a minute        {_variants(running.tracking_uri, clients, seconds):8.0f}")
                print(f"  looks at the champion a second  {_looks(running.tracking_uri, clients, seconds):8.0f}")
                up, down = _artifacts(running.tracking_uri, clients)
                print(f"  artifacts up, MB/s              {up:8.0f}\n  artifacts down, MB/s            {down:8.0f}")
        finally:
            stack.down(settings)


def _flow_runs(settings: Settings, running: stack.Stack, clients: int, seconds: float) -> float:
    env = {**os.environ, **stack.prefect_environment(settings, running)}
    command = [sys.executable, "-c", FLOWS, str(seconds)]
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(clients)]
    return sum(int(process.communicate()[0]) for process in started) * 60 / seconds


def _variants(uri: str, clients: int, seconds: float) -> float:
    client = MlflowClient(uri)
    experiment = client.create_experiment(f"servers-{time.time_ns()}")

    def log(_: int) -> int:
        deadline, count = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            run = client.create_run(experiment).info.run_id
            now = int(time.time() * 1000)
            metrics = [Metric(f"metric_{number}", float(number), now, 0) for number in range(80)]
            client.log_batch(run, metrics, [Param(f"param_{number}", "value") for number in range(60)])
            for number in range(12):
                client.log_text(run, "x" * 2000, f"file_{number}.json")
            client.set_terminated(run)
            count += 1
        return count

    with talking(uri), ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(log, range(clients))) * 60 / seconds


def _looks(uri: str, clients: int, seconds: float) -> float:
    """What each service asks every few seconds."""
    name = f"servers-{time.time_ns()}"
    MlflowClient(uri).create_registered_model(name)

    def look(_: int) -> int:
        client = MlflowClient(uri)
        deadline, count = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            client.get_registered_model(name)
            count += 1
        return count

    with talking(uri), ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(look, range(clients))) / seconds


def _artifacts(uri: str, clients: int) -> tuple[float, float]:
    """MB/s of all clients together, up and down."""
    client = MlflowClient(uri)
    experiment = client.create_experiment(f"artifacts-{time.time_ns()}")
    with talking(uri), tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(clients) as pool:
        file = Path(scratch) / "weights"
        file.write_bytes(os.urandom(FILE_MB * 10**6))
        runs = [client.create_run(experiment).info.run_id for _ in range(clients)]
        started = time.monotonic()
        list(pool.map(lambda run: client.log_artifact(run, str(file)), runs))
        up_s = time.monotonic() - started
        file.unlink()
        started = time.monotonic()
        for number in range(clients):
            (Path(scratch) / str(number)).mkdir()
        list(pool.map(lambda one: client.download_artifacts(one[1], file.name, f"{scratch}/{one[0]}"), enumerate(runs)))
        down_s = time.monotonic() - started
    return clients * FILE_MB / up_s, clients * FILE_MB / down_s


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 20)
