"""The text is scored beside the questions: how that ends."""

import threading
import time
from typing import Any

import pytest

from slmops.checkpoints import room
from slmops.core import machine
from slmops.core.errors import EvaluationError
from slmops.core.job import CHECKPOINT, Job, JobContext
from slmops.core.settings import Settings
from slmops.core.values import Registration, Variant
from slmops.evaluation import quality
from slmops.evaluation.answers_worker import AnswersRequest
from slmops.processes import children
from tests import values
from tests.unit.processes import odd_worker

LONG_S = 60.0


@pytest.fixture
def made(settings: Settings) -> tuple[Variant, Registration]:
    variant = values.write_variant(settings.variants / "int4")
    return variant, Registration(foundry_id="bot-int4:1", path=variant.path, answer="Yes.")


def stand_in(monkeypatch: pytest.MonkeyPatch, log: Any, scoring: str) -> list[str]:
    """Score in a child that does ``scoring``, and fail to answer as soon as that is at work; returns what was done."""
    done: list[str] = []
    real = children.call

    def call(_handle: Any, request: Any, *, within: children.Child | None = None, **_: Any) -> Any:
        if not isinstance(request, AnswersRequest):
            done.append("text")
            asked = odd_worker.Request(do=scoring)
            return real(odd_worker.handle, asked, log=log, timeout_s=LONG_S, error=EvaluationError, within=within)
        deadline = time.monotonic() + LONG_S
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        done.append("questions")
        raise EvaluationError("It does not answer.")

    monkeypatch.setattr(quality.children, "call", call)
    return done


def test_a_failure_to_answer_ends_the_scoring(
    made: tuple[Variant, Registration], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = stand_in(monkeypatch, settings.home / "scoring.log", "print('begun', flush=True); time.sleep(100)")
    began = time.monotonic()
    with room.watched(settings) as peaks, pytest.raises(EvaluationError, match="It does not answer"):
        quality.measure(*made, JobContext(Job(model="m", quick=True), "bot", made[0].checkpoint, settings))
    assert time.monotonic() - began < LONG_S / 2
    assert done == ["text", "questions"]
    assert threading.active_count() < 10
    assert peaks["memory_peak_mb"] > 0


@pytest.mark.parametrize(
    ("baseline", "available", "beside"), [(None, 10**9, True), (None, 1000, False), (CHECKPOINT, 10**9, False)]
)
def test_where_memory_is_short_one_comes_after_the_other(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, baseline: Any, available: int, beside: bool
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: (10**12, available))
    variant = values.variant(settings.variants / "int4")  # of 1 MB
    assert quality._fits_twice(variant, Job(model="m", baseline=baseline)) == beside
