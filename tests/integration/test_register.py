"""Variants in Foundry Local for real: seen and asked by a process that knows only its SDK."""

import itertools
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slmops.conversion import store
from slmops.core.errors import RegistrationError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Variant
from slmops.foundry.register import Answered, register
from tests import making, tiny
from tests.application import application

pytestmark = pytest.mark.integration

Variants = dict[str, Variant]


@pytest.fixture(scope="module")
def converted(job: Job, stock: Settings) -> Variants:
    return {name: making.variant(name, job, stock) for name in ("fp32", "int8")}


@pytest.fixture
def variants(converted: Variants, fresh: Settings) -> Variants:
    """The variants as this home has them, to be linked or damaged at will."""
    folders = {name: fresh.variants / variant.key for name, variant in converted.items()}
    for name, folder in folders.items():
        shutil.copytree(converted[name].path, folder)
    return {name: variant for name, folder in folders.items() if (variant := store.load(folder))}


def folders(home: Settings) -> list[str]:
    return sorted(path.name for path in (home.foundry / "models" / "slmops").iterdir())


def test_a_registered_variant_answers_to_an_application(variants: Variants, job: Job, fresh: Settings) -> None:
    registration = register(variants["int8"], "tiny", job, fresh)
    assert registration.foundry_id == "tiny-int8-generic-cpu:1"
    assert registration.path == fresh.foundry / "models" / "slmops" / "tiny-int8-generic-cpu-1"
    assert registration.answer.strip()

    found = application(fresh.foundry, registration.foundry_id)
    assert found["listed"] == [registration.foundry_id]
    answer = found["answers"][registration.foundry_id]
    assert answer["tokens"] == 24
    assert answer["text"] == registration.answer  # greedy, and to the same first prompt
    assert Path(answer["path"]) == registration.path


def test_twice_is_harmless_and_a_change_is_a_new_version(variants: Variants, job: Job, fresh: Settings) -> None:
    first = register(variants["fp32"], "tiny", job, fresh)
    # What has answered is not asked again; other packages, or a job that measures anew, ask.
    [proof] = (fresh.foundry / "answered").iterdir()
    text = proof.read_text()
    known = Answered.model_validate_json(text).model_copy(update={"answer": "Known."})
    proof.write_text(known.model_dump_json())
    assert register(variants["fp32"], "tiny", job, fresh) == first.model_copy(update={"answer": "Known."})
    assert register(variants["fp32"], "tiny", job.model_copy(update={"remeasure": True}), fresh) == first
    for other in (known.model_copy(update={"versions": {}}).model_dump_json(), "{"):
        proof.write_text(other)
        assert register(variants["fp32"], "tiny", job, fresh) == first
    assert proof.read_text() == text
    assert application(fresh.foundry)["listed"] == [first.foundry_id]

    changed = job.model_copy(update={"max_length": 128, "temperature": 0.5})
    second = register(variants["fp32"], "tiny", changed, fresh)
    assert second.foundry_id == "tiny-fp32-generic-cpu:2"
    found = application(fresh.foundry, first.foundry_id, second.foundry_id)
    assert found["listed"] == [first.foundry_id, second.foundry_id]
    assert [found["answers"][known.foundry_id]["tokens"] for known in (first, second)] == [24, 24]
    # Back to the first settings is back to the first version.
    assert register(variants["fp32"], "tiny", job, fresh) == first
    assert folders(fresh) == ["tiny-fp32-generic-cpu-1", "tiny-fp32-generic-cpu-2"]


def test_two_at_once(variants: Variants, job: Job, fresh: Settings) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda variant: register(variant, "tiny", job, fresh), variants.values()))
    assert [done.foundry_id for done in both] == ["tiny-fp32-generic-cpu:1", "tiny-int8-generic-cpu:1"]
    assert application(fresh.foundry)["listed"] == [done.foundry_id for done in both]


def edit(old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = folder / "genai_config.json"
        config.write_text(config.read_text().replace(old, new))

    return change


def test_a_broken_model_leaves_nothing(variants: Variants, converted: Variants, job: Job, fresh: Settings) -> None:
    good = register(variants["fp32"], "tiny", job, fresh)
    broken = variants["int8"]
    damages: tuple[tuple[Callable[[Path], object], str], ...] = (
        (lambda folder: os.truncate(folder / "model.onnx.data", 1000), "Foundry Local refuses tiny-int8-generic-cpu:1"),
        (edit("model.onnx", "other.onnx"), "other.onnx failed. File doesn't exist"),
        (edit('"provider_options": []', '"provider_options": [{"cuda": {}}]'), "requires CUDAExecutionProvider"),
    )
    for damage, said in damages:
        shutil.rmtree(broken.path)
        shutil.copytree(converted["int8"].path, broken.path)
        damage(broken.path)
        with pytest.raises(RegistrationError, match=re.escape(said)):
            register(broken, "tiny", job, fresh)
        assert folders(fresh) == ["tiny-fp32-generic-cpu-1"]
        registry = (fresh.foundry / "models" / "foundry.local.modelinfo.json").read_text()
        assert "tiny-fp32-generic-cpu" in registry
        assert "int8" not in registry
    assert application(fresh.foundry, good.foundry_id)["listed"] == [good.foundry_id]


def test_a_home_that_moved(variants: Variants, job: Job, fresh: Settings, tmp_path: Path) -> None:
    before = register(variants["fp32"], "tiny", job, fresh)
    moved = Settings(home=tmp_path / "elsewhere")
    fresh.home.rename(moved.home)
    variant = store.load(moved.variants / variants["fp32"].key)
    after = register(variant, "tiny", job, moved)
    assert after.foundry_id == before.foundry_id
    assert after.path == moved.foundry / before.path.relative_to(fresh.foundry)
    found = application(moved.foundry, after.foundry_id)
    assert found["listed"] == [after.foundry_id]
    assert Path(found["answers"][after.foundry_id]["path"]) == after.path
    assert found["answers"][after.foundry_id]["text"] == before.answer


def test_a_turn_ends_where_the_chat_template_ends_it(tmp_path: Path, fresh: Settings) -> None:
    """Whatever the checkpoint's configs name."""
    tokenizer = tiny.tokenizer()
    newline, *said = (tokenizer(text)["input_ids"][-1] for text in "\nABCXYZ")
    path = [newline, *said[:3], 2, *said[3:], 0]  # after "assistant\n": ABC<|im_end|>XYZ<|endoftext|>
    model = tiny.chain(tmp_path / "chain", dict(itertools.pairwise(path)), eos_token_id=0, pad_token_id=0)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(model)
    asked = making.job(model)
    made = making.variant("fp32", asked, fresh)
    assert register(made, "chain", asked, fresh).answer == "ABC"
