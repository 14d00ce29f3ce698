"""When a variant is made, when the one that is there is used, and what of it is compared: a function plays Olive."""

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from slmops.conversion import convert as conversion
from slmops.conversion import olive_worker, store, thin_worker, verify_worker
from slmops.conversion.convert import convert
from slmops.conversion.verify_worker import VerifyResult
from slmops.core import machine
from slmops.core.errors import ConversionError
from slmops.core.job import Job, JobContext
from slmops.core.settings import Settings
from slmops.core.values import MANIFEST, Checkpoint, Frozen, Recipe, Variant, Weights
from slmops.processes import children
from slmops.processes.children import Finished
from tests.checkpoint_folders import write_checkpoint, write_json
from tests.values import CONTENTS, VERSIONS, checkpoint, write_variant

RECIPE = Recipe(name="int4", config={"passes": {"a": {"type": "Rtn"}}, "host": "local"}, bits=4)
EIGHT = Recipe(name="int8", config={"passes": {"a": {"type": "Rtn", "bits": 8}}, "host": "local"}, bits=8)
FOUND = Weights(bits_per_weight=4.5, by_bits={"4": 1000}, quantized_ops={})


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    return checkpoint(path=write_checkpoint(tmp_path / "tiny"))


@pytest.fixture
def context(tiny: Checkpoint, settings: Settings) -> JobContext:
    return JobContext(Job(model="m"), "bot", tiny, settings)


def play_olive(monkeypatch: pytest.MonkeyPatch, before: Callable[[], object] = lambda: None) -> list[str]:
    """Let a function do what the child processes do; returns a list to which it adds the path of each conversion."""
    conversions: list[str] = []

    def call(handle: Any, request: Any, **how: Any) -> tuple[Any, Finished]:
        finished = Finished(0, 1.0, [])
        if handle is thin_worker.handle:
            shutil.copytree(request.checkpoint, request.folder, dirs_exist_ok=True)
            return thin_worker.Thinned(layers=2, parameters=500), finished
        if handle is olive_worker.handle:
            how["log"].parent.mkdir(parents=True, exist_ok=True)
            how["log"].write_text("said")
            before()
            made = Path(request.config["output_dir"])
            conversions.append(str(made))
            made.mkdir(parents=True)
            for name, text in CONTENTS.items():
                (made / name).write_text(text if name == "genai_config.json" else f"{text}, {len(conversions)}")
            return Frozen(), finished
        error = 0.01 if request.recipe.baseline else None
        if error is not None and error > request.tolerance:
            raise ConversionError("The export is wrong.", "Another tolerance.")
        return VerifyResult(weights=FOUND, export_error=error), finished

    monkeypatch.setattr(children, "call", call)
    return conversions


def left(context: JobContext) -> set[Path]:
    return {path for folder in (context.settings.variants, context.work) for path in folder.rglob("*")}


@pytest.mark.parametrize(("name", "offline"), [("int4", "1"), ("mine", "0")])
def test_a_recipe_of_the_users_own_may_want_data_from_the_hub_in_one_child(
    context: JobContext, monkeypatch: pytest.MonkeyPatch, name: str, offline: str
) -> None:
    play_olive(monkeypatch)
    call = Mock(side_effect=children.call)
    monkeypatch.setattr(children, "call", call)
    convert(RECIPE.model_copy(update={"name": name}), context)
    environments = [one.kwargs["env"] for one in call.call_args_list]
    assert environments[0]["HF_HUB_OFFLINE"] == offline
    assert environments == [environments[0]] * 2  # else each call had a process of its own


def test_two_names_at_once_convert_once(context: JobContext, monkeypatch: pytest.MonkeyPatch) -> None:
    both_looked = threading.Barrier(2)

    def look(folder: Path) -> Any:
        found = load(folder)
        if len(looks) < 2:
            looks.append(folder)
            both_looked.wait(10)  # neither has found it
        return found

    looks: list[Path] = []
    load = store.load
    monkeypatch.setattr(conversion.store, "load", look)
    conversions = play_olive(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda name: convert(RECIPE, replace(context, name=name)), ("one", "other"))
    assert len(conversions) == 1
    assert one == other == store.load(one.path)


