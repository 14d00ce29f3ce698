"""Variants on disk: found again if nothing that decides has changed and no byte has; otherwise made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def key(recipe: dict[str, Any] | None = None, versions: dict[str, str] = VERSIONS, **changed: Any) -> str:
    return store.key(RECIPE.model_copy(update=recipe or {}), checkpoint(**changed), versions)


@pytest.mark.parametrize(
    "same",
    [
        pytest.param(key({"config": dict(reversed(RECIPE.config.items()))}), id="order of the config"),
        pytest.param(key({"bits": 8, "baseline": True}), id="what the recipe promises"),
        pytest.param(key(name="other", source="elsewhere", path=Path("/moved")), id="where the checkpoint lies"),
        pytest.param(key(versions={**VERSIONS, "mlflow": "9", "onnxruntime": "9"}), id="other packages"),
    ],
)
def test_same_key(same: str) -> None:
    assert same == KEY


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(key({"config": {"passes": {"a": {"type": "Gptq"}}}}), id="config"),
        pytest.param(key(digest="d" * 64), id="checkpoint"),
        *(pytest.param(key(versions={**VERSIONS, name: "2.0"}), id=name) for name in store.DECISIVE),
        pytest.param(key(versions={name: "1.0" for name in VERSIONS if name != "onnx"}), id="package gone"),
    ],
)
def test_other_key(other: str) -> None:
    assert other != KEY


def test_other_name_is_another_folder_of_the_same_digest() -> None:
    other = store.key(RECIPE.model_copy(update={"name": "mine"}), checkpoint(), VERSIONS)
    assert other == KEY.replace("int4-", "mine-")


def test_round_trip_and_the_path_is_where_it_is_found(variant: Variant, tmp_path: Path) -> None:
    assert store.load(variant.path) == variant
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


def alter(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"!")
    assert len(content) == path.stat().st_size


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def add_a_key(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "unheard_of": 1}), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        pytest.param("model.onnx.data", Path.unlink, id="missing"),
        pytest.param("tokenizer.json", Path.unlink, id="missing tokenizer"),
        pytest.param("model.onnx.data", lambda path: path.write_bytes(path.read_bytes()[:-1]), id="truncated"),
        pytest.param("model.onnx.data", alter, id="altered, of the same size"),
        pytest.param("model.onnx", become_a_folder, id="became a folder"),
        pytest.param(MANIFEST, Path.unlink, id="no manifest"),
        pytest.param(MANIFEST, add_a_key, id="manifest of a newer program"),
        pytest.param(MANIFEST, lambda path: path.write_bytes(b"\xff\xfe{}"), id="manifest not in UTF-8"),
        *(
            pytest.param(MANIFEST, lambda path, text=text: path.write_text(text), id=f"manifest {text!r}")
            for text in ("", "{", "null", "[]", '"text"', "{}", '{"key": "x"}')
        ),
    ],
)
def test_damaged_or_missing(variant: Variant, file: str, damage: Callable[[Path], object]) -> None:
    damage(variant.path / file)
    assert store.load(variant.path) is None
    assert store.load(variant.path / "nothing") is None
