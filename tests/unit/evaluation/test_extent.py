"""How much of the text and the questions there is time for, and that all models of a job get the same."""

import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from slmops import foundry
from slmops.core.errors import EvaluationError
from slmops.core.job import Job, JobContext
from slmops.core.settings import Settings
from slmops.evaluation import answers_worker, dataset, logits_worker
from slmops.evaluation.dataset import Item
from slmops.evaluation.quality import Share
from tests import values
from tests.measured import word_tokenizer

LOAD_S = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(now=0.0, monotonic=lambda: made.now)
    for module in (logits_worker, answers_worker):
        monkeypatch.setattr(module, "time", made)
    return made


@pytest.mark.parametrize(
    ("budget_s", "used"),
    [(None, 2000), (1e6, 2000), (LOAD_S + 4 * 9, 2000), (LOAD_S + 3 * 9, 1536), (LOAD_S + 2.9 * 9, 1024), (1, 1024)],
)
def test_whole_windows_of_the_text(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, budget_s: float | None, used: int
) -> None:
    def load(_folder: Path) -> Any:
        clock.now += LOAD_S
        return SimpleNamespace(logits=logits)

    def logits(ids: Any) -> Any:
        clock.now += 9 * len(ids) / 512
        return np.zeros((len(ids), 1), np.float32)

    monkeypatch.setitem(sys.modules, "slmops.conversion.logits", SimpleNamespace(OnnxModel=load))
    word_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text("word " * 3000)
    asked = {"folder": tmp_path, "text": tmp_path / "text.txt", "tokens": 2000, "context_length": 4096}
    found = logits_worker.handle(logits_worker.LogitsRequest(**asked, budget_s=budget_s))
    assert (found.tokens, found.all_tokens) == (used, 3000)
    assert len(found.nll) == used - -(-used // 512)
    assert (clock.now - LOAD_S) == pytest.approx(9 * used / 512)


@pytest.mark.parametrize(("budget_s", "used"), [(None, 40), (1e6, 40), (LOAD_S + 50, 26), (LOAD_S + 1, 20), (1, 20)])
def test_questions_of_all_categories(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, budget_s: float | None, used: int
) -> None:
    items = [Item(id=str(n), prompt=f"Q{n}", expected=f"Q{n}", category=f"c{n // 20}") for n in range(40)]

    def load() -> None:
        clock.now += LOAD_S

    def ask(_model: Any, messages: list[dict[str, str]], **_: Any) -> Any:
        clock.now += 2
        said = {"text": messages[-1]["content"], "tool_calls": ()}
        return SimpleNamespace(**said, finish_reason="stop", total_s=2, completion_tokens=1)

    model = SimpleNamespace(load=load, unload=lambda: None)
    runtime = SimpleNamespace(registered=lambda *_: model, ask=ask)
    monkeypatch.setattr(foundry, "runtime", runtime, raising=False)
    monkeypatch.setattr(answers_worker, "MOST_SESSIONS", 1)
    asked = answers_worker.AnswersRequest(
        folder=tmp_path, foundry_id="x:1", items=dataset.subset(items, 40), budget_s=budget_s
    )
    found = answers_worker.handle(asked).answers
    in_turns = [str(n) for both in zip(range(20), range(20, 40), strict=True) for n in both]
    assert [one.id for one in found] == in_turns[:used]
    assert all(one.correct for one in found)
    assert clock.now == LOAD_S + 2 * used


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (2, "tool_call_plan.cc:30 F() tool 'f': instance '/a': Expected integer", True),
        (2, "out of memory", False),
        (3, "tool_call_plan.cc:30 F() tools/0/function 'f': recursive reference", False),
    ],
)
def test_a_call_that_does_not_fit_is_a_wrong_answer_and_a_tool_that_cannot_be_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str, wrong: bool
) -> None:
    fault = type("Fault", (Exception,), {"error_code": code})
    model = Mock()
    runtime = SimpleNamespace(Fault=fault, registered=lambda *_: model, ask=Mock(side_effect=fault(said)))
    monkeypatch.setattr(foundry, "runtime", runtime, raising=False)
    asked = answers_worker.AnswersRequest(folder=tmp_path, foundry_id="x:1", items=(Item(prompt="?", expected="x"),))
    with nullcontext() if wrong else pytest.raises(EvaluationError, match=re.escape(said)):
        [found] = answers_worker.handle(asked).answers
        assert (found.correct, found.finish_reason) == (False, "invalid_tool_call")


def test_all_models_of_a_job_get_what_the_first_had_time_for(settings: Settings, tmp_path: Path) -> None:
    job = Job(model="m", minutes=10)

    def share(asked: Job = job, name: str = "bot", home: Settings = settings, **changes: Any) -> Share:
        return Share("questions", 40, "digest", JobContext(asked, name, values.checkpoint(**changes), home))

    first = share()
    assert (first.count, first.budget_s) == (40, 60)  # four variants and the checkpoint, text and questions
    first.keep(25)
    assert (share().count, share().budget_s) == (25, None)
    # After it was killed and what is unfinished is removed, too; not with another time, of another model or text.
    shutil.rmtree(settings.work("bot"))
    assert share().count == 25
    for other in (share(Job(model="m", minutes=5)), share(Job(model="m")), share(parameters=7)):
        assert other.count == 40
    assert share(Job(model="m")).budget_s == settings.evaluation_timeout_s / 4
    assert share(Job(model="m", minutes=10, quick=True, precision=["int4"])).budget_s == 150
    for quick in (False, True):  # int8, int4, and the checkpoint as their baseline
        assert share(Job(model="m", minutes=10, baseline="checkpoint", quick=quick)).budget_s == 100
    # On another machine, by what comes with the logits.
    share().keep(25)
    elsewhere = Settings(home=tmp_path / "elsewhere")
    shutil.copytree(settings.work("bot") / "logits", elsewhere.work("part") / "logits")
    assert share(name="part", home=elsewhere).count == 25


def test_the_least_is_enough_for_an_interval_and_for_the_margin_of_the_policy() -> None:
    from slmops.evaluation import statistics
    from slmops.selection import policy

    assert logits_worker.LEAST_TOKENS // statistics.BLOCK_TOKENS > statistics.MIN_SAMPLES
    [margin] = {-gate.limit for gate in policy.load().gates if gate.metric == "accuracy"}
    assert margin >= 2 / answers_worker.LEAST_QUESTIONS
