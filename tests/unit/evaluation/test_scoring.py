"""Answers from what a model said: matchers score in the worker, the judging model afterwards and without the lock."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmops import foundry
from slmops.core import locks
from slmops.core.errors import UsageError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Registration
from slmops.evaluation import answers_worker, judge, quality, scoring
from slmops.evaluation.dataset import Item
from slmops.evaluation.logits_worker import LogitsResult
from slmops.evaluation.matchers import Judgement
from slmops.evaluation.scoring import Generated
from tests import values

ITEMS = (
    Item(id="a", prompt="Capital of France?", expected="Paris", category="capitals", format="one_line"),
    Item(id="b", prompt="Greet me.", match="judge"),
    Item(id="c", prompt="2 + 2?", expected="4", match="numeric"),
    Item(id="d", prompt="Say goodbye.", expected="Bye", match="judge"),
)
GOOD = Judgement(score=0.9, correct=True)


def said(text: str) -> Generated:
    return Generated(text=text, finish_reason="stop", seconds=0.5, completion_tokens=3)


def answered(*texts: str) -> tuple[Any, ...]:
    return scoring.answer_items(ITEMS, None, lambda: [said(text) for text in texts]).answers


TEXTS = ("Paris.", "Hello!", "5", "Bye.")


def test_what_matchers_can_score_is_scored_at_once() -> None:
    found = answered(*TEXTS)
    scores = [(one.id, one.correct, one.score, one.reason) for one in found]
    judged_later = (None, None, scoring.TO_BE_JUDGED)
    assert scores == [("a", True, 1, None), ("b", *judged_later), ("c", False, 0, None), ("d", *judged_later)]
    asked = {"category": "capitals", "prompt": "Capital of France?", "expected": "Paris", "format_valid": True}
    asked |= {**said("").model_dump(exclude={"text"}), "answer": "Paris."}
    assert found[0].model_dump().items() >= asked.items()
    assert found[1].format_valid is None
    with pytest.raises(UsageError):  # before the model runs
        scoring.answer_items(ITEMS, "none.py:score", lambda: pytest.fail("the model ran"))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))  # the machine's lock is there
    return Settings(home=tmp_path / "home", judge_url="http://127.0.0.1:9/v1", judge_model="grader")


def test_the_judge_scores_the_rest(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    grades = {"b": GOOD, "d": Judgement(reason="the judge answered 500")}
    monkeypatch.setattr(judge, "score", lambda item, _text, _settings: grades[item.id])
    before = answered(*TEXTS)
    found = scoring.ask_judge(ITEMS, before, settings)
    assert found[::2] == before[::2]
    assert (found[1].correct, found[1].score, found[1].reason) == (True, 0.9, None)
    assert (found[3].correct, found[3].score, found[3].reason) == (None, None, "the judge answered 500")


def test_items_are_judged_side_by_side(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(scoring.JUDGED_AT_ONCE, timeout=10)

    def score(*_: Any) -> Judgement:
        together.wait()
        return GOOD

    monkeypatch.setattr(judge, "score", score)
    items = [ITEMS[1]] * 2 * scoring.JUDGED_AT_ONCE
    waiting = scoring.answer_items(items, None, lambda: [said("Hello!")] * len(items)).answers
    assert all(one.correct for one in scoring.ask_judge(items, waiting, settings))


def test_defect_5_a_judge_that_does_not_answer_leaves_its_items_unscored(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = threading.Event()

    def score(*_: Any) -> Judgement:
        gone.wait(60)
        return GOOD

    monkeypatch.setattr(judge, "score", score)
    started = time.monotonic()
    found = scoring.ask_judge(ITEMS, answered(*TEXTS), settings.model_copy(update={"evaluation_timeout_s": 0.2}))
    gone.set()
    assert time.monotonic() - started < 5
    assert [one.correct for one in found] == [True, None, False, None]
    assert "within 0.2 s" in (found[1].reason or "")


def test_defect_5_the_judge_is_asked_when_the_machine_is_free(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reply = SimpleNamespace(text="Paris.", finish_reason="stop", total_s=0.5, completion_tokens=3)
    model = SimpleNamespace(load=lambda: None, unload=lambda: None)
    runtime = SimpleNamespace(registered=lambda *_: model, ask=lambda *_, **__: reply)
    monkeypatch.setattr(foundry, "runtime", runtime, raising=False)

    def call(_module: str, request: Any, *_: Any, **__: Any) -> tuple[Any, None]:
        if isinstance(request, answers_worker.AnswersRequest):
            return answers_worker.handle(request), None
        return LogitsResult(nll=(1.0,), distances={}), None

    def score(*_: Any) -> Judgement:
        with locks.exclusive(settings.machine_lock, "the machine", wait=False):  # raises BusyError where it is held
            return GOOD

    monkeypatch.setattr(quality.children, "call", call)
    monkeypatch.setattr(judge, "score", score)
    monkeypatch.setattr(scoring, "JUDGED_AT_ONCE", 1)
    questions = tmp_path / "my.jsonl"
    questions.write_text('{"prompt": "Greet me.", "match": "judge"}\n{"prompt": "Q", "expected": "paris"}\n')
    registration = Registration(foundry_id="x:1", path=tmp_path, prompt_template_exact=True, answer="")
    job = Job(model="demo", quick=True, evaluation_set=questions)
    found = quality.measure(values.variant(tmp_path), registration, "bot", job, settings)
    assert [(one.correct, one.score) for one in found.answers] == [(True, 0.9), (True, 1)]
