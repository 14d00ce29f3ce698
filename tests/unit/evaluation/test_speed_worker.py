"""The turn's own process, with a runtime and a clock that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmops import foundry
from slmops.evaluation import speed_worker
from slmops.evaluation.speed_worker import Cell
from tests.measured import word_tokenizer


class Runtime:
    """Stands in for :mod:`slmops.foundry.runtime`; each request takes so many seconds of its own clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.events: list[str] = []
        clocks = dict.fromkeys(("perf_counter", "monotonic", "process_time"), lambda: self.now)
        self.time = SimpleNamespace(**clocks, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def manager(self, _: Any) -> None:
        return None

    local_catalog = manager

    def add(self, *_args: Any) -> Any:
        return SimpleNamespace(load=lambda: self.events.append("load"), unload=lambda: self.events.append("unload"))

    def ask(self, _model: Any, _messages: list[dict[str, str]], *, max_tokens: int) -> Any:
        self.events.append(f"ask {max_tokens}")
        self.sleep(self.seconds)
        times = {"first_s": self.seconds / 2, "last_s": self.seconds, "total_s": self.seconds}
        return SimpleNamespace(prompt_tokens=5, completion_tokens=max_tokens, **times)


CELLS = (
    Cell(prompt_tokens=5, output_tokens=16, text="a b c", repetitions=3, seconds=1.0),
    Cell(prompt_tokens=9, output_tokens=32, text="a b c d e f g", repetitions=2),
)


def handle(folder: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, **asked: Any) -> speed_worker.SpeedResult:
    word_tokenizer(folder)
    (folder / "genai_config.json").write_text(json.dumps({"model": {}}))
    monkeypatch.setattr(foundry, "runtime", runtime, raising=False)
    monkeypatch.setattr(speed_worker, "time", runtime.time)
    request = speed_worker.SpeedRequest(home=folder, folder=folder, foundry_id="x:1", cells=CELLS, **asked)
    return speed_worker.handle(request)


# As many as fit; the last ends after it; none begins when it is over; at least so many.
@pytest.mark.parametrize(("seconds", "expected"), [(0.03125, 32), (0.3, 4), (0.25, 4), (2.0, 3)])
def test_a_cell_is_repeated_until_both_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, expected: int
) -> None:
    found = handle(tmp_path, Runtime(seconds), monkeypatch)
    assert [timed.cell for timed in found.timed] == [0] * expected + [1] * 2
    assert found.measured[1] - found.measured[0] == pytest.approx((expected + 2) * seconds)
    assert found.energy_tokens == expected * (5 + 16) + 2 * (5 + 32)


@pytest.mark.parametrize("sessions", [(), (1, 2)])
def test_several_sessions_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sessions: tuple[int, ...]) -> None:
    runtime = Runtime(0.5)
    found = handle(tmp_path, runtime, monkeypatch, sessions=sessions)
    asked = ["ask 16"] * 2 + ["ask 16"] * 3 + ["ask 32"] * 2  # the first two warm up
    assert runtime.events == ["load", *asked, *["ask 8"] * sum(sessions), "unload"]
    assert found.throughput.keys() == set(sessions)
    assert (found.unloaded is None) == bool(sessions)
    assert found.measured[1] - found.measured[0] == 2.5
