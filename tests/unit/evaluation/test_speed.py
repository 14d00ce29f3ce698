"""Rounds, turns and the grid, with no process behind a turn and a clock that is made up."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from slmops.core import machine
from slmops.core.errors import EvaluationError, SlmopsError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Registration, Variant
from slmops.evaluation import speed, speed_worker
from slmops.evaluation.speed import Speed
from slmops.evaluation.speed_worker import Window
from slmops.foundry.stage import Staged
from slmops.processes.children import Finished
from tests.measured import turn
from tests.values import variant

NAME = "bot"
MEMORY = [(1.0, 50.0), (2.0, 60.0)]
CONTEXT = 2048

Made = tuple[Variant, Registration]
Make = Callable[[str], Made]
Clock = Callable[[list[float]], None]


def result(number: int) -> speed_worker.SpeedResult:
    """What the ``number``-th process returns."""
    return turn(load_s=float(number)).measured


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))  # the machine's lock is there
    return Settings(home=tmp_path / "home")


@pytest.fixture
def make(settings: Settings) -> Make:
    """Put a variant without any weights into Foundry Local's cache; a template of two tokens, and one a word."""

    def made(name: str) -> Made:
        folder = settings.foundry / "models" / "slmops" / f"{NAME}-{name}-generic-cpu-1"
        folder.mkdir(parents=True)
        backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text("<s> {{ messages[0]['content'] }} <a>")
        config = {"model": {"vocab_size": 100, "context_length": CONTEXT, "eos_token_id": 2}, "search": {}}
        (folder / "genai_config.json").write_text(json.dumps(config))
        foundry_id = f"{NAME}-{name}-generic-cpu:1"
        return variant(settings.variants / f"{name}-0123", name), Registration(
            foundry_id=foundry_id, path=folder, prompt_template_exact=True, answer="Yes."
        )

    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Seconds of the calibration loops: three before all turns, one before and one after each; then always 1."""

    def set_to(seconds: list[float]) -> None:
        left = iter(seconds)
        monkeypatch.setattr(speed, "calibrate", lambda: next(left, 1.0))

    set_to([])
    return set_to


class Processes:
    """Stands in for :func:`slmops.processes.children.call`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, speed_worker.SpeedRequest, dict[str, Any]]] = []
        self.failing: dict[int, Exception] = {}

    def __call__(
        self, module: str, request: speed_worker.SpeedRequest, _result: Any, **options: Any
    ) -> tuple[speed_worker.SpeedResult, Finished]:
        assert module == "slmops.evaluation.speed_worker"
        assert (request.folder / "tokenizer.json").is_file()
        assert request.home in request.folder.parents
        self.calls.append((request.foundry_id.removeprefix(f"{NAME}-").split("-")[0], request, options))
        number = len(self.calls) - 1
        if number in self.failing:
            raise self.failing[number]
        return result(number), Finished(returncode=0, seconds=1, memory=MEMORY, timed_out=False)

    @property
    def order(self) -> str:
        return "".join(name for name, _, _ in self.calls)

    @property
    def requests(self) -> list[speed_worker.SpeedRequest]:
        return [request for _, request, _ in self.calls]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Processes:  # noqa: ARG001 - no real clock
    fake = Processes()
    monkeypatch.setattr(speed.children, "call", fake)
    return fake


def measure(made: list[Made], settings: Settings, **asked: Any) -> dict[str, Speed | SlmopsError]:
    return speed.measure(made, NAME, Job(model="m", **asked), settings)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def turns(found: Speed | SlmopsError) -> list[tuple[float, bool]]:
    """Number of the process and whether it was disturbed, of each turn."""
    assert isinstance(found, Speed), found
    return [(turn.measured.load_s, turn.disturbed) for turn in found.turns]


def test_rounds_interleave(make: Make, settings: Settings, processes: Processes) -> None:
    found = measure([make("a"), make("b"), make("c")], settings)
    assert processes.order == "abc" * 3
    assert {name: turns(one) for name, one in found.items()} == {
        "a": [(0, False), (3, False), (6, False)],
        "b": [(1, False), (4, False), (7, False)],
        "c": [(2, False), (5, False), (8, False)],
    }


