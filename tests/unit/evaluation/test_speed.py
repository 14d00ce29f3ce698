"""Rounds, turns and the grid without a process behind a turn; and that process with a made-up runtime and clock."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmops import foundry
from slmops.core import machine
from slmops.core.errors import EvaluationError, SlmopsError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Registration, Variant
from slmops.evaluation import speed
from slmops.evaluation.speed import Cell, Peer, Speed
from slmops.foundry.layout import Staged
from slmops.processes.children import Finished
from tests.measured import turn, word_tokenizer
from tests.values import variant

NAME = "bot"
MEMORY = [(1.0, 50.0), (2.0, 60.0)]


class Bench:
    """Variants without weights in Foundry Local's cache, and a stand-in for the processes that time them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.work = settings.work(NAME)
        self.calls: list[tuple[str, speed.SpeedRequest, dict[str, Any]]] = []
        self.failing: dict[int, Exception] = {}  # number of a process to what it raises
        # Seconds of the calibration loops: three before all turns, one before and one after each; then always 1.
        self.loops: list[float] = []
        self.ends: list[Any] = []

    def make(self, name: str) -> tuple[Variant, Registration]:
        folder = self.settings.foundry / "models" / "slmops" / f"{NAME}-{name}-generic-cpu-1"
        word_tokenizer(folder)
        config = {"model": {"vocab_size": 100, "context_length": 2048, "eos_token_id": 2}, "search": {}}
        (folder / "genai_config.json").write_text(json.dumps(config))
        registration = Registration(foundry_id=f"{NAME}-{name}-generic-cpu:1", path=folder, answer="Yes.")
        return variant(self.settings.variants / f"{name}-0123", name), registration

    def measure(self, names: str, **asked: Any) -> dict[str, Speed | SlmopsError]:
        """A job with variants of these names, of a letter each."""
        return speed.measure([self.make(name) for name in names], NAME, Job(model="m", **asked), self.settings)

    def call(self, handle: Any, request: speed.SpeedRequest, **options: Any) -> tuple[speed.SpeedResult, Finished]:
        assert handle is speed.handle
        assert (request.folder / "tokenizer.json").is_file()
        assert request.gguf or request.home in request.folder.parents
        self.ends.append(json.loads((request.folder / "genai_config.json").read_text())["model"]["eos_token_id"])
        number = len(self.calls)
        self.calls.append((request.foundry_id.removeprefix(f"{NAME}-").split("-")[0], request, options))
        if number in self.failing:
            raise self.failing[number]
        ended = Finished(returncode=0, seconds=1, memory=MEMORY)
        return turn(load_s=float(number)).measured, ended

    @property
    def order(self) -> str:
        return "".join(name for name, _, _ in self.calls)

    @property
    def requests(self) -> list[speed.SpeedRequest]:
        return [request for _, request, _ in self.calls]


