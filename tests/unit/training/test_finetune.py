"""The name of a fine-tuning, what counts as finished, and what the parent passes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from slmops.training import finetune, finetune_worker
from slmops.training.values import LoraSettings, LossPoint, TrainingData
from tests.training_data import checked

VERSIONS = {"torch": "2", "transformers": "5", "peft": "0.1", "accelerate": "1", "mlflow": "3"}


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    for name in ("train", "validation", "evaluation"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    return checked(tmp_path)


def key(data: TrainingData, base: str = "b", versions: dict[str, str] | None = None, **changed: Any) -> str:
    return finetune.key(base, data, LoraSettings(**changed), {**VERSIONS, **(versions or {})})


def test_the_same_input_has_the_same_name(data: TrainingData) -> None:
    same = data.model_copy(update={"source": "elsewhere", "evaluation_digest": "0"})
    assert key(data) == key(same, versions={"mlflow": "4"})


@pytest.mark.parametrize(
    "change",
    [
        lambda data: key(data, base="c"),
        lambda data: key(data.model_copy(update={"digest": "c" * 64})),
        lambda data: key(data.model_copy(update={"train": data.evaluation})),
        lambda data: key(data.model_copy(update={"validation": data.evaluation})),
        lambda data: key(data, seed=1),
        lambda data: key(data, minutes=5.0),
        *(lambda data, name=name: key(data, versions={name: "9"}) for name in finetune.TRAINING_PACKAGES),
    ],
)
def test_other_input_has_another_name(data: TrainingData, change: Callable[[TrainingData], str]) -> None:
    assert change(data) != key(data)


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