def test_what_a_turn_is_asked_for_and_what_is_kept_of_it(make: Make, settings: Settings, processes: Processes) -> None:
    a, b = make("a"), make("b")
    before = files(settings.foundry)
    found = measure([a, b], settings, prompt_lengths=[32, 128])
    # Several sessions take memory and time, and a cold load needs its cache dropped: once is enough.
    assert [(request.sessions, request.drop_cache) for request in processes.requests] == [
        *[((1, 2, 4), True)] * 2,
        *[((), False)] * 4,
    ]
    for name, request, options in processes.calls:
        work = settings.work(NAME) / f"{name}-speed"
        assert options["work"] == work
        assert options["log"] == settings.logs / NAME / f"{name}.speed.log"
        assert (options["timeout_s"], options["error"]) == (settings.evaluation_timeout_s, EvaluationError)
        assert request.home == work / "foundry"
        assert [(cell.prompt_tokens, cell.output_tokens) for cell in request.cells] == [(128, 16), (32, 16)]
    for one in found.values():
        assert isinstance(one, Speed)
        assert one.cells == processes.requests[0].cells
        assert one.cores == machine.hardware().cores
        assert [list(turn.memory) for turn in one.turns] == [MEMORY] * 3
        assert [turn.calibration_s for turn in one.turns] == [(1, 1)] * 3
    # Nothing is left of the staged variants, and what is deployed is as it was.
    assert not files(settings.work(NAME))
    assert files(settings.foundry) == before


