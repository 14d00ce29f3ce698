"""What a retraining is compared by, and how it ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from slmops.core.values import Measurement
from slmops.selection import policy
from slmops.training import finetune, outcome
from slmops.training.values import LoraSettings, Retrain, Retrained
from tests import values
from tests.training_data import write_lines


def request(**changes: Any) -> Retrain:
    return Retrain(**{"model": "org/tiny", "data": "data.jsonl", **changes})


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "evaluation.jsonl", ["a question"])


def digest(asked: Retrain, evaluation: Path, base: str = "c", data: str = "d") -> str:
    return finetune.input_digest(asked, values.checkpoint(digest=base), data, evaluation)


def test_the_same_input_has_the_same_digest_wherever_it_lies(evaluation: Path, tmp_path: Path) -> None:
    copy = shutil.copy(evaluation, tmp_path / "copy.jsonl")
    again = request(data="elsewhere", evaluation_set=copy, name="other", serve=True, watch_s=1, approval=True)
    assert digest(request(), evaluation) == digest(again, copy)


def test_whatever_could_change_the_result_changes_the_digest(evaluation: Path, tmp_path: Path) -> None:
    one, other, matcher = (tmp_path / name for name in ("one.toml", "other.toml", "matcher.py"))
    one.write_text('objective = "smallest"')
    other.write_text('objective = "fastest"')
    matcher.write_text("def same(expected, answer): return True")
    matched = request(matcher=f"{matcher}:same")
    changes: list[dict[str, Any]] = [{}, {"training": LoraSettings(seed=1)}, {"precision": ["int4"]}, {"quick": True}]
    changes += [{"policy": one}, {"policy": other}, {"leak_similarity": 0.9}]
    digests = [digest(request(**change), evaluation) for change in changes]
    digests += [digest(request(), evaluation, base="e"), digest(request(), evaluation, data="e")]
    digests.append(digest(matched, evaluation))
    matcher.write_text("def same(expected, answer): return False")
    digests.append(digest(matched, evaluation))
    evaluation.write_text("another question")
    digests.append(digest(request(), evaluation))
    assert len(set(digests)) == len(digests)


def test_a_fine_tuning_may_not_make_it_worse() -> None:
    low, high = (Measurement(value=value, unit="1") for value in (0.4, 0.5))
    assert "0.50 before it, 0.40 after it" in str(outcome.worse(high, low))
    assert outcome.worse(high, high) is outcome.worse(low, high) is None


def test_the_policy_that_ships_can_be_read() -> None:
    read = policy.load(outcome.DEFAULT_POLICY)
    assert [f"{gate.metric} to {gate.to}" for gate in read.gates] == [
        *("accuracy to baseline", "perplexity to baseline", "accuracy to champion")
    ]


def test_the_text_has_accuracy_and_times() -> None:
    base = Measurement(value=0.1, unit="1", samples=60, low=0.05, high=0.2)
    accuracy = {"base": base, "int4": Measurement(value=1.0, unit="1", samples=1)}
    told = {"outcome": "promoted", "detail": "It is good.", "accuracy": accuracy, "seconds": {"fine-tune": 61.6}}
    lines = outcome.text(Retrained(model="bot", input_digest="a", run_id="r", url="-", **told)).splitlines()
    assert lines[0] == "promoted: It is good."
    said = [" ".join(line.split()) for line in lines if line.startswith(("base", "int4", "fine-tune"))]
    assert said == ["base 0.10 [0.05, 0.20] 60", "int4 1.00 1", "fine-tune 62"]
