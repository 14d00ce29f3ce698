"""Hard conversations with a tiny model in Foundry Local for real, and what is left when a process dies of one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmops.core.errors import EvaluationError
from slmops.core.files import sha256
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import CaseOutcome, Registration, Variant
from slmops.evaluation import edge_cases
from slmops.evaluation.edge_cases import EdgeCase
from slmops.foundry.register import register
from tests import making

pytestmark = pytest.mark.integration

NAME = "tiny"
# What this runtime does with a model that answers anything. The tiny model's chat template takes any conversation.
REFUSED = ("empty", "longer_than_context", "one_beyond_the_context", "repeated_tokens", "lone_surrogate")
OUTCOMES = {
    **{case.id: "answered" for case in edge_cases.EDGE_CASES},
    **dict.fromkeys(REFUSED, "refused"),
    "nul_in_text": "cut",
}
QUESTION = EdgeCase(id="ordinary_question", expected="answered")


@pytest.fixture(scope="module")
def made(job: Job, home: Settings, stock: Settings) -> tuple[Variant, Registration]:
    variant = making.variant("int8", job, stock)
    return variant, register(variant, NAME, job, home)


@pytest.fixture(autouse=True)
def nothing_is_left(home: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test, whatever became of it: no staged home, no process."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # for faults
    yield
    assert not list(home.work(NAME).glob("*-edge"))
    assert making.workers("edge_cases") == []


def fault(name: str) -> EdgeCase:
    return EdgeCase(id=name, expected="answered", module="tests.integration.edge_faults")


def outcomes(cases: tuple[CaseOutcome, ...]) -> dict[str, str]:
    return {case.id: case.outcome for case in cases}


def test_what_the_runtime_makes_of_each(made: tuple[Variant, Registration], home: Settings) -> None:
    variant, registration = made
    before = {file.name: sha256(file) for file in registration.path.iterdir()}
    cases = edge_cases.run(variant, registration, NAME, home)
    assert outcomes(cases) == OUTCOMES
    assert [case.id for case in cases if not case.passed] == ["nul_in_text"]
    details = {case.id: case.detail for case in cases}
    assert all(details.values())
    assert "exceeds the model's maximum context length of" in details["one_beyond_the_context"]
    assert details["lone_surrogate"].startswith("UnicodeEncodeError")
    assert "a known defect of the runtime" in details["nul_in_text"]
    # Prompt and requested tokens fill the context of 512 tokens and those of the template.
    tokens = int(details["exactly_the_context"].split()[0])
    room = edge_cases.CONTEXT + edge_cases.prompts.counter(registration.path)("") - tokens
    assert 0 < room < 60
    assert f"({tokens} input + {room + 1} output)" in details["one_beyond_the_context"]
    assert (home.logs / NAME / "int8.edge.log").exists()
    # What is deployed is as it was.
    assert {file.name: sha256(file) for file in registration.path.iterdir()} == before


def test_a_crash_or_a_hang_costs_one_case(made: tuple[Variant, Registration], home: Settings) -> None:
    names = ("ordinary_question", "dies", "emoji", "hangs", "breaks", "right_to_left", "leaves")
    ends = ("answered", "crashed", "answered", "hung", "failed", "answered", "crashed")
    expected = dict(zip(names, ends, strict=True))
    cases = tuple(
        EdgeCase(id=name, expected="answered") if outcome == "answered" else fault(name)
        for name, outcome in expected.items()
    )
    seen = edge_cases.run(*made, NAME, home, cases=cases, limit_s=2.0)
    assert outcomes(seen) == expected
    details = {case.id: case.detail for case in seen}
    assert "SIGSEGV" in details["dies"]
    assert details["hangs"] == "It took longer than 2 s."
    assert details["breaks"] == "RuntimeError: the kernel found no memory"
    assert "ended with status 0 and no result" in details["leaves"]


@pytest.mark.parametrize("limit_s", [0.2, 3])
def test_time_runs_out_before_and_amid_a_case(
    limit_s: float, made: tuple[Variant, Registration], home: Settings
) -> None:
    hurried = home.model_copy(update={"evaluation_timeout_s": limit_s})
    with pytest.raises(EvaluationError, match="took longer than"):
        edge_cases.run(*made, NAME, hurried, cases=(QUESTION, fault("hangs"), QUESTION))


def test_a_model_that_does_not_load(made: tuple[Variant, Registration], home: Settings, tmp_path: Path) -> None:
    variant, registration = made
    broken = tmp_path / registration.path.name
    shutil.copytree(registration.path, broken)
    (broken / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EvaluationError, match="status 1 and no result"):
        edge_cases.run(variant, registration.model_copy(update={"path": broken}), NAME, home)
