"""Recipes as files: the shipped ones, the user's own in the home, and what is wrong with one."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.conversion import recipe_files, recipes
from slmops.core.errors import UsageError
from slmops.core.job import SHIPPED, Job
from slmops.core.settings import Settings
from tests.values import checkpoint

SMALL = """\
when = "On a phone."
bits = 4
passes.quantize = { type = "Rtn", bits = 4, group_size = 64 }
passes.export = { type = "ModelBuilder", precision = "int4" }
[genai.search]
top_k = 1
"""
EXPORT = {"type": "ModelBuilder", "precision": "fp32"}


def write(settings: Settings, name: str, content: str | dict[str, Any]) -> Path:
    settings.recipes.mkdir(parents=True, exist_ok=True)
    path = settings.recipes / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_shipped_names_are_the_files_that_come_with_slmops() -> None:
    assert {path.stem for path in recipe_files.FOLDER.iterdir()} == set(SHIPPED)


def test_a_recipe_of_the_users_own_is_found_by_its_name(settings: Settings) -> None:
    small = write(settings, "small.toml", SMALL)
    write(settings, "plain.json", {"when": "Never.", "passes": {"export": EXPORT}})
    write(settings, ".small.toml.swp", "")
    write(settings, "notes.txt", "")
    assert list(recipe_files.find(settings)) == [*SHIPPED, "plain", "small"]
    job = Job(model="m", precision=["small", "plain"])
    fp32, made, plain = recipes.for_job(job, checkpoint(linear_sizes=(576,)), settings)
    assert (made.name, made.bits, made.genai, made.baseline) == ("small", 4, {"search": {"top_k": 1}}, False)
    assert list(made.config["passes"]) == ["quantize", "export"]
    assert (plain.bits, plain.users_own, plain.config["passes"]) == (None, True, {"export": EXPORT})
    assert recipes.own([fp32, made], settings) == [(small, made)]
    with_checkpoint = job.model_copy(update={"baseline": "checkpoint"})
    assert recipes.names(with_checkpoint, settings) == ["small"]  # the other is exported in fp32
    with pytest.raises(UsageError, match="a block of 64 weights does not divide") as caught:
        recipes.for_job(job, checkpoint(linear_sizes=(96,)), settings)
    assert caught.value.fix == "Use in its file a block of 16 or 32."


def test_the_values_that_a_sweep_tries_are_put_in_one_each(settings: Settings) -> None:
    sweep = """
    [sweep.quantize]
    group_size = [16, 32]
    overrides.head.bits = [4, 8]
    modules = [["a"], []]
    """
    write(settings, "small.toml", SMALL + sweep)
    file = recipe_files.load("small", settings)
    group_size, bits, modules = "quantize.group_size", "quantize.overrides.head.bits", "quantize.modules"
    assert file.choices == {group_size: [16, 32], bits: [4, 8], modules: [["a"], []]}
    assert recipes.choices("small", file, checkpoint(linear_sizes=(64,))) == file.choices
    own = file.with_options({group_size: 32, modules: []}).model_copy(update={"sweep": file.sweep})
    of_own = {group_size: [32, 16], bits: [4, 8], modules: [[], ["a"]]}  # its own values first
    assert recipes.choices("small", own, checkpoint(linear_sizes=(64,))) == of_own
    assert recipes.choices("small", file, checkpoint(linear_sizes=(48,)))[group_size] == [16]
    made = file.with_options({group_size: 16, bits: 8})
    assert made.passes["quantize"] == {"type": "Rtn", "bits": 4, "group_size": 16, "overrides": {"head": {"bits": 8}}}
    assert (made.choices, made.genai, file.passes["quantize"]["group_size"]) == ({}, file.genai, 64)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("mine.toml", "when = ", "mine.toml cannot be read: Invalid value"),
        ("mine.json", "{'when'}", "mine.json cannot be read: .* line 1"),
        ("mine.toml", "", "mine.toml has no keys"),
        ("mine.json", [], "mine.json has no keys"),
        ("mine.json", {"passes": {"a": {"type": "Rtn"}}}, r"mine\.json: when is missing\."),
        ("mine.json", {"when": "", "passes": {"a": {"type": "Rtn"}}}, "when must not be empty"),
        ("mine.json", {"when": "x"}, "passes is missing"),
        ("mine.json", {"when": "x", "passes": {}}, "passes must not be empty"),
        ("mine.json", {"when": "x", "passes": {"a": 1}}, r"passes\.a must be a table"),
        ("mine.json", {"when": "x", "passes": {"a": {"bits": 4}}}, "passes needs the type of each pass: a has none"),
        ("mine.json", {"when": "x", "passes": {"a": {"type": "Rtn"}}, "bits": 5}, "bits must be 4, 8, 16 or 32"),
        ("mine.json", {"when": "x", "passes": {"a": {"type": "Rtn"}}, "bit": 4}, "bit is not a known key"),
        ("mine.toml", SMALL + "[sweep.mix]\na = [1]", "sweep has mix, which is none of its passes: quantize, export"),
        ("mine.toml", SMALL + "[sweep.export]\na = 1", r"sweep needs a list of values: export\.a is 1"),
        ("mine.toml", SMALL + "[sweep.export]\na = []", r"sweep needs a list of values: export\.a is \[\]"),
        ("int4.toml", SMALL, "int4.toml: a recipe of your own cannot be called 'int4'"),
        ("checkpoint.toml", SMALL, "cannot be called 'checkpoint'"),
        ("v1.toml", SMALL, "cannot be called 'v1'"),  # MLflow takes it for a version
        ("two words.toml", SMALL, "cannot be called 'two words'"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(settings: Settings, name: str, content: Any, said: str) -> None:
    path = write(settings, name, content)
    with pytest.raises(UsageError, match=said) as caught:
        recipes.check(Job(model="m", precision=["mine"]), settings)
    assert str(path) in caught.value.message


def test_a_name_is_of_one_file_and_an_unknown_one_gets_the_closest(settings: Settings) -> None:
    write(settings, "small.toml", SMALL)
    with pytest.raises(UsageError, match=r"There is no recipe 'smal'\. Did you mean small\?") as caught:
        recipes.check(Job(model="m", precision=["smal"]), settings)
    assert "fp32, fp16, int8, int4, int4-small, int4-calibrated, bf16, small" in (caught.value.fix or "")
    write(settings, "small.json", "{}")
    with pytest.raises(UsageError, match=r"small\.toml and small\.json have one name"):
        recipes.check(Job(model="m", precision=["int4"]), settings)
