"""A clock that is set back or forward must not end a wait, a budget or a watch: only stamps are taken from it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
WALL_CLOCK = re.compile(r"time\.time\(|time\.time_ns\(|datetime\.now\(|datetime\.utcnow\(")
STAMPS = {
    "flows/retrain.py",  # until when a promotion waits, for other processes
    "slmops/cli/command.py",  # of crash logs
    "slmops/cli/terminal.py",  # of log lines
    "slmops/conversion/convert.py",
    "slmops/tracking/exchange.py",  # against the time of files, which the same clock gave; a cache is all it empties
    "slmops/foundry/service_worker.py",
    "slmops/core/locks.py",
    "slmops/checkpoints/chat_template.py",  # chat templates ask for the date
    "slmops/foundry/prompt_template.py",
    "slmops/tracking/client.py",
    "slmops/tracking/registry.py",
    "slmops/tracking/training.py",
    "slmops/serving/backend.py",
    "slmops/training/finetune.py",
    "tasks/news.py",
}


def test_nothing_is_timed_by_the_wall_clock() -> None:
    sources = [path for folder in ("slmops", "tasks", "flows") for path in (ROOT / folder).rglob("*.py")]
    asking = {str(path.relative_to(ROOT)) for path in sources if WALL_CLOCK.search(path.read_text(encoding="utf-8"))}
    assert asking - STAMPS == set()
    for path in sources:
        for name in re.findall(r"(\w+) = time\.(?:time|monotonic)\(\) \+", path.read_text(encoding="utf-8")):
            assert f"{name} = time.time() +" not in path.read_text(encoding="utf-8"), path