@pytest.fixture
def target(context: JobContext) -> Path:
    """The folder of the recipe's variant."""
    return context.settings.variants / store.key(RECIPE, context.checkpoint, machine.versions())


def test_files_of_a_faster_machine_are_described(
    context: JobContext, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_olive(monkeypatch, before=lambda: write_variant(target))
    assert convert(RECIPE, context) == store.load(target)


def test_an_incomplete_folder_is_made_again_and_a_complete_one_is_used(
    context: JobContext, target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target.mkdir(parents=True)
    (target / "stale").write_text("of the old folder")
    conversions = play_olive(monkeypatch)
    made = [convert(RECIPE, replace(context, name=name)) for name in ("one", "other")]
    assert made[0] == made[1] == store.load(target)
    assert len(conversions) == 1
    assert [record.levelname for record in caplog.records if str(target) in record.getMessage()] == ["WARNING"]
    assert not (target / "stale").exists()


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        *((text, text) for text in ("It took longer than 1 s and was stopped.", "The process was killed by SIGKILL.")),
        ("The process ended with status 1 and no result.", "int4: Olive produced no model."),
    ],
)
def test_an_olive_that_does_not_end_well_leaves_nothing(
    context: JobContext, monkeypatch: pytest.MonkeyPatch, ended: str, said: str
) -> None:
    play_olive(monkeypatch, before=Mock(side_effect=ConversionError(ended)))
    with pytest.raises(ConversionError, match=re.escape(said)):
        convert(RECIPE, context)
    assert left(context) == set()


@pytest.mark.parametrize(("failing", "found"), [("fp32", []), (None, ["fp32"])])
def test_a_recipe_that_goes_on_from_another_follows_it_and_has_what_olive_cached_unless_that_failed(
    context: JobContext, monkeypatch: pytest.MonkeyPatch, failing: str | None, found: list[str]
) -> None:
    export, tie, half = ({"type": kind} for kind in ("ModelBuilder", "GraphSurgeries", "OnnxFloatToFloat16"))
    chains = {"fp32": [export, tie], "int8": [{"type": "Rtn"}, export], "fp16": [export, tie, half]}
    recipes = [
        Recipe(name=name, config={"passes": {str(number): step for number, step in enumerate(chain)}})
        for name, chain in chains.items()
    ]
    made_of: list[str] = []
    cached: dict[str, list[str]] = {}

    def olive() -> None:
        cache = context.work / ".cache" / "olive"
        cached[made_of[-1]] = sorted(path.name for path in cache.iterdir() if path.suffix != ".json")
        (cache / made_of[-1]).touch()
        if failing == made_of[-1]:
            raise ConversionError("The process was killed by SIGKILL.")

    play_olive(monkeypatch, before=olive)
    with conversion.together("bot", context.settings) as child:
        for recipe in conversion.in_order(recipes):
            made_of.append(recipe.name)
            with contextlib.suppress(ConversionError):
                convert(recipe, context, child)
    assert made_of == ["fp32", "fp16", "int8"]
    assert cached == {"fp32": [], "fp16": found, "int8": []}
    assert list(context.work.rglob("*")) == []