def test_staged_so_that_answers_do_not_end_early(
    make: Make, settings: Settings, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(module: str, request: speed_worker.SpeedRequest, *rest: Any, **options: Any) -> Any:
        seen.append(json.loads((request.folder / "genai_config.json").read_text())["model"]["eos_token_id"])
        return processes(module, request, *rest, **options)

    monkeypatch.setattr(speed.children, "call", look)
    measure([make("a")], settings, quick=True)
    assert seen == [[99]]


def test_quick_job_has_one_round_and_a_warm_load(make: Make, settings: Settings, processes: Processes) -> None:
    found = measure([make("a"), make("b")], settings, quick=True, output_lengths=[8, 64])
    assert processes.order == "ab"
    assert [(request.sessions, request.drop_cache) for request in processes.requests] == [((), False)] * 2
    assert [len(turns(one)) for one in found.values()] == [1, 1]


@pytest.mark.parametrize(
    ("loops", "order", "expected"),
    [
        pytest.param([1, 1, 1, 1, 1], "a", [(0, False)], id="quiet"),
        pytest.param([1, 1, 1, 1.25, 1.25], "a", [(0, False)], id="a quarter slower is quiet"),
        pytest.param([1, 1, 1, 1, 1.26, 1, 1], "aa", [(1, False)], id="busy after, then quiet"),
        pytest.param([1, 1, 1, 1.26, 1, 1, 1], "aa", [(1, False)], id="busy before, then quiet"),
        pytest.param([1, 1, 1, 2, 2, 1, 1.3], "aa", [(1, True)], id="busy twice"),
        pytest.param([2, 1, 3, 1, 1.2], "a", [(0, False)], id="the fastest of the first loops counts"),
        pytest.param([2, 2, 2, 1, 1], "a", [(0, False)], id="a turn faster than all before"),
        pytest.param([2, 2, 2, 1, 2, 1, 1], "aa", [(1, False)], id="busy by what the turn itself shows"),
    ],
)
def test_a_disturbed_turn_is_repeated_once(
    make: Make,
    settings: Settings,
    processes: Processes,
    clock: Clock,
    loops: list[float],
    order: str,
    expected: list[tuple[float, bool]],
) -> None:
    clock(loops)
    found = measure([make("a")], settings, quick=True)
    assert processes.order == order
    assert turns(found["a"]) == expected
    assert isinstance(found["a"], Speed)
    assert found["a"].turns[0].calibration_s == tuple(loops[-2:])


def test_a_repeated_turn_is_asked_for_the_same(
    make: Make, settings: Settings, processes: Processes, clock: Clock
) -> None:
    clock([1, 1, 1, 2, 2, 1, 1])
    measure([make("a")], settings)
    assert processes.order == "aaaa"
    assert [request.drop_cache for request in processes.requests] == [True, True, False, False]
    assert processes.requests[0] == processes.requests[1]


def test_turns_before_the_machine_grew_quiet_are_flagged_too(
    make: Make, settings: Settings, processes: Processes, clock: Clock
) -> None:
    clock([2, 2, 2, 2, 2, 2, 2, 1, 1])
    found = measure([make("a"), make("b")], settings)
    assert processes.order == "ababab"
    assert turns(found["a"]) == [(0, True), (2, False), (4, False)]
    assert turns(found["b"]) == [(1, True), (3, False), (5, False)]


@pytest.mark.parametrize(
    ("failing", "order", "failed"),
    [
        ([1], "abcacac", "b"),
        ([4], "abcabcac", "b"),
        ([8], "abcabcabc", "c"),
        ([0, 2], "abcbb", "ac"),
        ([0, 1, 2], "abc", "abc"),
    ],
)
def test_one_that_fails_drops_out(
    make: Make,
    settings: Settings,
    processes: Processes,
    failing: list[int],
    order: str,
    failed: str,
) -> None:
    errors = {number: EvaluationError(f"failed at {number}") for number in failing}
    processes.failing.update(errors)
    found = measure([make(name) for name in "abc"], settings)
    assert processes.order == order
    assert [found[name] for name in failed] == list(errors.values())
    assert all(len(turns(one)) == 3 for name, one in found.items() if name not in failed)
    assert not files(settings.work(NAME))


def test_a_failure_in_the_repetition_counts(make: Make, settings: Settings, processes: Processes, clock: Clock) -> None:
    clock([1, 1, 1, 2, 2])
    processes.failing[1] = EvaluationError("failed")
    found = measure([make("a"), make("b")], settings, quick=True)
    assert processes.order == "aab"
    assert found["a"] is processes.failing[1]
    assert turns(found["b"]) == [(2, False)]


def test_one_that_cannot_be_staged(make: Make, settings: Settings, processes: Processes) -> None:
    made = [make(name) for name in "abc"]
    (made[0][1].path / "chat_template.jinja").unlink()
    (made[2][1].path / "chat_template.jinja").write_text("{% oops")
    found = measure(made, settings, quick=True)
    assert processes.order == "b"
    assert "has no chat template" in str(found["a"])
    assert "the chat template fails" in str(found["c"])
    assert turns(found["b"]) == [(0, False)]
    assert not files(settings.work(NAME))


def test_nothing_to_measure(settings: Settings, processes: Processes) -> None:
    assert measure([], settings) == {}
    assert processes.calls == []


def staged(made: Made, context: int = CONTEXT) -> Staged:
    folder = made[1].path
    return Staged(home=folder.parent, folder=folder, foundry_id="x:1", context_length=context)


@pytest.mark.parametrize(
    ("asked", "context", "expected"),
    [
        pytest.param({}, 2048, [(128, 16, 3), (32, 16, 1), (512, 16, 1), (1024, 16, 1)], id="default"),
        pytest.param({"quick": True}, 2048, [(128, 16, 3), (32, 16, 1)], id="quick"),
        pytest.param({}, 1039, [(128, 16, 3), (32, 16, 1), (512, 16, 1)], id="one does not fit"),
        pytest.param({}, 1040, [(128, 16, 3), (32, 16, 1), (512, 16, 1), (1024, 16, 1)], id="all just fit"),
        pytest.param(
            {"prompt_lengths": [64, 400], "output_lengths": [16, 128]},
            2048,
            [(64, 16, 3), (64, 128, 1), (400, 16, 1), (400, 128, 1)],
            id="several output lengths",
        ),
        pytest.param(
            {"prompt_lengths": [64], "output_lengths": [128, 16], "quick": True},
            2048,
            [(64, 128, 3)],
            id="quick: first",
        ),
        pytest.param({"output_lengths": [16, 2000]}, 2048, [(32, 16, 3), (32, 2000, 1)], id="room for the longest"),
        pytest.param({"prompt_lengths": [512, 1000]}, 2048, [(512, 16, 3), (1000, 16, 1)], id="nearest to 128"),
    ],
)
def test_grid(make: Make, asked: dict[str, Any], context: int, expected: list[tuple[int, int, int]]) -> None:
    cells = speed.grid(staged(make("a"), context), Job(model="m", **asked))
    assert [(cell.prompt_tokens, cell.output_tokens, cell.repetitions) for cell in cells] == expected
    assert [cell.seconds for cell in cells] == [1.0] + [0.0] * (len(cells) - 1)  # and the headline for a second
    assert all(len(cell.text.split()) == cell.prompt_tokens - 2 for cell in cells)


@pytest.mark.parametrize("asked", [{"output_lengths": [2040]}, {"output_lengths": [4096]}, {"prompt_lengths": [4000]}])
def test_no_grid(make: Make, asked: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match="can be measured"):
        speed.grid(staged(make("a")), Job(model="m", **asked))


def test_memory_in_a_window() -> None:
    sampled = turn(memory=((0.9, 1.0), (1.0, 2.0), (1.5, 3.0), (2.0, 4.0), (2.1, 5.0)))
    assert speed.memory_in(sampled, Window(start=1, end=2)) == [2, 3, 4]
    assert speed.memory_in(sampled, Window(start=3, end=4)) == []


def test_the_calibration_loop_takes_time() -> None:
    assert 0.001 < min(speed.calibrate() for _ in range(3)) < 1


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
