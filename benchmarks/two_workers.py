"""Print how long a job takes on one worker, and on two: each is a process with a home and a core of its own.

    python benchmarks/two_workers.py CHECKPOINT

The job is that of `slmops run --quick` with fp32, int8 and int4, in six parts. The servers are local ones on SQLite;
they, and the job itself, run on the same cores. So what is printed is less than what two machines give. Linux only.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from slmops.core import machine
from slmops.core.settings import Settings
from slmops.local import stack

PRECISIONS = ("fp32", "int8", "int4")
POOL = "measured"


def start_worker(core: int, folder: Path, servers: stack.Stack) -> subprocess.Popen[bytes]:
    """A worker of the pool, which is made if it is missing, on one core."""
    own = {name: str(folder / name.lower()) for name in ("HOME", "TMPDIR", "PREFECT_HOME", "SLMOPS_HOME")}
    (folder / "tmpdir").mkdir(parents=True)
    command = ["taskset", "--cpu-list", str(core), sys.executable, "-m", "prefect", "worker", "start"]
    command += ["--pool", POOL, "--type", "process", "--limit", "1", "--install-policy", "never"]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **own, **addresses(servers), "PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def addresses(servers: stack.Stack) -> dict[str, str]:
    return {
        "PREFECT_API_URL": servers.prefect_api_url,
        "SLMOPS_PREFECT_API_URL": servers.prefect_api_url,
        "SLMOPS_TRACKING_URI": servers.tracking_uri,
    }


def measure(model: Path, workers: int, folder: Path) -> float:
    """Seconds that the job takes, with nothing in any home before."""
    settings = Settings(home=folder / "job", prefect_port=4950, mlflow_port=5950)
    pools = json.dumps([{"name": POOL, "memory_gb": 64}])
    asked_for = [word for precision in PRECISIONS for word in ("--precision", precision)]
    with ExitStack() as ends:
        ends.callback(stack.down, settings)
        servers = stack.up(settings)
        for core in range(workers):
            ends.callback(start_worker(core, folder / str(core), servers).terminate)
        time.sleep(20)  # until all workers listen
        began = time.monotonic()
        subprocess.run(
            [str(Path(sys.executable).with_name("slmops")), "run", "--model", str(model), "--quick", *asked_for],
            env={**os.environ, **addresses(servers), "SLMOPS_HOME": str(settings.home), "SLMOPS_POOLS": pools},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return time.monotonic() - began


def main(model: Path) -> None:
    """Measure both, print, clean up."""
    here = machine.hardware()
    print(f"{here.processor}, {here.cores} cores, {here.memory_gb} GB, {here.system}")
    seconds = []
    for workers in (1, 2):
        folder = Path(tempfile.mkdtemp(prefix="workers-"))
        try:
            seconds.append(measure(model, workers, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{workers} worker(s): {seconds[-1]:.0f} s")
    print(f"ratio: {seconds[0] / seconds[1]:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
