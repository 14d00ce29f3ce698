"""A registered variant laid out once more, with settings that only a measurement wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.core.values import Registration
from slmops.foundry.layout import Staged, stage

CONFIG: dict[str, Any] = {
    "model": {
        "type": "llama",
        "vocab_size": 600,
        "context_length": 2048,
        "eos_token_id": [2, 7],
        "bos_token_id": 1,
        "decoder": {"filename": "model.onnx"},
    },
    "search": {"max_length": 2048, "do_sample": False, "top_k": 1},
}
FILES = ("model.onnx", "model.onnx.data", "tokenizer.json", "inference_model.json", "adapters/one/weights.bin")


@pytest.fixture
def registration(tmp_path: Path) -> Registration:
    folder = tmp_path / "foundry" / "models" / "slmops" / "bot-int4-generic-cpu-3"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"contents of {name}")
    configure(folder)
    return Registration(foundry_id="bot-int4-generic-cpu:3", path=folder, prompt_template_exact=True, answer="Hello.")


def configure(folder: Path, **search: Any) -> None:
    config = {**CONFIG, "search": {**CONFIG["search"], **search}}
    (folder / "genai_config.json").write_text(json.dumps(config))


def read(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    return config


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_in_foundrys_layout_with_linked_files(registration: Registration, tmp_path: Path) -> None:
    before = files(registration.path)
    staged = stage(registration, tmp_path / "staged")
    folder = tmp_path / "staged" / "models" / "slmops" / "bot-int4-generic-cpu-3"
    assert staged == Staged(
        home=tmp_path / "staged", folder=folder, foundry_id="bot-int4-generic-cpu:3", context_length=2048
    )
    assert files(folder).keys() == {*FILES, "genai_config.json"}
    assert all((folder / name).samefile(registration.path / name) for name in FILES)
    assert read(folder) == CONFIG
    # What lay there before is gone, and what is deployed is not touched.
    (folder / "stale.onnx").write_text("stale")
    again = stage(registration, tmp_path / "staged", fixed_length=True, context_length=64)
    assert files(again.folder).keys() == {*FILES, "genai_config.json"}
    assert files(registration.path) == before
    assert not (folder / "genai_config.json").samefile(registration.path / "genai_config.json")


def test_answers_that_do_not_end_before_their_limit(registration: Registration, tmp_path: Path) -> None:
    staged = stage(registration, tmp_path / "staged", fixed_length=True)
    assert read(staged.folder) == {**CONFIG, "model": {**CONFIG["model"], "eos_token_id": [599]}}


@pytest.mark.parametrize(
    ("max_length", "asked", "context", "expected_max_length"),
    [
        (2048, 256, 256, 256),
        (2048, 2047, 2047, 2047),
        (2048, 2048, 2048, 2048),
        (2048, 4096, 2048, 2048),  # not raised
        (2048, None, 2048, 2048),
        (128, None, 2048, 128),  # conversations are to be shorter than the context
        (128, 4096, 2048, 128),
        (128, 256, 256, 128),
        (128, 64, 64, 64),
    ],
)
def test_a_context_to_pretend(
    registration: Registration,
    tmp_path: Path,
    max_length: int,
    asked: int | None,
    context: int,
    expected_max_length: int,
) -> None:
    configure(registration.path, max_length=max_length)
    staged = stage(registration, tmp_path / "staged", context_length=asked)
    config = read(staged.folder)
    assert config["model"] == {**CONFIG["model"], "context_length": context}
    assert config["search"] == {**CONFIG["search"], "max_length": expected_max_length}
    assert staged.context_length == context
