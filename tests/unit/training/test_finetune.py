"""The name of a fine-tuning, what counts as finished, and what the parent passes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from slmops.core.values import Hardware
from slmops.training import finetune, finetune_worker
from slmops.training.values import Finetuned, LoraSettings, LossPoint, TrainingData
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
    first = key(data)
    assert first == key(data)
    assert first == key(data.model_copy(update={"source": "elsewhere", "evaluation_digest": "0"}))
    assert first == key(data, versions={"mlflow": "4"})


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


def test_a_file_too_many_or_too_few_makes_it_unfinished(tmp_path: Path, data: TrainingData) -> None:
    for part in ("adapter", "merged"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "weights").write_text(part)
    finetuned = Finetuned(
        key=tmp_path.name,
        base_digest="b",
        data_digest=data.digest,
        training=LoraSettings(),
        steps=1,
        epochs=1,
        best_step=1,
        validation_loss=1.0,
        stopped="epochs",
        losses=(),
        precision="fp32",
        seconds=1.0,
        memory_peak_mb=1.0,
        trained_parameters=1,
        versions={},
        hardware=Hardware(system="", machine="", processor="", cores=1, memory_gb=1, isa=()),
        created=datetime.now(UTC),
        folder=tmp_path,
    )
    assert finetune.load(tmp_path) is None
    (tmp_path / finetune.TRAINING_FILE).write_text(finetuned.model_dump_json())
    assert finetune.load(tmp_path) is None  # without digests
    (tmp_path / finetune.DIGESTS_FILE).write_bytes(finetune.FILE_LIST.dump_json(finetune._files(tmp_path)))
    assert finetune.load(tmp_path) == finetuned
    (tmp_path / "merged/more").touch()
    assert finetune.load(tmp_path) is None
    (tmp_path / "merged/more").unlink()
    (tmp_path / "adapter/weights").unlink()
    assert finetune.load(tmp_path) is None


POINT = LossPoint(step=3, epoch=0.5, seconds=1.0, train_loss=2.0)


def test_only_points_are_passed_on() -> None:
    taken: list[LossPoint] = []
    finetune._pass_on("Loading weights: 100%", taken.append)
    finetune._pass_on(finetune_worker.POINT + POINT.model_dump_json(), taken.append)
    assert taken == [POINT]


def test_an_error_of_the_receiver_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: LossPoint) -> None:
        raise ConnectionError("the server is away")

    with caplog.at_level(logging.WARNING):
        finetune._pass_on(finetune_worker.POINT + POINT.model_dump_json(), refuse)
        finetune._pass_on(finetune_worker.POINT + "{broken", refuse)
    assert "the server is away" in caplog.text
