"""The folder that Foundry Local reads, and when it is a new version."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.core import machine
from slmops.core.errors import RegistrationError
from slmops.core.job import Job
from slmops.core.values import MANIFEST, Registration, Variant
from slmops.foundry import layout
from slmops.foundry.layout import Staged, stage
from tests.checkpoint_folders import tree
from tests.values import CONTENTS, checkpoint, write_variant

STRINGS = {role: f"<|im_start|>{role}\n{{Content}}<|im_end|>\n" for role in ("system", "user", "assistant")}
CALLED = "support-bot-int4-generic-cpu"


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    return write_variant(tmp_path / "variants" / "int4-0123")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "foundry"


def place(
    variant: Variant, home: Path, strings: dict[str, str] | None = STRINGS, **asked: Any
) -> tuple[Path, int, bool]:
    return layout.place(variant, "support-bot", Job(model="m", **asked), strings, home)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# The decoder of a config whose exporter said nothing of it.
THREADS = {"session_options": {"intra_op_num_threads": machine.physical_cores()}}


def test_first_version_in_foundrys_model_cache(variant: Variant, home: Path) -> None:
    asked = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
    folder, version, new = place(variant, home, **asked)
    assert (folder, version, new) == (home / "models" / "slmops" / f"{CALLED}-1", 1, True)
    # What is kept as proof only stays in the variant's own folder.
    proof = {"olive.log", "olive_config.json"}
    ours = {MANIFEST, "inference_model.json", layout.RELEASED_CONFIG}
    assert {path.name for path in folder.iterdir()} == {*CONTENTS, *ours} - proof
    for file in ("model.onnx", "model.onnx.data", "tokenizer.json", MANIFEST):
        assert (folder / file).samefile(variant.path / file)  # linked
    # Settings are where the tutorial and where the runtime have them.
    assert read(folder / "inference_model.json") == {
        "Name": f"{CALLED}:1",
        "Description": "tiny (int4), converted by slmops",
        "Version": "1",
        "PromptTemplate": STRINGS,
        "ModelConfig": {"max_length": 2048, **asked},
    }
    # A temperature without sampling would do nothing.
    assert read(folder / "genai_config.json") == {
        "model": {**json.loads(CONTENTS["genai_config.json"])["model"], "context_length": 2048, "decoder": THREADS},
        "search": {"max_length": 2048, **asked, "do_sample": True, "chunk_size": layout.CHUNK},
    }
    exported = json.loads(CONTENTS["genai_config.json"])
    assert read(variant.path / "genai_config.json") == exported, "the variant itself is not touched"


@pytest.mark.parametrize(("asked", "threads"), [(None, 3), (1, 1)])
def test_threads_are_this_machines_unless_the_recipe_sets_them(
    variant: Variant, home: Path, monkeypatch: pytest.MonkeyPatch, asked: int | None, threads: int
) -> None:
    options = {} if asked is None else {"intra_op_num_threads": asked}
    if options:  # as the conversion leaves it
        exported = read(variant.path / "genai_config.json")
        exported["model"]["decoder"] = {"session_options": options}
        (variant.path / "genai_config.json").write_text(json.dumps(exported))
    monkeypatch.setattr(machine, "physical_cores", lambda: 3)
    folder, _, _ = place(variant, home)
    config = folder / "genai_config.json"
    assert read(config)["model"]["decoder"]["session_options"] == {"intra_op_num_threads": threads}

    # Another machine, and a device, gets another one. What is released has this machine's number nowhere.
    before = read(layout.released(folder, "genai_config.json"))
    assert before["model"].get("decoder", {}) == ({"session_options": options} if options else {})
    for cores in (8, 3, 2):
        monkeypatch.setattr(machine, "physical_cores", lambda cores=cores: cores)
        layout.fit(folder)
        assert read(layout.released(folder, "genai_config.json")) == before
        assert read(config)["model"]["decoder"]["session_options"] == {"intra_op_num_threads": asked or cores}
        assert (folder / layout.RELEASED_CONFIG).exists() == (asked is None)


GREEDY = {"max_length": 2048, "do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.6}


@pytest.mark.parametrize(
    ("exported", "asked", "search"),
    [
        (GREEDY, {}, {"do_sample": False, "temperature": 0}),
        (GREEDY, {"temperature": 0}, {"do_sample": False, "temperature": 0}),
        (GREEDY, {"top_p": 0.5}, {"do_sample": False, "temperature": 0, "top_p": 0.5}),
        (SAMPLED, {}, SAMPLED),
        (SAMPLED, {"temperature": 0}, {"do_sample": False, "temperature": 0}),
        (SAMPLED, {"temperature": 2}, {"do_sample": True, "temperature": 2}),
        (None, {}, {"temperature": 0}),
    ],
)
def test_search_settings(
    tmp_path: Path, home: Path, exported: dict[str, Any] | None, asked: dict[str, Any], search: dict[str, Any]
) -> None:
    config = json.dumps({"model": {}} if exported is None else {"model": {}, "search": exported})
    made = write_variant(tmp_path / "v", contents={"genai_config.json": config})
    made = made.model_copy(update={"checkpoint": checkpoint(context_length=1500)})
    folder, _, _ = place(made, home, **asked)
    search = {**search, "max_length": 1500, "chunk_size": layout.CHUNK}
    assert read(folder / "genai_config.json") == {
        "model": {"context_length": 1500, "decoder": THREADS},
        "search": search,
    }
    described = {key: value for key, value in search.items() if key not in ("do_sample", "chunk_size")}
    assert read(folder / "inference_model.json")["ModelConfig"] == described


@pytest.mark.parametrize(("border", "chunks"), [(1024, False), (2048, True)])
def test_a_prompt_across_a_longrope_border_is_whole(tmp_path: Path, home: Path, border: int, chunks: bool) -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": border}
    made = write_variant(tmp_path / "v", contents={"config.json": json.dumps({"rope_scaling": rope})})
    folder, _, _ = place(made, home)
    assert ("chunk_size" in read(folder / "genai_config.json")["search"]) == chunks


def test_a_change_is_a_new_version_beside_the_old(variant: Variant, tmp_path: Path, home: Path) -> None:
    first, _, _ = place(variant, home)
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert place(variant, home) == (first, 1, False)
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert [path.name for path in first.parent.iterdir()] == [f"{CALLED}-1"]
    second, version, new = place(variant, home, top_p=0.5)
    assert (second.name, version, new) == (f"{CALLED}-2", 2, True)
    assert read(second / "inference_model.json")["Name"] == f"{CALLED}:2"
    assert read(first / "inference_model.json")["ModelConfig"] == {"max_length": 2048, "temperature": 0}
    for number, strings in ((3, {"prompt": "問 {Content} 答"}), (4, None)):
        folder, *placed = place(variant, home, strings)
        assert placed == [number, True]
        assert read(folder / "inference_model.json")["PromptTemplate"] == strings
    assert place(write_variant(tmp_path / "int4-4567"), home)[1:] == (5, True)
    assert place(variant, home) == (first, 1, False), "the old setting is still version 1"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.onnx.data", None),
        ("model.onnx.data", "short"),
        ("model.onnx.data", "x" * len(CONTENTS["model.onnx.data"])),
        (layout.RELEASED_CONFIG, '{"search": {"max_length": 2048}}'),
        (MANIFEST, None),
        ("inference_model.json", None),
        ("inference_model.json", "{"),
    ],
)
def test_damaged_folder_is_not_used_again(variant: Variant, home: Path, file: str, content: str | None) -> None:
    folder, _, _ = place(variant, home)
    (folder / file).unlink()  # the name here, not the bytes that the variant's folder shares
    if content is not None:
        (folder / file).write_text(content)
    assert place(variant, home)[1:] == (2, True)


def test_a_config_that_was_altered_is_made_again(variant: Variant, home: Path) -> None:
    config = place(variant, home)[0] / "genai_config.json"
    before = read(config)
    config.write_text('{"search": {"max_length": 2048}}')
    assert place(variant, home)[1:] == (1, False)
    assert read(config) == before


def test_a_variant_whose_config_is_broken(variant: Variant, home: Path) -> None:
    (variant.path / "genai_config.json").write_text("{")
    with pytest.raises(RegistrationError, match=r"genai_config\.json cannot be read"):
        place(variant, home)
    assert not home.exists()


def test_versions_count_on_from_the_highest_of_the_model(variant: Variant, home: Path) -> None:
    for name in (f"{CALLED}-9", f"{CALLED}-10", f"{CALLED}-old", f".{CALLED}-12.1.part"):
        (home / "models" / "slmops" / name).mkdir(parents=True)
    assert place(variant, home)[1] == 11
    for name in ("bot", "support-bot-int4-generic-cpu"):
        assert layout.place(variant, name, Job(model="m"), STRINGS, home)[1:] == (1, True)


# --- staged to be measured

MODEL = {"type": "llama", "vocab_size": 600, "context_length": 2048, "eos_token_id": [2, 7], "bos_token_id": 1}
FILES = ("model.onnx", "model.onnx.data", "tokenizer.json", "inference_model.json", "adapters/one/weights.bin")


@pytest.fixture
def registration(tmp_path: Path) -> Registration:
    folder = tmp_path / "foundry" / "models" / "slmops" / "bot-int4-generic-cpu-3"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"contents of {name}")
    configure(folder, GREEDY)
    return Registration(foundry_id="bot-int4-generic-cpu:3", path=folder, answer="Hello.")


def configure(folder: Path, search: dict[str, Any]) -> None:
    (folder / "genai_config.json").write_text(json.dumps({"model": MODEL, "search": search}))


def test_staged_in_foundrys_layout_with_linked_files(registration: Registration, tmp_path: Path) -> None:
    before, home = tree(registration.path), tmp_path / "staged"
    staged = stage(registration, home)
    folder = home / "models" / "slmops" / "bot-int4-generic-cpu-3"
    assert staged == Staged(home=home, folder=folder, foundry_id="bot-int4-generic-cpu:3", context_length=2048)
    assert tree(folder).keys() == {*FILES, "genai_config.json"}
    assert all((folder / name).samefile(registration.path / name) for name in FILES)
    assert read(folder / "genai_config.json") == {"model": MODEL, "search": GREEDY}
    # Answers that do not end before their limit. What lay there before is gone, and what is deployed is not touched.
    (folder / "stale.onnx").write_text("stale")
    again = stage(registration, home, fixed_length=True)
    assert tree(again.folder).keys() == {*FILES, "genai_config.json"}
    assert read(folder / "genai_config.json") == {"model": {**MODEL, "eos_token_id": [599]}, "search": GREEDY}
    assert tree(registration.path) == before


@pytest.mark.parametrize(
    ("max_length", "asked", "context", "expected"),
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
    registration: Registration, tmp_path: Path, max_length: int, asked: int | None, context: int, expected: int
) -> None:
    configure(registration.path, {**GREEDY, "max_length": max_length})
    staged = stage(registration, tmp_path / "staged", context_length=asked)
    model, search = {**MODEL, "context_length": context}, {**GREEDY, "max_length": expected}
    assert read(staged.folder / "genai_config.json") == {"model": model, "search": search}
    assert staged.context_length == context
