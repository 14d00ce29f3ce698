"""A service in a process of its own, and OpenAI's client for it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil

from slmops.foundry.versions import Installed
from tests import fleets

TOKEN = "secret"
HI: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
ASKED: dict[str, Any] = {"model": "bot", "messages": HI, "max_tokens": 8}
SERVICE = "import sys; from tests import fleets; fleets.serve(*sys.argv[1:])"


@dataclass
class Service:
    """A service in a process of its own."""

    process: subprocess.Popen[bytes]
    home: Path
    url: str
    client: openai.OpenAI

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    def worker(self) -> psutil.Process:
        [one] = fleets.workers(self.process.pid)
        return one

    def answers(self) -> bool:
        return self.client.chat.completions.create(**ASKED).usage.completion_tokens > 0


def start(installed: Installed, home: Path, **options: Any) -> Service:
    home.mkdir(exist_ok=True)
    path = home / "serving.json"
    path.unlink(missing_ok=True)
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVICE, str(home), installed.model_dump_json(), json.dumps(options)],
            stderr=log,
            env={**os.environ, "SLMOPS_SERVE_TOKEN": TOKEN},
        )
    for _ in range(600):
        if path.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert path.exists(), (home / "log").read_text()
    url = json.loads(path.read_text())["url"]
    return Service(process, home, url, openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0, timeout=30))


def stop(service: Service) -> None:
    """End it as the system does; nothing may be left."""
    service.client.close()
    children = psutil.Process(service.process.pid).children(recursive=True)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(20) == 0, (service.home / "log").read_text()
    assert not any(child.is_running() for child in children)
    assert not (service.home / "serving.json").exists()
    assert "Traceback" not in (service.home / "log").read_text()
