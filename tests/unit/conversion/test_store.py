"""Variants on disk: found again if nothing that decides has changed and no byte has; otherwise made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmops.conversion import store
from slmops.core.values import MANIFEST, Recipe, Variant
from tests.values import CONTENTS, VERSIONS, checkpoint, write_variant

RECIPE = Recipe(name="int4", config={"passes": {"a": {"type": "Rtn"}}, "host": "local"}, bits=4)
KEY = store.key(RECIPE, checkpoint(), VERSIONS)


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    return write_variant(tmp_path / "int4-0123456789abcdef")


def test_key_is_the_name_and_a_digest() -> None:
    name, _, digest = KEY.rpartition("-")
    assert name == "int4"
    assert len(digest) == 16
    assert int(digest, 16) >= 0


@pytest.mark.parametrize(
    "key",
    [
        store.key(RECIPE.model_copy(update={"config": dict(reversed(RECIPE.config.items()))}), checkpoint(), VERSIONS),
        store.key(RECIPE.model_copy(update={"bits": 8, "baseline": True}), checkpoint(), VERSIONS),
        store.key(RECIPE, checkpoint(name="other", source="elsewhere", path=Path("/moved")), VERSIONS),
        store.key(RECIPE, checkpoint(), {**VERSIONS, "mlflow": "9", "psutil": "9", "onnxruntime": "9"}),
    ],
    ids=["order of the config", "what the recipe promises", "where the checkpoint lies", "other packages"],
)
def test_same_key(key: str) -> None:
    assert key == KEY


@pytest.mark.parametrize(
    "key",
    [
        store.key(RECIPE.model_copy(update={"config": {"passes": {"a": {"type": "Gptq"}}}}), checkpoint(), VERSIONS),
        store.key(RECIPE, checkpoint(digest="d" * 64), VERSIONS),
        *(store.key(RECIPE, checkpoint(), {**VERSIONS, name: "2.0"}) for name in store.DECISIVE),
        store.key(RECIPE, checkpoint(), {name: "1.0" for name in VERSIONS if name != "onnx"}),
    ],
    ids=["config", "checkpoint", *store.DECISIVE, "package gone"],
)
def test_other_key(key: str) -> None:
    assert key != KEY


def test_other_name_is_another_folder_of_the_same_digest() -> None:
    other = store.key(RECIPE.model_copy(update={"name": "mine"}), checkpoint(), VERSIONS)
    assert other == KEY.replace("int4-", "mine-")


def test_round_trip(variant: Variant) -> None:
    assert store.load(variant.path) == variant


def test_path_is_where_it_is_found(variant: Variant, tmp_path: Path) -> None:
    moved = variant.path.rename(tmp_path / "moved")
    found = store.load(moved)
    assert found == variant.model_copy(update={"path": moved})
    assert "path" not in json.loads((moved / MANIFEST).read_text(encoding="utf-8"))


def test_files_are_all_but_the_manifest(variant: Variant) -> None:
    (variant.path / "sub").mkdir()
    (variant.path / "sub" / "x.bin").write_bytes(b"abc")
    files = {file.name: file for file in store.files_of(variant.path)}
    assert set(files) == {*CONTENTS, "sub/x.bin"}
    assert files["sub/x.bin"].size == 3
    assert files["sub/x.bin"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_missing_folder_or_manifest(variant: Variant, tmp_path: Path) -> None:
    assert store.load(tmp_path / "nothing") is None
    (variant.path / MANIFEST).unlink()
    assert store.load(variant.path) is None


@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json"])
def test_missing_file(variant: Variant, name: str) -> None:
    (variant.path / name).unlink()
    assert store.load(variant.path) is None


def test_truncated_file(variant: Variant) -> None:
    data = variant.path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert store.load(variant.path) is None


def test_altered_file_of_the_same_size(variant: Variant) -> None:
    data = variant.path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    assert data.stat().st_size == next(file.size for file in variant.files if file.name == data.name)
    assert store.load(variant.path) is None


def test_file_that_became_a_folder(variant: Variant) -> None:
    (variant.path / "model.onnx").unlink()
    (variant.path / "model.onnx").mkdir()
    assert store.load(variant.path) is None


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"text"', "{}", '{"key": "x"}'])
def test_manifest_that_is_none(variant: Variant, text: str) -> None:
    (variant.path / MANIFEST).write_text(text, encoding="utf-8")
    assert store.load(variant.path) is None


def test_manifest_of_a_newer_program(variant: Variant) -> None:
    manifest = variant.path / MANIFEST
    data = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**data, "unheard_of": 1}), encoding="utf-8")
    assert store.load(variant.path) is None


def test_manifest_that_is_not_utf8(variant: Variant) -> None:
    (variant.path / MANIFEST).write_bytes(b"\xff\xfe{}")
    assert store.load(variant.path) is None
