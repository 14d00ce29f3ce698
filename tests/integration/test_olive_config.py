"""The user's own Olive workflow files: checked by Olive's own rules before any work, and run as they stand."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from slmops.conversion import olive_config, recipes
from slmops.conversion.convert import convert
from slmops.core.errors import RecipeError
from slmops.core.job import Job, JobContext
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Recipe
from slmops.processes import children

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("in_process")]

SYSTEMS = {
    "local_system": {
        "type": "LocalSystem",
        "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
    }
}
QUANTIZED = {"precision": "int4", "quantization_config": {"block_size": 64, "is_symmetric": False}}
# As tutorials write it, in the form of today and in the older one with nested "config" and "engine".
TUTORIAL = {
    "input_model": {"type": "HfModel", "model_path": "<path-to-your-model>"},
    "systems": SYSTEMS,
    "passes": {"builder": {"type": "ModelBuilder", **QUANTIZED}},
    "host": "local_system",
    "target": "local_system",
    "log_severity_level": 0,
    "cache_dir": "cache",
    "output_dir": "models/int4",
}
OLD_TUTORIAL = {
    "input_model": {"type": "HfModel", "config": {"model_path": "${MODEL_PATH}"}},
    "systems": SYSTEMS,
    "passes": {"builder": {"type": "ModelBuilder", "config": QUANTIZED}},
    "engine": {"host": "local_system", "target": "local_system", "cache_dir": "cache", "output_dir": "models/int4"},
}


def load(content: Any, checkpoint: Checkpoint, home: Settings, folder: Path, name: str = "mine.json") -> Recipe:
    path = folder / name
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return olive_config.load(path, checkpoint, "tiny", home)


def quantized(model: Path) -> set[tuple[str, int]]:
    """Attributes of all MatMulNBits, and the number of their inputs: 4 with zero points, 3 without."""
    import onnx

    nodes = [n for n in onnx.load(str(model), load_external_data=False).graph.node if n.op_type == "MatMulNBits"]
    attributes = {(a.name, a.i) for n in nodes for a in n.attribute if a.name in ("bits", "block_size")}
    return attributes | {("inputs", len([i for i in n.input if i])) for n in nodes}


@pytest.mark.parametrize(("content", "symmetric"), [(TUTORIAL, False), (OLD_TUTORIAL, True)])
def test_a_tutorials_config_does_what_it_says(
    job: Job,
    checkpoint: Checkpoint,
    home: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: dict[str, Any],
    symmetric: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = json.dumps(content).replace('"is_symmetric": false', f'"is_symmetric": {json.dumps(symmetric)}')
    recipe = load(text, checkpoint, home, tmp_path, "My Block 64.json")
    assert (recipe.name, recipe.bits, recipe.baseline) == ("my-block-64", None, False)
    assert recipe.config["passes"] == {
        "builder": {"type": "ModelBuilder", "precision": "int4", "int4_block_size": 64, "int4_is_symmetric": symmetric}
    }
    assert not {"engine", "output_dir", "cache_dir", "log_severity_level"} & set(recipe.config)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["int4_block_size = 64" in warned[0], f"int4_is_symmetric = {symmetric}" in warned[1]] == [True, True]
    variant = convert(recipe, JobContext(job, "tiny", checkpoint, home))
    inputs = 3 if symmetric else 4
    assert quantized(variant.path / "model.onnx") == {("bits", 4), ("block_size", 64), ("inputs", inputs)}
    # Neither Olive's cache nor its output went where the file says.
    assert [path.name for path in tmp_path.iterdir()] == ["My Block 64.json"]


def test_unknown_keys_and_wrong_values_are_named(checkpoint: Checkpoint, home: Settings, tmp_path: Path) -> None:
    options = {"shared_embedings": True, "int4_is_symmetric": True}
    passes = {
        "b": {"type": "ModelBuilder", "precison": "int4", "int4_block_size": 32, "extra_options": options},
        "c": {"type": "ModelBilder"},
        "d": {"type": "GraphSurgeries", "surgery": []},
    }
    with pytest.raises(RecipeError) as caught:
        load({"passes": passes, "pases": {}}, checkpoint, home, tmp_path)
    assert caught.value.exit_code == 2
    title, *problems = caught.value.message.splitlines()
    assert str(tmp_path / "mine.json") in title
    for problem, wrong, accepted in zip(
        problems,
        ("passes.b (ModelBuilder)", "passes.b.extra_options", "'ModelBilder'", "passes.d (GraphSurgeries)", "pases"),
        ("'precision'", "shared_embeddings", "modelbuilder", "surgeries", ""),
        strict=True,
    ):
        assert wrong in problem
        assert accepted in problem
    passes = {
        "q": {"type": "Rtn", "bits": 5, "group_size": "many"},
        "b": {"type": "ModelBuilder", "precision": "int4", "int4_block_size": 33},
    }
    with pytest.raises(RecipeError) as caught:
        load({"passes": passes}, checkpoint, home, tmp_path)
    assert caught.value.message.splitlines()[1:] == [
        "  - passes.q.bits must be 2, 4, 8, 16 or 32",
        "  - passes.q.group_size must be a whole number",
        "  - passes.b.int4_block_size must be 16, 32, 64, 128 or 256",
    ]
    # A recipe of the user's own in the same way.
    fresh = Settings(home=tmp_path)
    fresh.recipes.mkdir()
    file = fresh.recipes / "mine.json"
    file.write_text(json.dumps({"when": "x", "bits": 8, "passes": {"q": {"type": "Rtn", "bits": 8, "grupsize": 32}}}))
    planned = recipes.for_job(Job(model="m", precision=["mine"]), checkpoint, fresh)
    for path, recipe in recipes.own(planned, fresh):
        with pytest.raises(RecipeError, match=r"recipes/mine.json(.|\n)*passes\.q \(Rtn\): unknown key 'grupsize'"):
            olive_config.check(path, recipe.config, checkpoint, "tiny", fresh)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"mine\.json"),
        ('{\n  "passes": {\n    "b": {"type": "ModelBuilder",}\n  }\n}', "line 3 column 34"),
        ('{"passes": ', "line 1 column 12"),
        ("[]", "holds a list, not a workflow"),
        ({}, "it has no 'passes'"),
        ({"passes": {"b": {"precision": "int4"}}}, r"mine\.json: passes\.b has no 'type'"),
        ({"passes": {"b": {"type": "ModelBuilder", "precision": "<precision>"}}}, "placeholder <precision> is not fil"),
        ({"passes": {"b": {"type": "ModelBuilder", "precision": "{P}"}}}, r"placeholder \{P\} is not filled in"),
        ({"input_model": {"type": "OnnxModel"}, "passes": {"b": {"type": "X"}}}, "input_model must be of type HfMo"),
        (
            {"passes": {"b": {"type": "ModelBuilder", "quantization_config": {"group_size": 64}}}},
            r"mine\.json: passes\.b\.quantization_config: Olive ignores group_size without an error",
        ),
    ],
)
def test_what_needs_no_olive_is_refused_at_once(
    checkpoint: Checkpoint, home: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
) -> None:
    monkeypatch.setattr(children, "call", None)
    with pytest.raises(RecipeError, match=message) as caught:
        load(content, checkpoint, home, tmp_path)
    assert "mine.json" in caught.value.message


def test_a_precisions_own_name_stays_free(checkpoint: Checkpoint, home: Settings, tmp_path: Path) -> None:
    content = {"passes": {"b": {"type": "ModelBuilder", "precision": "fp16"}}}
    assert load(content, checkpoint, home, tmp_path, "fp16.json").name == "fp16-olive"
