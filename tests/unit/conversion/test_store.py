"""Variants on disk: found again if nothing that decides has changed and no byte has; otherwise made again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmops.conversion import store
from slmops.core.values import MANIFEST, Recipe, Variant
from tests.values import CONTENTS, VERSIONS, checkpoint, write_variant

RECIPE = Recipe(name="int4", config={"passes": {"a": {"type": "Rtn"}}, "host": "local"}, bits=4)


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    return write_variant(tmp_path / "int4-0123456789abcdef")


def key(recipe: dict[str, Any] | None = None, versions: dict[str, str] = VERSIONS, **changed: Any) -> str:
    return store.key(RECIPE.model_copy(update=recipe or {}), checkpoint(**changed), versions)


def test_key_is_the_name_and_a_digest_of_what_decides() -> None:
    assert re.fullmatch(r"int4-[0-9a-f]{16}", key())
    same = {
        "order of the config": key({"config": dict(reversed(RECIPE.config.items()))}),
        "what the recipe promises": key({"bits": 8, "baseline": True}),
        "where the checkpoint lies": key(name="other", source="elsewhere", path=Path("/moved")),
        "other packages": key(versions={**VERSIONS, "mlflow": "9", "onnxruntime": "9"}),
        "the recipe's name": key({"name": "mine"}).replace("mine-", "int4-"),
    }
    assert same == dict.fromkeys(same, key())
    others = {
        "the same": key(),
        "config": key({"config": {"passes": {"a": {"type": "Gptq"}}}}),
        "checkpoint": key(digest="d" * 64),
        "package gone": key(versions={name: "1.0" for name in VERSIONS if name != "onnx"}),
        **{name: key(versions={**VERSIONS, name: "2.0"}) for name in store.DECISIVE},
    }
    assert len(set(others.values())) == len(others), others


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


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        pytest.param("model.onnx.data", Path.unlink, id="missing"),
        pytest.param("tokenizer.json", Path.unlink, id="missing tokenizer"),
        pytest.param("model.onnx.data", rewrite(lambda content: content[:-1]), id="truncated"),
        pytest.param("model.onnx.data", rewrite(lambda content: content[:-1] + b"!"), id="altered, of the same size"),
        pytest.param("model.onnx", become_a_folder, id="became a folder"),
        pytest.param(MANIFEST, Path.unlink, id="no manifest"),
        pytest.param(MANIFEST, rewrite(lambda text: text.replace(b"{", b'{"new": 1, ', 1)), id="of a newer program"),
        *(
            pytest.param(MANIFEST, rewrite(lambda _, text=text: text), id=f"manifest {text!r}")
            for text in (b"", b"{", b"null", b"[]", b'"text"', b"{}", b'{"key": "x"}', b"\xff\xfe{}")
        ),
    ],
)
def test_damaged_or_missing(variant: Variant, file: str, damage: Callable[[Path], object]) -> None:
    damage(variant.path / file)
    assert store.load(variant.path) is None
    assert store.load(variant.path / "nothing") is None
