"""Print what serving costs against calling the runtime in process, and what live switches cost the users.

    SLMOPS_HOME=FOLDER python benchmarks/serving.py NAME VARIANT OTHER

The home holds a finished job of the model NAME with both variants accepted. VARIANT is timed; then the service switches
ten times between the two while clients keep asking.
"""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from slmops.core.settings import Settings
from slmops.evaluation import prompts, speed
from slmops.foundry.layout import model_name
from slmops.processes import children, daemon

SLMOPS = str(Path(sys.executable).with_name("slmops"))
DIRECT = str(Path(__file__).with_name("direct.py"))
ROUNDS, REPETITIONS, TOKENS = 8, 6, 48
SWITCHES, CLIENTS = 10, 4
READY_S = 120.0


def main(name: str, variant: str, other: str) -> None:
    """Promote, serve, measure, switch, stop."""
    settings = Settings()
    for one in (other, variant):  # so that there is a version to go back to
        _slmops("promote", name, "--precision", one, "--force", "a benchmark")
    port = daemon.free_port(8080, [])
    log = settings.logs / "bench-serve.log"
    with log.open("wb") as out:
        service = subprocess.Popen([SLMOPS, "serve", name, "--port", str(port)], stdout=out, stderr=out)
    try:
        version = _until(port, None)["version"]
        _overhead(name, f"{model_name(name, variant)}:{version}", port, settings)
        _switches(name, port)
    finally:
        service.terminate()
        service.wait(60)


def _overhead(name: str, foundry_id: str, port: int, settings: Settings) -> None:
    folder = settings.deployed / "models" / "slmops" / foundry_id.replace(":", "-")
    context = json.loads((folder / "genai_config.json").read_text())["model"]["context_length"]
    [text] = prompts.of_lengths([speed.HEADLINE_TOKENS], context, folder).values()
    arguments = [str(settings.deployed), str(folder), foundry_id, text, str(TOKENS), str(REPETITIONS)]
    env = {**os.environ, **children.STEADY_MALLOC}  # as the service runs its processes
    served: dict[str, list[float]] = {"ttft_ms": [], "itl_ms": []}
    direct: dict[str, list[float]] = {"ttft_ms": [], "itl_ms": []}

    def in_process() -> None:
        done = subprocess.run([sys.executable, DIRECT, *arguments], stdout=subprocess.PIPE, check=True, env=env)
        measured = json.loads(done.stdout.splitlines()[-1])
        direct["ttft_ms"] += measured["ttft_ms"]
        direct["itl_ms"] += [1e3 / rate for rate in measured["decode_tok_s"]]

    def over_http() -> None:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for number in range(2 + REPETITIONS):
            first, each = _timed(client, name, text)
            if number >= 2:  # as in process, the first two warm up
                served["ttft_ms"].append(first)
                served["itl_ms"].append(each)

    for number in range(ROUNDS):
        for turn in (in_process, over_http) if number % 2 else (over_http, in_process):
            turn()
    print(
        f"\nserving against the runtime in process: {foundry_id}, {speed.HEADLINE_TOKENS} prompt and {TOKENS} output "
        f"tokens, medians of {ROUNDS} interleaved rounds of {REPETITIONS}"
    )
    for figure in served:
        mine, theirs = median(served[figure]), median(direct[figure])
        print(f"  {figure:8} served {mine:7.2f}  in process {theirs:7.2f}  ratio {mine / theirs:.3f}")


def _timed(client: http.client.HTTPConnection, name: str, text: str) -> tuple[float, float]:
    """Time to first token and inter-token latency of one streamed request, in ms."""
    stamps = []
    tokens = 0
    started = time.perf_counter()
    response = _ask(client, name, text, TOKENS, stream=True)
    for line in response:
        if line.startswith(b"data: {"):
            now = time.perf_counter()
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                stamps.append(now)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return (stamps[0] - started) * 1e3, (stamps[-1] - stamps[0]) * 1e3 / (tokens - 1)


def _ask(
    client: http.client.HTTPConnection, name: str, text: str, tokens: int, *, stream: bool
) -> http.client.HTTPResponse:
    body = {
        "model": name,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }
    client.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return client.getresponse()


def _switches(name: str, port: int) -> None:
    stop = threading.Event()
    outcomes: Counter[str] = Counter()
    versions: Counter[str] = Counter()
    slowest = [0.0] * CLIENTS

    def keep_asking(number: int) -> None:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        turn = number
        while not stop.is_set():
            turn += 1
            started = time.perf_counter()
            try:
                response = _ask(client, name, "Count from one to ten.", 16, stream=bool(turn % 2))
                body = response.read()
                whole = b"[DONE]" in body if turn % 2 else b'"usage"' in body
                outcomes["ok" if response.status == 200 and whole and b'"error"' not in body else "failed"] += 1
                versions[response.headers.get("x-slmops-version", "none")] += 1
            except (OSError, http.client.HTTPException):
                outcomes["failed"] += 1
                client.close()
            slowest[number] = max(slowest[number], time.perf_counter() - started)

    clients = [threading.Thread(target=keep_asking, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    started = time.monotonic()
    for _ in range(SWITCHES):
        before = _until(port, None)["version"]
        _slmops("rollback", name)
        _until(port, before)
    took = time.monotonic() - started
    stop.set()
    for client in clients:
        client.join()
    print(
        f"\n{SWITCHES} live switches under {CLIENTS} clients, {took:.0f} s: {outcomes['ok']} requests answered, "
        f"{outcomes['failed']} failed; by version {dict(versions)}; the slowest took {max(slowest):.1f} s"
    )


def _until(port: int, before: int | None) -> dict[str, Any]:
    """What /health says once the service answers, with another version than ``before``."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            client.request("GET", "/health")
            response = client.getresponse()
            health: dict[str, Any] = json.loads(response.read())
            if response.status == 200 and health["version"] != before:
                return health
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"the service did not get ready, or did not switch from version {before}, in {READY_S:.0f} s")


def _slmops(*arguments: str) -> None:
    done = subprocess.run([SLMOPS, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
