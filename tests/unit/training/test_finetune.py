"""The names of a fine-tuning and of a retraining's input, and what the parent passes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from slmops.training import finetune, finetune_worker
from slmops.training.values import LoraSettings, LossPoint, Retrain, TrainingData
from tests import values
from tests.training_data import checked

VERSIONS = {"torch": "2", "transformers": "5", "peft": "0.1", "accelerate": "1", "mlflow": "3"}


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    for name in ("train", "validation", "evaluation"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    return checked(tmp_path)


def test_a_fine_tuning_is_named_by_what_changes_its_result(data: TrainingData) -> None:
    def key(base: str = "b", versions: dict[str, str] | None = None, training: Any = None, **changes: Any) -> str:
        changed = data.model_copy(update=changes)
        return finetune.key(base, changed, LoraSettings(**(training or {})), {**VERSIONS, **(versions or {})})

    assert key() == key(source="elsewhere", evaluation_digest="0", versions={"mlflow": "4"})
    others = [key(base="c"), key(digest="c" * 64), key(train=data.evaluation), key(validation=data.evaluation)]
    others += [key(training={"seed": 1}), key(training={"minutes": 5.0})]
    others += [key(versions={name: "9"}) for name in finetune.TRAINING_PACKAGES]
    assert len({key(), *others}) == len(others) + 1


def test_whatever_could_change_the_result_of_a_retraining_changes_its_digest(tmp_path: Path) -> None:
    evaluation, one, other, matcher = (tmp_path / name for name in ("a.jsonl", "one.toml", "other.toml", "matcher.py"))
    evaluation.write_text("a question")
    one.write_text('objective = "smallest"')
    other.write_text('objective = "fastest"')
    matcher.write_text("def same(expected, answer): return True")

    def digest(base: str = "c", items: str = "d", file: Path = evaluation, **changes: Any) -> str:
        asked = Retrain(**{"model": "org/tiny", "data": "data.jsonl", **changes})
        return finetune.input_digest(asked, values.checkpoint(digest=base), items, file)

    copy = Path(shutil.copy(evaluation, tmp_path / "copy.jsonl"))
    elsewhere = {"data": "elsewhere", "evaluation_set": copy, "name": "other"}
    assert digest() == digest(file=copy, serve=True, watch_s=1, approval=True, **elsewhere)
    changes: list[dict[str, Any]] = [{}, {"training": LoraSettings(seed=1)}, {"precision": ["int4"]}, {"quick": True}]
    changes += [{"policy": one}, {"policy": other}, {"leak_similarity": 0.9}, {"base": "e"}, {"items": "e"}]
    digests = [digest(**change) for change in [*changes, {"matcher": f"{matcher}:same"}]]
    matcher.write_text("def same(expected, answer): return False")
    digests.append(digest(matcher=f"{matcher}:same"))
    evaluation.write_text("another question")
    digests.append(digest())
    assert len(set(digests)) == len(digests)


def test_only_points_are_passed_on_and_an_error_of_the_receiver_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    point = LossPoint(step=3, epoch=0.5, seconds=1.0, train_loss=2.0)
    receiver = mock.Mock(side_effect=[None, ConnectionError("the server is away")])
    for text in ("Loading weights: 100%", *[finetune_worker.POINT + point.model_dump_json()] * 2):
        finetune._pass_on(text, receiver)
    finetune._pass_on(finetune_worker.POINT + "{broken", receiver)
    assert receiver.mock_calls == [mock.call(point)] * 2
    assert "the server is away" in caplog.text
