"""Hard conversations with a tiny model in Foundry Local for real, and what is left when a process dies of one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slmops.core.errors import EvaluationError
from slmops.core.files import sha256
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import CaseOutcome, Registration, Variant
from slmops.evaluation import edge_cases
from slmops.evaluation.edge_worker import EdgeCase
from slmops.foundry.register import register
from slmops.processes import children
from tests import making

pytestmark = pytest.mark.integration

NAME = "tiny"
# What this runtime does with a model that answers anything. The tiny model's chat template takes any conversation.
OUTCOMES = {
    "empty": "refused",
    "whitespace": "answered",
    "longer_than_context": "refused",
    "exactly_the_context": "answered",
    "one_beyond_the_context": "refused",
    "repeated_tokens": "refused",
    "own_special_tokens": "answered",
    "foreign_markers": "answered",
    "emoji": "answered",
    "right_to_left": "answered",
    "nul_in_text": "cut",
    "lone_surrogate": "refused",
    "assistant_first": "answered",
    "greedy_twice": "answered",
    "ordinary_question": "answered",
}
QUESTION = EdgeCase(id="ordinary_question", expected="answered")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def job(talkative: Path) -> Job:
    return making.job(talkative)


@pytest.fixture(scope="module")
def made(job: Job, settings: Settings, stock: Settings) -> tuple[Variant, Registration]:
    variant = making.variant("int8", job, stock)
    return variant, register(variant, NAME, job, settings)


@pytest.fixture(autouse=True)
def nothing_is_left(settings: Settings) -> Iterator[None]:
    """After each test, whatever became of it: no staged home, no process."""
    yield
    assert not list(settings.work(NAME).glob("*-edge"))
    left = [child.cmdline() for child in psutil.Process().children(recursive=True) if child.status() != "zombie"]
    assert not [command for command in left if "edge_worker" in str(command)]


def fault(name: str) -> EdgeCase:
    return EdgeCase(id=name, expected="answered", module="tests.integration.edge_faults")


def outcomes(cases: tuple[CaseOutcome, ...]) -> dict[str, str]:
    return {case.id: case.outcome for case in cases}


def test_what_the_runtime_makes_of_each(made: tuple[Variant, Registration], settings: Settings) -> None:
    variant, registration = made
    before = {file.name: sha256(file) for file in registration.path.iterdir()}
    cases = edge_cases.run(variant, registration, NAME, settings)
    assert outcomes(cases) == OUTCOMES
    assert [case.id for case in cases if not case.passed] == ["nul_in_text"]
    details = {case.id: case.detail for case in cases}
    assert all(details.values())
    assert "exceeds the model's maximum context length of" in details["one_beyond_the_context"]
    assert details["lone_surrogate"].startswith("UnicodeEncodeError")
    assert "a known defect of the runtime" in details["nul_in_text"]
    # Prompt and requested tokens fill the context of 512 tokens and those of the template.
    template = edge_cases.prompts.counter(registration.path)("")
    tokens = int(details["exactly_the_context"].split()[0])
    assert 0 < edge_cases.CONTEXT + template - tokens < 60
    assert (
        f"({tokens} input + {edge_cases.CONTEXT + template - tokens + 1} output)" in details["one_beyond_the_context"]
    )
    share = edge_cases.measurement(cases)
    assert (share.value, share.samples, share.low, share.high) == (1.0, len(OUTCOMES) - 1, 1.0, 1.0)
    assert (settings.logs / NAME / "int8.edge.log").exists()
    # What is deployed is as it was.
    assert {file.name: sha256(file) for file in registration.path.iterdir()} == before


def test_a_crash_or_a_hang_costs_one_case(
    made: tuple[Variant, Registration], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    expected = {
        "ordinary_question": "answered",
        "dies": "crashed",
        "emoji": "answered",
        "hangs": "hung",
        "breaks": "failed",
        "right_to_left": "answered",
        "leaves": "crashed",
    }
    cases = tuple(
        EdgeCase(id=name, expected="answered") if outcome == "answered" else fault(name)
        for name, outcome in expected.items()
    )
    started = time.monotonic()
    seen = edge_cases.run(*made, NAME, settings, cases=cases, limit_s=2.0)
    assert time.monotonic() - started < 60
    assert outcomes(seen) == expected
    details = {case.id: case.detail for case in seen}
    assert "SIGSEGV" in details["dies"]
    assert details["hangs"] == "It took longer than 2 s."
    assert details["breaks"] == "RuntimeError: the kernel found no memory"
    assert "ended with status 0 and no result" in details["leaves"]
    share = edge_cases.measurement(seen)
    assert (share.value, share.samples) == (pytest.approx(3 / 7), 7)


def test_no_time_left(made: tuple[Variant, Registration], settings: Settings) -> None:
    impatient = settings.model_copy(update={"evaluation_timeout_s": 0.2})
    with pytest.raises(EvaluationError, match="took longer than 0 s"):
        edge_cases.run(*made, NAME, impatient)


def test_time_runs_out_amid_a_case(
    made: tuple[Variant, Registration], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    hurried = settings.model_copy(update={"evaluation_timeout_s": 3})
    with pytest.raises(EvaluationError, match="took longer than"):
        edge_cases.run(*made, NAME, hurried, cases=(QUESTION, fault("hangs"), QUESTION))


def test_a_model_that_does_not_load(made: tuple[Variant, Registration], settings: Settings, tmp_path: Path) -> None:
    variant, registration = made
    broken = tmp_path / registration.path.name
    shutil.copytree(registration.path, broken)
    (broken / "model.onnx").unlink()
    (broken / "model.onnx").write_bytes(b"no graph")
    calls = []
    real = children.call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "call", lambda *args, **options: calls.append(args[0]) or real(*args, **options))
        with pytest.raises(EvaluationError, match="status 1 and no result"):
            edge_cases.run(variant, registration.model_copy(update={"path": broken}), NAME, settings)
    assert len(calls) == 1  # not once for each case
