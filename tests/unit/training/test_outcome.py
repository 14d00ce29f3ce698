"""What a retraining is compared by, and how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slmops.core.values import Measurement
from slmops.selection import policy
from slmops.training import finetune, outcome
from slmops.training.values import LoraSettings, Retrain, Retrained
from tests import values


def request(**changes: Any) -> Retrain:
    return Retrain(**{"model": "org/tiny", "data": "data.jsonl", **changes})


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation.jsonl"
    path.write_text('{"prompt": "a", "expected": "b"}\n')
    return path


def digest(asked: Retrain, evaluation: Path, base: str = "c" * 64, data: str = "d" * 64) -> str:
    return finetune.input_digest(asked, values.checkpoint(digest=base), data, evaluation)


def test_the_same_input_has_the_same_digest_wherever_it_lies(evaluation: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(evaluation.read_bytes())
    again = request(data="elsewhere", evaluation_set=copy, name="other", serve=True, watch_s=1, approval=True)
    assert digest(request(), evaluation) == digest(again, copy)


def test_whatever_could_change_the_result_changes_the_digest(evaluation: Path, tmp_path: Path) -> None:
    one, other, matcher = (tmp_path / name for name in ("one.toml", "other.toml", "matcher.py"))
    one.write_text('objective = "smallest"')
    other.write_text('objective = "fastest"')
    matcher.write_text("def same(expected, answer): return True")
    matched = request(matcher=f"{matcher}:same")
    digests = [
        digest(request(), evaluation),
        digest(request(), evaluation, base="e" * 64),
        digest(request(), evaluation, data="e" * 64),
        digest(request(training=LoraSettings(seed=1)), evaluation),
        digest(request(precision=["int4"]), evaluation),
        digest(request(policy=one), evaluation),
        digest(request(policy=other), evaluation),
        digest(request(quick=True), evaluation),
        digest(request(leak_similarity=0.9), evaluation),
        digest(matched, evaluation),
    ]
    matcher.write_text("def same(expected, answer): return False")
    digests.append(digest(matched, evaluation))
    evaluation.write_text('{"prompt": "a", "expected": "c"}\n')
    digests.append(digest(request(), evaluation))
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(("base", "finetuned", "worse"), [(0.5, 0.4, True), (0.5, 0.5, False), (0.0, 0.9, False)])
def test_a_fine_tuning_may_not_make_it_worse(base: float, finetuned: float, worse: bool) -> None:
    said = outcome.worse(Measurement(value=base, unit="1"), Measurement(value=finetuned, unit="1"))
    assert (said is not None) == worse
    if said:
        assert "0.50 before it, 0.40 after it" in said


def test_the_policy_that_ships_can_be_read() -> None:
    read = policy.load(outcome.DEFAULT_POLICY)
    assert [(gate.metric, gate.to) for gate in read.gates] == [
        ("accuracy", "baseline"),
        ("perplexity", "baseline"),
        ("accuracy", "champion"),
    ]


def test_the_text_has_accuracy_and_times() -> None:
    result = Retrained(
        model="bot",
        outcome="promoted",
        detail="It is good.",
        input_digest="a",
        run_id="r",
        accuracy={
            "base": Measurement(value=0.1, unit="1", samples=60, low=0.05, high=0.2),
            "int4": Measurement(value=1.0, unit="1", samples=1),
        },
        seconds={"fine-tune": 61.6},
        url="http://x",
    )
    lines = outcome.text(result).splitlines()
    assert lines[0] == "promoted: It is good."
    assert [line.split() for line in lines if line.startswith(("base", "int4", "fine-tune"))] == [
        ["base", "0.10", "[0.05,", "0.20]", "60"],
        ["int4", "1.00", "1"],
        ["fine-tune", "62"],
    ]
