"""Variants in Foundry Local for real: seen and asked by a process that knows only its SDK."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from slmops.conversion import store
from slmops.core.errors import RegistrationError
from slmops.core.files import sha256
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Variant
from slmops.foundry.register import register
from tests import making
from tests.application import application

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def job(talkative: Path) -> Job:
    return making.job(talkative)


@pytest.fixture(scope="module")
def converted(job: Job, stock: Settings) -> dict[str, Variant]:
    return {name: making.variant(name, job, stock) for name in ("fp32", "int8")}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def variants(converted: dict[str, Variant], settings: Settings) -> dict[str, Variant]:
    """The variants as this home has them, to be linked or damaged at will."""
    found = {}
    for name, variant in converted.items():
        folder = settings.variants / variant.key
        folder.mkdir(parents=True)
        for path in variant.path.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        loaded = store.load(folder)
        assert loaded is not None
        found[name] = loaded
    return found


def folders(settings: Settings) -> list[str]:
    return sorted(path.name for path in (settings.foundry / "models" / "slmops").iterdir())


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_a_registered_variant_answers_to_an_application(
    variants: dict[str, Variant], job: Job, settings: Settings
) -> None:
    registration = register(variants["int8"], "tiny", job, settings)
    assert registration.foundry_id == "tiny-int8-generic-cpu:1"
    assert registration.path == settings.foundry / "models" / "slmops" / "tiny-int8-generic-cpu-1"
    assert registration.prompt_template_exact
    assert registration.answer.strip()

    found = application(settings.foundry, registration.foundry_id)
    assert found["listed"] == [registration.foundry_id]
    answer = found["answers"][registration.foundry_id]
    assert answer["tokens"] == 24
    assert answer["text"] == registration.answer  # greedy, and to the same first prompt
    assert Path(answer["path"]) == registration.path

    # All of the variant but the two that prove how it was made, and with search settings of its own.
    deployed = {path.name: sha256(path) for path in registration.path.iterdir()}
    made = {file.name: file.sha256 for file in variants["int8"].files}
    changed = {"genai_config.json", "inference_model.json", "variant.json"}
    assert deployed.keys() ^ made.keys() == {"olive.log", "olive_config.json", "inference_model.json", "variant.json"}
    assert all(deployed[name] == made[name] for name in deployed.keys() - changed)
    assert read(registration.path / "inference_model.json") == {
        "Name": "tiny-int8-generic-cpu:1",
        "Description": "tiny (int8), converted by slmops",
        "Version": "1",
        "PromptTemplate": {
            **{role: f"<|im_start|>{role}\n{{Content}}<|im_end|>\n" for role in ("system", "user", "assistant")},
            "prompt": "<|im_start|>user\n{Content}<|im_end|>\n<|im_start|>assistant\n",
        },
        "ModelConfig": {"max_length": 2048, "temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0},
    }


def test_twice_is_harmless_and_changed_settings_are_a_new_version(
    variants: dict[str, Variant], job: Job, settings: Settings
) -> None:
    first = register(variants["fp32"], "tiny", job, settings)
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    assert register(variants["fp32"], "tiny", job, settings) == first
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before
    assert application(settings.foundry)["listed"] == [first.foundry_id]

    changed = job.model_copy(update={"max_length": 128, "temperature": 0.5})
    second = register(variants["fp32"], "tiny", changed, settings)
    assert second.foundry_id == "tiny-fp32-generic-cpu:2"
    assert second.path != first.path
    search = read(second.path / "genai_config.json")["search"]
    assert (search["max_length"], search["temperature"], search["do_sample"]) == (128, 0.5, True)
    assert read(first.path / "genai_config.json")["search"]["max_length"] == 2048
    found = application(settings.foundry, first.foundry_id, second.foundry_id)
    assert found["listed"] == [first.foundry_id, second.foundry_id]
    assert [found["answers"][known.foundry_id]["tokens"] for known in (first, second)] == [24, 24]
    # Back to the first settings is back to the first version.
    assert register(variants["fp32"], "tiny", job, settings) == first
    assert folders(settings) == ["tiny-fp32-generic-cpu-1", "tiny-fp32-generic-cpu-2"]


def test_two_at_once(variants: dict[str, Variant], job: Job, settings: Settings) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda variant: register(variant, "tiny", job, settings), variants.values()))
    assert [done.foundry_id for done in both] == ["tiny-fp32-generic-cpu:1", "tiny-int8-generic-cpu:1"]
    assert application(settings.foundry)["listed"] == [done.foundry_id for done in both]


def truncate(variant: Variant) -> None:
    os.truncate(variant.path / "model.onnx.data", 1000)


def wrong_file(variant: Variant) -> None:
    path = variant.path / "genai_config.json"
    path.write_text(path.read_text().replace("model.onnx", "other.onnx"))


def cuda(variant: Variant) -> None:
    path = variant.path / "genai_config.json"
    config = read(path)
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    path.write_text(json.dumps(config))


def no_json(variant: Variant) -> None:
    (variant.path / "genai_config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "Foundry Local refuses tiny-int8-generic-cpu:1: "),
        (wrong_file, "other.onnx failed. File doesn't exist"),
        (cuda, "model 'tiny-int8-generic-cpu:1' requires CUDAExecutionProvider"),
        (no_json, "genai_config.json cannot be read"),
    ],
)
def test_a_broken_model_leaves_nothing(
    variants: dict[str, Variant], job: Job, settings: Settings, damage: Callable[[Variant], None], said: str
) -> None:
    good = register(variants["fp32"], "tiny", job, settings)
    damage(variants["int8"])
    with pytest.raises(RegistrationError) as caught:
        register(variants["int8"], "tiny", job, settings)
    assert said in caught.value.message
    assert folders(settings) == ["tiny-fp32-generic-cpu-1"]
    assert application(settings.foundry, good.foundry_id)["listed"] == [good.foundry_id]
    registry = (settings.foundry / "models" / "foundry.local.modelinfo.json").read_text()
    assert "tiny-fp32-generic-cpu" in registry
    assert "int8" not in registry


def test_a_home_that_moved(variants: dict[str, Variant], job: Job, settings: Settings, tmp_path: Path) -> None:
    before = register(variants["fp32"], "tiny", job, settings)
    moved = Settings(home=tmp_path / "elsewhere")
    settings.home.rename(moved.home)
    variant = store.load(moved.variants / variants["fp32"].key)
    assert variant is not None
    after = register(variant, "tiny", job, moved)
    assert after.foundry_id == before.foundry_id
    assert after.path == moved.foundry / before.path.relative_to(settings.foundry)
    found = application(moved.foundry, after.foundry_id)
    assert found["listed"] == [after.foundry_id]
    assert Path(found["answers"][after.foundry_id]["path"]) == after.path
    assert found["answers"][after.foundry_id]["text"] == before.answer


def test_a_deployed_file_that_was_damaged(variants: dict[str, Variant], job: Job, settings: Settings) -> None:
    first = register(variants["fp32"], "tiny", job, settings)
    data = first.path / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[5000] ^= 255
    data.unlink()
    data.write_bytes(content)
    second = register(variants["fp32"], "tiny", job, settings)
    assert second.foundry_id == "tiny-fp32-generic-cpu:2"
    assert sha256(second.path / "model.onnx.data") == sha256(variants["fp32"].path / "model.onnx.data")
    assert second.answer == first.answer