@pytest.fixture
def bench(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(settings)
    monkeypatch.setattr(speed.children, "call", made.call)
    monkeypatch.setattr(speed, "calibrate", lambda: made.loops.pop(0) if made.loops else 1.0)
    return made


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def turns(found: Speed | SlmopsError) -> list[tuple[float, bool]]:
    """Number of the process and whether it was disturbed, of each turn."""
    return [(turn.measured.load_s, turn.disturbed) for turn in found.turns]


@pytest.mark.parametrize(
    ("names", "quick", "loops", "order", "expected"),
    [
        ("", False, [], "", []),
        ("abc", False, [], "abc" * 3, [[(n, False), (n + 3, False), (n + 6, False)] for n in range(3)]),
        ("ab", True, [], "ab", [[(0, False)], [(1, False)]]),
        # A disturbed turn is repeated once: a quarter slower than the fastest of the job is quiet.
        ("a", True, [1, 1, 1, 1.25, 1.25], "a", [[(0, False)]]),
        ("a", True, [1, 1, 1, 1, 1.26, 1, 1], "aa", [[(1, False)]]),
        ("a", True, [1, 1, 1, 1.26, 1, 1, 1], "aa", [[(1, False)]]),
        ("a", True, [1, 1, 1, 2, 2, 1, 1.3], "aa", [[(1, True)]]),
        ("a", True, [2, 1, 3, 1, 1.2], "a", [[(0, False)]]),  # the fastest of the first loops counts
        ("a", True, [2, 2, 2, 1, 1], "a", [[(0, False)]]),  # a turn faster than all before
        ("a", True, [2, 2, 2, 1, 2, 1, 1], "aa", [[(1, False)]]),  # busy by what the turn itself shows
        # Turns before the machine grew quiet are flagged, too.
        (
            *("ab", False, [2, 2, 2, 2, 2, 2, 2, 1, 1], "ab" * 3),
            [[(n, True), (n + 2, False), (n + 4, False)] for n in (0, 1)],
        ),
    ],
)
def test_rounds_interleave_and_a_disturbed_turn_is_repeated(
    bench: Bench, names: str, quick: bool, loops: list[float], order: str, expected: list[list[tuple[float, bool]]]
) -> None:
    bench.loops = [*loops]
    found = bench.measure(names, quick=quick, output_lengths=[8, 64])
    assert bench.order == order
    assert found.keys() == set(names)
    assert [turns(found[name]) for name in names] == expected
    if quick:
        assert {(request.sessions, request.drop_cache) for request in bench.requests} == {((), False)}  # a warm load
        assert loops == [] or found["a"].turns[0].calibration_s == tuple(loops[-2:])


def test_what_a_turn_is_asked_for_and_what_is_kept_of_it(bench: Bench) -> None:
    for name in "ab":
        bench.make(name)
    before = files(bench.settings.foundry)
    found = bench.measure("ab", prompt_lengths=[32, 128])
    # Several sessions take memory and time, and a cold load needs its cache dropped: once is enough.
    first, later = ((1, 2, 4), True), ((), False)
    assert [(request.sessions, request.drop_cache) for request in bench.requests] == [first] * 2 + [later] * 4
    assert bench.ends == [[99]] * 6  # so that answers do not end early
    for name, request, options in bench.calls:
        assert options["log"] == bench.settings.logs / NAME / f"{name}.speed.log"
        assert (options["timeout_s"], options["error"]) == (bench.settings.evaluation_timeout_s, EvaluationError)
        assert request.home == bench.work / f"{name}-speed"
        assert [(cell.prompt_tokens, cell.output_tokens) for cell in request.cells] == [(128, 16), (32, 16)]
    for one in found.values():
        assert one.cells == bench.requests[0].cells
        assert one.cores == machine.hardware().cores
        assert [list(turn.memory) for turn in one.turns] == [MEMORY] * 3
        assert [turn.calibration_s for turn in one.turns] == [(1, 1)] * 3
    # Nothing is left of the staged variants, and what is deployed is as it was.
    assert not files(bench.work)
    assert files(bench.settings.foundry) == before


def test_a_peer_has_its_turn_in_each_round_with_the_same_prompts_and_one_session(bench: Bench) -> None:
    made = bench.make("a")
    file = bench.settings.home / "Q8_0.gguf"
    peer = Peer(name="P", file=file, folder=made[1].path, context_length=2048)
    bench.failing[5] = EvaluationError("It broke.")
    found = speed.measure([made], NAME, Job(model="m"), bench.settings, [peer])
    assert bench.order == "aP" * 3
    ours, theirs = bench.requests[0], bench.requests[1]
    assert (ours.cells, ours.sessions, ours.gguf) == (theirs.cells, (1, 2, 4), None)
    assert (theirs.sessions, theirs.drop_cache, theirs.gguf, theirs.folder) == ((), True, file, made[1].path)
    assert isinstance(found["a"], Speed)
    assert found["P"] == bench.failing[5]


def test_a_repeated_turn_is_asked_for_the_same(bench: Bench) -> None:
    bench.loops = [1, 1, 1, 2, 2, 1, 1]
    bench.measure("a")
    assert [request.drop_cache for request in bench.requests] == [True, True, False, False]
    assert bench.requests[0] == bench.requests[1]


@pytest.mark.parametrize(
    ("failing", "loops", "order", "failed"),
    [
        ([1], [], "abcacac", "b"),
        ([8], [], "abcabcabc", "c"),
        ([0, 2], [], "abcbb", "ac"),
        ([0, 1, 2], [], "abc", "abc"),
        ([1], [1, 1, 1, 2, 2], "aabcbcbc", "a"),  # in the repetition of a disturbed turn
    ],
)
def test_one_that_fails_drops_out(
    bench: Bench, failing: list[int], loops: list[float], order: str, failed: str
) -> None:
    bench.loops = [*loops]
    errors = {number: EvaluationError(f"failed at {number}") for number in failing}
    bench.failing.update(errors)
    found = bench.measure("abc")
    assert bench.order == order
    assert [found[name] for name in failed] == list(errors.values())
    assert all(len(turns(one)) == 3 for name, one in found.items() if name not in failed)
    assert not files(bench.work)


ALL = [(128, 16, 3), (32, 16, 1), (512, 16, 1), (1024, 16, 1)]
SEVERAL = {"prompt_lengths": [64, 400], "output_lengths": [16, 128]}


@pytest.mark.parametrize(
    ("asked", "context", "expected"),
    [
        ({"quick": True}, 2048, ALL[:2]),
        ({}, 1039, ALL[:3]),
        ({}, 1040, ALL),  # all just fit
        (SEVERAL, 2048, [(64, 16, 3), (64, 128, 1), (400, 16, 1), (400, 128, 1)]),
        ({"output_lengths": [128, 16], "quick": True}, 2048, [(128, 128, 3), (32, 128, 1)]),  # the first
        ({"output_lengths": [16, 2000]}, 2048, [(32, 16, 3), (32, 2000, 1)]),  # room for the longest
        ({"prompt_lengths": [512, 1000]}, 2048, [(512, 16, 3), (1000, 16, 1)]),  # nearest to 128
    ],
)
def test_grid(bench: Bench, asked: dict[str, Any], context: int, expected: list[tuple[int, int, int]]) -> None:
    folder = bench.make("a")[1].path
    staged = Staged(home=folder.parent, folder=folder, foundry_id="x:1", context_length=context)
    cells = speed.grid(staged, Job(model="m", **asked))
    assert [(cell.prompt_tokens, cell.output_tokens, cell.repetitions) for cell in cells] == expected
    assert [cell.seconds for cell in cells] == [1.0] + [0.0] * (len(cells) - 1)  # and the headline for a second
    assert all(len(cell.text.split()) == cell.prompt_tokens - 2 for cell in cells)
    for wrong in ({"output_lengths": [2040]}, {"output_lengths": [4096]}, {"prompt_lengths": [4000]}):
        with pytest.raises(EvaluationError):
            speed.grid(staged, Job(model="m", **wrong))


@pytest.mark.parametrize("delays", [[0, 0, 0], [0, 0.2, 0]])
def test_defect_9_the_calibration_loop_notices_one_busy_core(
    delays: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(3, timeout=10)  # breaks unless the work is done on three cores at once

    def digest() -> None:
        time.sleep(delays[together.wait()])

    cores = machine.hardware().model_copy(update={"cores": 3})
    monkeypatch.setattr(machine, "hardware", lambda: cores)
    monkeypatch.setattr(speed.hashlib, "sha256", lambda _data: SimpleNamespace(digest=digest))
    assert (speed.calibrate() >= 0.2) == (max(delays) > 0)


class Runtime:
    """Stands in for :mod:`slmops.foundry.runtime`; each request takes half a second of its own clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[str] = []
        clocks = dict.fromkeys(("perf_counter", "monotonic", "process_time"), lambda: self.now)
        self.time = SimpleNamespace(**clocks, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def local_catalog(self, _home: Path, _to_load: str) -> None:
        return None

    def add(self, *_args: Any) -> Any:
        return SimpleNamespace(load=lambda: self.events.append("load"), unload=lambda: self.events.append("unload"))

    def ask(self, _model: Any, _messages: list[dict[str, str]], *, max_tokens: int) -> Any:
        self.events.append(f"ask {max_tokens}")
        self.sleep(0.5)
        times = {"first_s": 0.25, "last_s": 0.5, "total_s": 0.5}
        return SimpleNamespace(prompt_tokens=5, completion_tokens=max_tokens, **times)


CELLS = (
    Cell(prompt_tokens=5, output_tokens=16, text="a b c", repetitions=3, seconds=1.0),
    Cell(prompt_tokens=9, output_tokens=32, text="a b c d e f g", repetitions=2),
)


@pytest.mark.parametrize("sessions", [(), (1, 2)])
def test_several_sessions_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sessions: tuple[int, ...]) -> None:
    runtime = Runtime()
    word_tokenizer(tmp_path)
    monkeypatch.setattr(foundry, "runtime", runtime, raising=False)
    monkeypatch.setattr(speed, "time", runtime.time)
    where = {"home": tmp_path, "folder": tmp_path, "foundry_id": "x:1", "context_length": 2048}
    found = speed.handle(speed.SpeedRequest(**where, cells=CELLS, sessions=sessions))
    asked = ["ask 4"] * 2 + ["ask 16"] * 3 + ["ask 32"] * 2  # the first two warm up
    assert runtime.events == ["load", *asked, *["ask 8"] * sum(sessions), "unload"]
    assert [timed.cell for timed in found.timed] == [0] * 3 + [1] * 2
    assert found.energy_tokens == 3 * (5 + 16) + 2 * (5 + 32)
    assert found.throughput.keys() == set(sessions)
    assert (found.unloaded is None) == bool(sessions)
    assert found.measured[1] - found.measured[0] == 2.5
