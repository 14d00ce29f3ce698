"""What a job was given, looked at before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmops import optimize, preflight
from slmops.checkpoints import hub
from slmops.cli.command import run
from slmops.core.errors import CheckpointError, PrerequisiteError, RecipeError, SlmopsError, UsageError
from slmops.core.job import Job
from slmops.core.settings import Settings

FILES = {
    "policy.toml": 'objective = "cheapest"',
    "set.jsonl": "{}",
    "text.txt": "",
    "olive.json": '{"passes": {}}',
    "broken.json": "{",
    "raises.py": "1 / 0",
    "empty.jinja": " ",
    "broken.jinja": "{% if %}",
    "model.gguf": "not one",
    "file": "",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


def check(folder: Path, model: str = "demo", **options: Any) -> None:
    preflight.check(Job(model=model, **options), Settings(home=folder / "home"))


@pytest.mark.parametrize(
    ("options", "kind", "named"),
    [
        ({"model": "{}/nowhere"}, CheckpointError, "nowhere"),
        ({"model": "{}/model"}, CheckpointError, "has no weights"),
        ({"model": "{}/model.gguf"}, CheckpointError, "model.gguf"),
        ({"policy": "{}/policy.toml"}, UsageError, "cheapest"),
        ({"evaluation_set": "{}/set.jsonl"}, UsageError, "set.jsonl"),
        ({"perplexity_text": "{}/text.txt"}, UsageError, "text.txt"),
        ({"calibration_text": "{}/text.txt"}, UsageError, "text.txt"),
        ({"calibration_text": "{}/none.txt"}, UsageError, "The calibration text"),
        ({"precision": ["int4-calibrated"]}, RecipeError, "--calibration-text"),
        ({"model": ""}, UsageError, "--olive-config"),
        ({"olive_config": "{}/none.json"}, RecipeError, "none.json"),
        ({"model": "", "olive_config": "{}/none.json"}, RecipeError, "none.json"),
        ({"olive_config": "{}/olive.json"}, RecipeError, "passes"),
        ({"matcher": "{}/raises.py:f"}, UsageError, "ZeroDivisionError"),
        ({"chat_template": "{}/empty.jinja"}, CheckpointError, "empty.jinja"),
        ({"chat_template": "{}/broken.jinja"}, CheckpointError, "broken.jinja"),
        ({"output_path": "{}/file"}, UsageError, "file"),
        ({"output_path": "{}/file/below"}, UsageError, "file"),
        ({"precision": ["bf16"]}, RecipeError, "bf16"),
        ({"precision": ["int3"]}, RecipeError, "Did you mean int"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(
    folder: Path, options: dict[str, Any], kind: type[SlmopsError], named: str
) -> None:
    given = {key: value.format(folder) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(kind) as caught:
        check(folder, **given)
    assert named in str(caught.value)


def test_a_peer_needs_its_package_and_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, pools, kind, said in (
        (False, "", PrerequisiteError, r"llama-cpp-python.*\n.*pip install -c constraints.txt -e '.\[peers\]'"),
        (True, '[{"name": "big", "memory_gb": 64}]', UsageError, "SLMOPS_POOLS"),
    ):
        monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda _, there=installed: there or None)
        monkeypatch.setenv("SLMOPS_POOLS", pools)
        with pytest.raises(kind, match=said):
            check(folder, peer="llama.cpp")


def test_all_that_is_wrong_is_named_at_once_and_nothing_twice(folder: Path) -> None:
    files = {"model": "model", "policy": "policy.toml", "evaluation_set": "none.jsonl", "olive_config": "broken.json"}
    files |= {"matcher": "none.py:f", "chat_template": "none.jinja"}
    with pytest.raises(UsageError) as caught:
        check(folder, **{option: f"{folder}/{name}" for option, name in files.items()})
    said = str(caught.value)
    assert said.startswith("6 ")
    for name in ("has no weights", "cheapest", "none.jsonl", "broken.json", "none.py", "none.jinja"):
        assert name in said


@pytest.mark.parametrize("model", ["demo", "org/name@v1", "models:/bot@champion"])
def test_what_has_to_be_fetched_is_not_looked_at(folder: Path, model: str) -> None:
    check(folder, model, output_path=folder / "new" / "below", chat_template=None)
    assert not (folder / "home").exists()


FOLDER = {"type": "folder", "config": {"path": "model"}}


@pytest.mark.parametrize(
    ("input_model", "model"),
    [
        ({"type": "HfModel", "model_path": "model"}, "{}/model"),
        ({"type": "hfmodel", "config": {"model_path": FOLDER}}, "{}/model"),
        ({"model_path": "org/name"}, "org/name"),
        ({"model_path": "org/name", "load_kwargs": {"revision": "v1"}}, "org/name@v1"),
        ({"model_path": "model", "load_kwargs": {"revision": "v1"}}, "{}/model"),
        ({"model_path": "org/name", "adapter_path": "model"}, "{}/model"),
        ({"model_path": "elsewhere"}, None),
        ({"model_path": "<path-to-your-model>"}, None),
        ({"model_path": 1}, None),
        ({}, None),
    ],
    ids=str,
)
def test_an_olive_config_names_the_model_as_for_olive_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, input_model: dict[str, Any], model: str | None
) -> None:
    (folder / "below").mkdir()
    file = folder / "below" / "mine.json"
    file.write_text(json.dumps({"input_model": input_model, "passes": {"b": {"type": "ModelBuilder"}}}))
    monkeypatch.chdir(folder)  # a path is relative to it, not to the file
    monkeypatch.setattr(preflight.source, "check", lambda job: hub.parse(job.model) if job.model == "elsewhere" else 0)
    settings = Settings(home=folder / "home")
    if model is None:
        with pytest.raises(UsageError, match=r"elsewhere|names no model"):
            preflight.check(Job(olive_config=file), settings)
    else:
        job = preflight.check(Job(olive_config=file), settings)
        assert job.model == model.format(folder)
        assert job.base == ("org/name" if "adapter_path" in input_model else None)
    assert preflight.check(Job(model="demo", olive_config=file), settings).model == "demo"


def test_the_command_and_the_function_say_it_before_anything_is_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLMOPS_HOME", str(folder / "home"))
    assert run(f"run --model {folder}/nowhere --policy {folder}/none.toml --matcher none.py:f".split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(name in err for name in ("nowhere", f"{folder}/none.toml", "none.py"))
    with pytest.raises(UsageError, match=r"nowhere(.|\n)*none\.toml"):
        optimize(Job(model=f"{folder}/nowhere", policy=folder / "none.toml"))
    assert not (folder / "home").exists()