def test_without_an_fp32_variant_a_part_of_it_is_compared_before_any_conversion(
    context: JobContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, strict = (
        replace(context, job=Job(model="m", baseline="checkpoint", export_tolerance=most)) for most in (0.1, 0.001)
    )
    conversions = play_olive(monkeypatch)
    for recipe in (RECIPE, EIGHT):
        with pytest.raises(ConversionError, match="The export is wrong") as caught:
            convert(recipe, strict)
        assert caught.value.fix == "Another tolerance."
    assert conversions == [str(context.work / "fp32" / "model")]
    assert left(context) == {context.work / "export_error"}
    shutil.rmtree(context.work)  # as at the job's end
    both = [convert(recipe, own) for recipe in (RECIPE, EIGHT)]
    assert [variant.export_error for variant in both] == [0.01, 0.01]
    assert [Path(made).parent.name for made in conversions] == ["fp32", "fp32", "int4", "int8"]
    shutil.rmtree(context.work)  # but it is known by now
    assert convert(RECIPE, own) == both[0]
    assert len(conversions) == 4
    with pytest.raises(ConversionError, match=r"differs from the checkpoint by 0\.01 .* and 0\.001 is allowed"):
        convert(RECIPE, strict)


@pytest.mark.parametrize(
    ("generation_config", "exported", "deployed"),
    [
        ({}, 2, {"eos_token_id": 2, "pad_token_id": 2}),
        ({"eos_token_id": [7, 2]}, [7, 2], {"eos_token_id": [7, 2], "pad_token_id": 2}),
        ({"eos_token_id": 7}, 7, {"eos_token_id": [2, 7], "pad_token_id": 2}),  # config.json says 2
        ({}, None, {"eos_token_id": [2], "pad_token_id": 2}),
        ({"repetition_penalty": 1.1, "top_k": 20, "min_p": 0.1}, 2, {"repetition_penalty": 1.1, "top_k": 20}),
    ],
)
def test_what_the_exporter_leaves_out_of_its_config(
    tiny: Checkpoint, tmp_path: Path, generation_config: dict[str, Any], exported: Any, deployed: dict[str, Any]
) -> None:
    write_json(tiny.path / "generation_config.json", generation_config)
    config = {"eos_token_id": exported, "pad_token_id": 2 if exported else None}
    config = {"model": {**config, "decoder": {"filename": "model.onnx"}}, "search": {"top_k": 50}}
    write_json(tmp_path / "genai_config.json", config)
    own = EIGHT.model_copy(update={"genai": {"search": {"top_k": 30}, "model": {"decoder": {"threads": 2}}}})
    for recipe, top_k in ((RECIPE, deployed.get("top_k", 50)), (own, 30)):  # what the recipe says comes last
        conversion._complete_genai_config(tmp_path / "genai_config.json", tiny, recipe)
        assert json.loads((tmp_path / "genai_config.json").read_text())["search"]["top_k"] == top_k
    deployed = {**deployed, "top_k": 30, "decoder": {"filename": "model.onnx", "threads": 2}}
    made = json.loads((tmp_path / "genai_config.json").read_text())
    both = {**made["model"], **made["search"]}
    assert {key: both[key] for key in deployed} == deployed
    assert "min_p" not in made["search"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": null}', '{"model": []}'])
def test_a_config_that_names_no_model_is_left_to_the_check_of_the_files(
    tiny: Checkpoint, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "genai_config.json"
    path.write_text(content)
    conversion._complete_genai_config(path, tiny, RECIPE)
    assert path.read_text() == content


# --- variants on disk: found again if nothing that decides has changed and no byte has


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    return write_variant(tmp_path / "int4-0123456789abcdef")


def key(recipe: dict[str, Any] | None = None, versions: dict[str, str] = VERSIONS, **changed: Any) -> str:
    return store.key(RECIPE.model_copy(update=recipe or {}), checkpoint(**changed), versions)


def test_key_is_the_name_and_a_digest_of_what_decides() -> None:
    assert re.fullmatch(r"int4-[0-9a-f]{16}", key())
    same = {
        "order of the config": key({"config": dict(reversed(RECIPE.config.items()))}),
        "what the recipe promises": key({"bits": 8}),
        "where the checkpoint lies": key(name="other", path=Path("/moved"), context_length=64),
        "other packages": key(versions={**VERSIONS, "mlflow": "9", "onnxruntime": "9"}),
        "the recipe's name": key({"name": "mine"}).replace("mine-", "int4-"),
    }
    assert same == dict.fromkeys(same, key())
    others = {
        "the same": key(),
        "config": key({"config": {"passes": {"a": {"type": "Gptq"}}}}),
        "passes": key({"config": {"passes": {"a": {}, "b": {}}}}),
        "the order of passes": key({"config": {"passes": {"b": {}, "a": {}}}}),
        "settings of the runtime": key({"genai": {"search": {"top_k": 1}}}),
        "checkpoint": key(digest="d" * 64),
        "baseline": key({"baseline": True}),
        "baseline compared up to another length": key({"baseline": True}, context_length=64),
        "package gone": key(versions={name: "1.0" for name in VERSIONS if name != "onnx"}),
        **{name: key(versions={**VERSIONS, name: "2.0"}) for name in store.DECISIVE},
    }
    assert len(set(others.values())) == len(others), others


def test_all_files_but_the_manifest_and_the_path_is_where_it_is_found(variant: Variant, tmp_path: Path) -> None:
    assert store.load(variant.path) == variant
    moved = variant.path.rename(tmp_path / "moved")
    assert store.load(moved) == variant.model_copy(update={"path": moved})
    (moved / "sub").mkdir()
    (moved / "sub" / "x.bin").write_bytes(b"abc")
    files = {file.name: file for file in store.files_of(moved)}
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


# --- what of an export is compared with its checkpoint: which layers stand for all, and at which lengths

SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_hidden_layers": 28, "layer_types": [FULL] * 28}, 2),
        ({"num_hidden_layers": 1}, 1),
        ({"num_hidden_layers": 26, "layer_types": [SLIDING, FULL] * 13}, 2),
        ({"num_hidden_layers": 12, "layer_types": ([SLIDING] * 5 + [FULL]) * 2}, 6),
        ({"num_hidden_layers": 8, "no_rope_layers": [1, 1, 1, 0] * 2, "layer_types": [FULL] * 8}, 4),
        ({"num_hidden_layers": 8, "use_sliding_window": True, "max_window_layers": 5}, 6),
        ({"num_hidden_layers": 8, "use_sliding_window": False, "max_window_layers": 5}, 2),
    ],
)
def test_each_kind_of_layer_is_there(config: dict[str, Any], layers: int) -> None:
    assert thin_worker.layers_needed(config) == layers


def test_a_shorter_config() -> None:
    config = {"num_hidden_layers": 3, "layer_types": [FULL, FULL, SLIDING], "eos_token_id": [1, 2, 3], "vocab_size": 9}
    short = {"num_hidden_layers": 2, "layer_types": [FULL, FULL], "eos_token_id": [1, 2, 3], "vocab_size": 9}
    assert thin_worker.cut(config, 2) == short


LONGROPE = {"rope_type": "longrope"}


@pytest.mark.parametrize(
    ("config", "context", "length", "borders"),
    [
        ({}, 8192, 1024, {}),
        ({}, 100, 100, {}),
        ({"sliding_window": 64}, 2048, 1024, {64: 88}),
        ({"sliding_window": 64}, 65, 65, {}),  # nobody gets beyond it
        ({"sliding_window": 1000}, 1010, 1010, {1000: 1010}),
        ({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 512}}, 2048, 1024, {}),
        ({"rope_parameters": LONGROPE, "original_max_position_embeddings": 512}, 2048, 1024, {512: 536}),
        ({"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 4096}}, 131_072, 1024, {4096: 4120}),
        (
            {"sliding_window": 100, "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 64}},
            *(8192, 1024, {64: 88, 100: 124}),
        ),
        ({"sliding_window": 4096, "vocab_size": 256_000}, 8192, 1024, {}),  # its logits would take 4.3 GB
        ({"sliding_window": 8192, "num_attention_heads": 32}, 16_384, 1024, {}),  # its attention 8.7 GB
        ({"vocab_size": 5_000_000}, 8192, 125, {}),
    ],
)
def test_across_each_border(config: dict[str, Any], context: int, length: int, borders: dict[int, int]) -> None:
    assert verify_worker.probes({"vocab_size": 32_000, **config}, context) == (length, borders)
