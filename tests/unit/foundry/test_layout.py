"""The folder that Foundry Local reads, and when it is a new version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.core.files import remove_scratch
from slmops.core.job import Job
from slmops.core.values import MANIFEST, Variant
from slmops.foundry import layout
from slmops.foundry.prompt_template import Derived
from tests.values import CONTENTS, checkpoint, write_variant

STRINGS = {role: f"<|im_start|>{role}\n{{Content}}<|im_end|>\n" for role in ("system", "user", "assistant")}
STRINGS["prompt"] = STRINGS["user"] + "<|im_start|>assistant\n"
DERIVED = Derived(prompt_template=STRINGS, exact=True, reason=None)
CALLED = "support-bot-int4-generic-cpu"
# Processes have smaller numbers: Linux's largest is 2^22.
DEAD = 2**22 + 1


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    return write_variant(tmp_path / "variants" / "int4-0123")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "foundry"


def place(variant: Variant, home: Path, derived: Derived = DERIVED, **asked: Any) -> tuple[Path, int, bool]:
    return layout.place(variant, "support-bot", Job(model="m", **asked), derived, home)


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def test_first_version_in_foundrys_model_cache(variant: Variant, home: Path) -> None:
    folder, version, new = place(variant, home)
    assert (folder, version, new) == (home / "models" / "slmops" / f"{CALLED}-1", 1, True)
    # What is kept as proof only stays in the variant's own folder.
    proof = {"olive.log", "olive_config.json"}
    assert {path.name for path in folder.iterdir()} == {*CONTENTS, MANIFEST, "inference_model.json"} - proof


def test_inference_model_in_the_form_of_the_tutorial(variant: Variant, home: Path) -> None:
    folder, _, _ = place(variant, home, max_length=1024, temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    assert read(folder / "inference_model.json") == {
        "Name": f"{CALLED}:1",
        "Description": "tiny (int4), converted by slmops",
        "Version": "1",
        "PromptTemplate": {
            "system": "<|im_start|>system\n{Content}<|im_end|>\n",
            "user": "<|im_start|>user\n{Content}<|im_end|>\n",
            "assistant": "<|im_start|>assistant\n{Content}<|im_end|>\n",
            "prompt": "<|im_start|>user\n{Content}<|im_end|>\n<|im_start|>assistant\n",
        },
        "ModelConfig": {"max_length": 1024, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
    }


def test_template_in_other_scripts_stays_readable(variant: Variant, home: Path) -> None:
    folder, _, _ = place(variant, home, Derived(prompt_template={"prompt": "問 {Content} 答"}, exact=False, reason="r"))
    assert "問 {Content} 答" in (folder / "inference_model.json").read_text(encoding="utf-8")


def test_no_trusted_strings_are_said_as_null(variant: Variant, home: Path) -> None:
    folder, _, _ = place(variant, home, Derived(prompt_template=None, exact=False, reason="r"))
    assert read(folder / "inference_model.json")["PromptTemplate"] is None


def test_search_settings_reach_the_config_that_the_runtime_reads(variant: Variant, home: Path) -> None:
    folder, _, _ = place(variant, home, max_length=1024, temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    assert read(folder / "genai_config.json") == {
        "model": {"type": "llama"},
        "search": {
            "max_length": 1024,
            "do_sample": True,  # a temperature without sampling would do nothing
            "temperature": 0.7,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
        },
    }
    exported = json.loads(CONTENTS["genai_config.json"])
    assert read(variant.path / "genai_config.json") == exported, "the variant itself is not touched"


@pytest.mark.parametrize(
    ("asked", "search"),
    [
        ({}, {"max_length": 2048}),
        ({"temperature": 0}, {"max_length": 2048}),
        ({"top_p": 0.5}, {"max_length": 2048, "top_p": 0.5}),
        ({"max_length": 100_000}, {"max_length": 1500}),
        ({"max_length": 1500}, {"max_length": 1500}),
        ({"max_length": 16}, {"max_length": 16}),
    ],
)
def test_search_settings(tmp_path: Path, home: Path, asked: dict[str, Any], search: dict[str, Any]) -> None:
    made = write_variant(tmp_path / "v").model_copy(update={"checkpoint": checkpoint(context_length=1500)})
    folder, _, _ = place(made, home, **asked)
    described = {**search, "temperature": 0}
    assert read(folder / "genai_config.json")["search"] == {**described, "do_sample": False}
    assert read(folder / "inference_model.json")["ModelConfig"] == described


@pytest.mark.parametrize(
    ("asked", "sampled", "temperature"),
    [({}, True, 0.6), ({"temperature": 0}, False, 0), ({"temperature": 2}, True, 2)],
)
def test_a_checkpoint_that_wants_to_be_sampled(
    tmp_path: Path, home: Path, asked: dict[str, Any], sampled: bool, temperature: float
) -> None:
    exported = json.dumps({"model": {}, "search": {"do_sample": True, "temperature": 0.6}})
    folder, _, _ = place(write_variant(tmp_path / "v", contents={"genai_config.json": exported}), home, **asked)
    assert read(folder / "genai_config.json")["search"] == {"do_sample": sampled, "temperature": temperature}


def test_exporter_without_search_settings(tmp_path: Path, home: Path) -> None:
    made = write_variant(tmp_path / "v", contents={"genai_config.json": '{"model": {}}'})
    folder, _, _ = place(made, home)
    assert read(folder / "genai_config.json") == {"model": {}, "search": {"temperature": 0}}
    assert read(folder / "inference_model.json")["ModelConfig"] == {"temperature": 0}


def test_same_again_keeps_folder_and_version(variant: Variant, home: Path) -> None:
    first, _, _ = place(variant, home, temperature=0.5)
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert place(variant, home, temperature=0.5) == (first, 1, False)
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert [path.name for path in first.parent.iterdir()] == [f"{CALLED}-1"]


def test_changed_setting_is_a_new_version_beside_the_old(variant: Variant, home: Path) -> None:
    first, _, _ = place(variant, home)
    second, version, new = place(variant, home, top_p=0.5)
    assert (second.name, version, new) == (f"{CALLED}-2", 2, True)
    assert read(second / "inference_model.json")["Name"] == f"{CALLED}:2"
    assert read(first / "inference_model.json")["ModelConfig"] == {"max_length": 2048, "temperature": 0}
    assert place(variant, home) == (first, 1, False), "the old setting is still version 1"


def test_changed_prompt_template_or_model_is_a_new_version(variant: Variant, tmp_path: Path, home: Path) -> None:
    place(variant, home)
    assert place(variant, home, Derived(prompt_template={"prompt": "{Content}"}, exact=False, reason="r"))[1:] == (
        2,
        True,
    )
    other = write_variant(tmp_path / "int4-4567")
    assert place(other, home)[1:] == (3, True)


@pytest.mark.parametrize(
    "damage", ["shorter", "altered", "missing", "no manifest", "no description", "broken description", "config"]
)
def test_damaged_folder_is_not_used_again(variant: Variant, home: Path, damage: str) -> None:
    folder, _, _ = place(variant, home)
    data = folder / "model.onnx.data"
    size = data.stat().st_size
    if damage in {"shorter", "altered", "missing"}:
        data.unlink()  # the name here, not the bytes that the variant's folder shares
    if damage == "shorter":
        data.write_text("short", encoding="utf-8")
    if damage == "altered":
        data.write_text("x" * size, encoding="utf-8")
    if damage == "config":
        (folder / "genai_config.json").write_text('{"search": {"max_length": 2048}}', encoding="utf-8")
    if damage == "no manifest":
        (folder / MANIFEST).unlink()
    if "description" in damage:
        (folder / "inference_model.json").unlink()
    if damage == "broken description":
        (folder / "inference_model.json").write_text("{", encoding="utf-8")
    assert place(variant, home)[1:] == (2, True)


def test_versions_count_on_from_the_highest(variant: Variant, home: Path) -> None:
    models = home / "models" / "slmops"
    (models / f"{CALLED}-9").mkdir(parents=True)
    (models / f"{CALLED}-10").mkdir()
    (models / f"{CALLED}-old").mkdir()
    assert place(variant, home)[1] == 11


def test_models_do_not_count_each_others_versions(variant: Variant, home: Path) -> None:
    place(variant, home)
    for name in ("bot", "support-bot-int4-generic-cpu"):
        assert layout.place(variant, name, Job(model="m"), DERIVED, home)[1:] == (1, True)


def test_scratch_folder_of_a_killed_process_is_no_version(variant: Variant, home: Path) -> None:
    models = home / "models" / "slmops"
    scratch = models / f".{CALLED}-1.{DEAD}.part"
    scratch.mkdir(parents=True)
    (scratch / "inference_model.json").write_text("{", encoding="utf-8")
    folder, version, new = place(variant, home)
    assert (folder.name, version, new) == (f"{CALLED}-1", 1, True)
    assert (folder / "tokenizer.json").is_file()
    remove_scratch(models)
    assert [path.name for path in models.iterdir()] == [f"{CALLED}-1"]


def test_failure_half_way_leaves_no_folder(variant: Variant, home: Path) -> None:
    (variant.path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError):
        place(variant, home)
    assert list((home / "models" / "slmops").iterdir()) == []


def test_weights_are_linked_and_not_copied(variant: Variant, home: Path) -> None:
    folder, _, _ = place(variant, home)
    for file in ("model.onnx", "model.onnx.data", "tokenizer.json", MANIFEST):
        assert (folder / file).samefile(variant.path / file)
    assert not (folder / "genai_config.json").samefile(variant.path / "genai_config.json")


def test_name_says_that_any_cpu_runs_it() -> None:
    assert layout.model_name("support-bot", "int4") == CALLED
