"""Adapters and the folders of a Trainer, as far as they are looked at before torch is."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from slmops.checkpoints import source, store
from slmops.core import machine
from slmops.core.errors import CheckpointError, PrerequisiteError
from slmops.core.job import Job
from slmops.core.settings import Settings
from tests.checkpoint_folders import Resolve, edit_json, tree, write_json, write_safetensors

LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}


@pytest.fixture
def adapter(folder: Path) -> Path:
    """An adapter for the checkpoint in ``folder``."""
    path = folder.parent / "tuned"
    path.mkdir()
    write_json(path / "adapter_config.json", LORA | {"base_model_name_or_path": str(folder)})
    write_safetensors(path / "adapter_model.safetensors", {"base_model.model.lora_A.weight": [1, 8]})
    return path


def refused(adapter: Path, resolve: Resolve, named: str, **job: Any) -> None:
    """It is, by the look before the start and by the job."""
    for ask in (lambda: source.check(Job(model=str(adapter), **job)), lambda: resolve(adapter, **job)):
        with pytest.raises(CheckpointError, match=named) as caught:
            ask()
        assert str(adapter) in caught.value.message
        assert caught.value.fix


KINDS = ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        *(({"peft_type": kind}, f"of type {kind}, which no checkpoint can hold") for kind in KINDS),
        ({"task_type": "SEQ_CLS"}, "adapter for SEQ_CLS"),
        ({"base_model_name_or_path": None}, "does not name its base"),
        ({"base_model_name_or_path": "/gone/base"}, "The base model of the adapter .* no such folder: /gone/base"),
    ],
)
def test_an_adapter_that_cannot_be_merged(
    adapter: Path, resolve: Resolve, config: dict[str, object], named: str
) -> None:
    edit_json(adapter / "adapter_config.json", **config)
    refused(adapter, resolve, named)


def test_adapter_weights_that_are_pickled_or_cut_off(adapter: Path, resolve: Resolve) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(adapter, resolve, "not a whole safetensors file")
    weights.rename(adapter / "adapter_model.bin")
    refused(adapter, resolve, r"pickled weights only \(adapter_model.bin\)")


def test_a_base_that_cannot_be_used_is_named_with_the_option(adapter: Path, folder: Path, resolve: Resolve) -> None:
    other = shutil.copytree(adapter, adapter.with_name("other"))
    with pytest.raises(CheckpointError, match=r"(?s)base model of the adapter .*other is an adapter itself.*--base"):
        resolve(adapter, base=str(other))
    edit_json(folder / "config.json", quantization_config={"load_in_4bit": True})
    refused(adapter, resolve, "The base model of the adapter .* is quantized already")
    refused(folder, resolve, "is not an adapter, so it has no base", base=str(adapter))


def test_an_adapter_is_merged_once_for_each_base(
    adapter: Path,
    folder: Path,
    resolve: Resolve,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = []

    def call(_module: str, request: Any, *_: Any, **__: Any) -> None:
        asked.append((request.base, request.adapter))
        for file in request.base.iterdir():
            shutil.copy(file, request.folder)

    monkeypatch.setattr(store.children, "call", call)
    before = tree(folder.parent)
    with caplog.at_level(logging.INFO):
        found = resolve(adapter)
    assert found.path.parent == settings.checkpoints
    assert (found.name, found.source, found.digest) == ("tuned", str(adapter), resolve(folder).digest)
    assert found.base == f"{folder}@sha256:{found.digest}"
    assert found.base in caplog.text
    (adapter / "optimizer.pt").write_bytes(b"pickle")  # what a Trainer leaves beside it
    assert resolve(adapter) == found
    assert asked == [(folder, adapter)]
    cached = folder.parent / "models--org--base" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, cached)
    assert resolve(adapter, base=str(cached)) == found.model_copy(update={"base": f"{cached}@{'0' * 40}"})
    assert len(asked) == 1  # the same files
    edit_json(cached / "config.json", rms_norm_eps=1e-6)
    assert resolve(adapter, base=str(cached)).path != found.path
    assert {name: raw for name, raw in tree(folder).items() if f"{folder.name}/{name}" in before} == tree(folder)


def test_a_merge_for_which_there_is_no_room_is_not_begun(
    adapter: Path, resolve: Resolve, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: (8e9, 1.5e9))
    with pytest.raises(PrerequisiteError, match=r"memory for merging .*tuned with .*v2: about 3\.0 GB .* 1\.5 GB are"):
        resolve(adapter)
    monkeypatch.setattr(machine, "disk_free", lambda _folder: 10)
    with pytest.raises(PrerequisiteError, match=r"disk for merging .*tuned with .*v2: about 0\.0 GB .* 0\.0 GB are"):
        resolve(adapter)
    assert [*settings.checkpoints.iterdir()] == []


def test_the_output_folder_of_a_trainer(folder: Path, resolve: Resolve, adapter: Path) -> None:
    output = folder.parent / "output"
    for number in (500, 1500, 1000):
        shutil.copytree(folder, output / f"checkpoint-{number}")
    shutil.copytree(adapter, output / "checkpoint-best")
    (output / "trainer_state.json").write_text("{}")
    refused(output, resolve, r"checkpoint-500, checkpoint-1000, checkpoint-1500\.\n")
    state = output / "checkpoint-500"
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin"):
        (state / name).write_bytes(b"pickle")
    assert resolve(state).digest == resolve(folder).digest
    shutil.copytree(folder, output, dirs_exist_ok=True)  # the last one was saved above them
    assert resolve(output).digest == resolve(folder).digest
