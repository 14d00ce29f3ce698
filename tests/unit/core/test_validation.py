"""What a job refuses, and pydantic's errors in our own words."""

import math
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Self

import pytest
from pydantic import BaseModel, Field, Json, TypeAdapter, ValidationError, model_validator

from slmops.core.errors import UsageError
from slmops.core.job import Job
from slmops.core.names import NAME_PATTERN, Name, to_name
from slmops.core.settings import Settings
from slmops.core.validation import check_name, problems


def test_all_that_is_wrong_is_refused_and_what_python_gives_as_other_usage_is() -> None:
    asked: dict[str, Any] = {"model": "m", "precisoin": ["int4"], "int4_block_size": 257, "matcher": "mine.py"}
    said = [
        *("int4_block_size must be at most 256", "matcher must be FILE.py:FUNCTION"),
        *("prompt_lengths must not be empty", "precisoin is not a known key"),
    ]
    with pytest.raises(ValidationError) as raised:
        Job.model_validate({**asked, "prompt_lengths": []})
    assert problems(raised.value) == said
    with pytest.raises(UsageError) as usage:
        Job(**asked, prompt_lengths=[])
    assert [line.partition(" (got ")[0] for line in usage.value.message.splitlines()] == said


@pytest.mark.parametrize("name", ["a", "A", "9", "support-bot", "my_model_2", "a" * 63, "x--y__z"])
def test_names_are_taken_and_cannot_be_changed(name: str) -> None:
    job = Job(model="m", name=name)
    with pytest.raises(ValidationError, match="frozen"):
        job.name = "other"
    assert job.name == name


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", "a" * 64, "-a", "_a", ".a", "a.b", "a b", "a:1", "a\n", "ä", "a\\b", "..", "\x00"]
)
def test_names_that_could_leave_a_folder_or_that_a_server_refuses(name: str) -> None:
    with pytest.raises(UsageError, match=r"^name "):
        Job(model="m", name=name)


@pytest.mark.parametrize(
    ("asked", "precisions"),
    [
        ({"model": "org/m@main", "name": "bot", "top_p": 0.5, "quick": True}, ["fp32", "fp16", "int8", "int4"]),
        ({"olive_config": "mine.json"}, ["fp32"]),
        ({"model": "m", "olive_config": "mine.json", "precision": []}, ["fp32"]),  # as a form that is left empty
        ({"olive_config": "mine.json", "precision": ["int4"]}, ["int4"]),
    ],
)
def test_an_olive_config_is_made_alone_unless_more_is_asked_for(asked: dict[str, Any], precisions: list[str]) -> None:
    job = Job(**asked)
    assert job.precision == precisions
    assert Job.model_validate_json(job.model_dump_json()) == job
    assert job.label == asked.get("name", asked.get("model", "mine.json"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Org/Qwen2.5-0.5B-Instruct", "qwen2-5-0-5b-instruct"),
        ("SmolLM2-135M-Instruct.Q4_1", "smollm2-135m-instruct-q4_1"),
        ("/home/jo/My Model (v2)/", "my-model-v2"),
        ("Größe", "gr-e"),
        ("модель", "model"),
        ("", "model"),
        ("..", "model"),
        ("a" * 100, "a" * 63),
        ("a" * 62 + "-b", "a" * 62),  # no dash at the end where it is cut
        ("İstanbul", "i-stanbul"),
        ("-rf", "rf"),
        ("org/NUL", "nul-model"),  # Windows has a device of that name
    ],
)
def test_to_name(text: str, name: str) -> None:
    assert to_name(text) == name
    assert re.match(NAME_PATTERN, name)
    assert to_name(name) == name


@pytest.mark.parametrize("name", ["con", "COM1"])
def test_no_model_is_called_as_a_device_of_windows(name: str) -> None:
    said = "must not be a name that Windows keeps for a device"
    with pytest.raises(UsageError, match=said):
        check_name(name)
    assert problems(refused(dict[Name, int], {name: 1}))[0].endswith(said)
    assert check_name(f"{name}-int4") == f"{name}-int4"


class Pair(BaseModel):
    low: int
    high: int

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


def refused(kind: Any, value: Any) -> ValidationError:
    """What pydantic says of a value."""
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(kind).validate_python(value)
    return raised.value


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (bool, "maybe", "it must be true or false"),
        (datetime, "soon", "it must be a date and time"),
        (dict[str, int], 1, "it must be a table of keys and values"),
        (Pair, 1, "it must be a table of keys and values"),
        (Pair, {"low": 2, "high": 1}, "low is above high"),
        (list[Pair], [{"low": 2, "high": 1}], "0 low is above high"),
        (float, "much", "it must be a number"),
        (Annotated[float, Field(allow_inf_nan=False)], math.nan, "it must be a finite number"),
        (int, 1.5, "it must be a whole number"),
        (Path, 1, "it must be a path"),
        (tuple[int, ...], 1, "it must be a list"),
        (Annotated[str, Field(min_length=3)], "ab", "it must have at least 3 characters"),
        (Annotated[str, Field(max_length=3)], "abcd", "it must have at most 3 characters"),
        (Annotated[list[int], Field(max_length=1)], [1, 2], "it must have at most 1 entries"),
        (Annotated[str, Field(pattern="^a$")], "b", "it must match ^a$"),
        (Annotated[int, Field(lt=3)], 3, "it must be less than 3"),
        (Annotated[int, Field(multiple_of=16)], 3, "it must be a multiple of 16"),  # of which we say nothing ourselves
        (Json[int], "", "it is not valid JSON: EOF while parsing a value at line 1 column 0"),
    ],
)
def test_words(kind: Any, value: Any, said: str) -> None:
    assert problems(refused(kind, value)) == [said]


def test_all_that_is_wrong_is_named_in_the_callers_words() -> None:
    error = refused(list[Pair], [{"low": "x", "high": 1}, {"low": 1}])
    assert problems(error, name=lambda location: f"pair {location[0]}, {location[1]},") == [
        "pair 0, low, must be a whole number",
        "pair 1, high, is missing",
    ]


def test_a_value_is_quoted_on_request_and_not_at_any_length() -> None:
    [said] = problems(refused(Name, "../x"), got=True)
    assert said.endswith("must begin with a letter or a digit (got '../x')")
    [said] = problems(refused(int, "9" * 100 + "x"), got=True)
    assert said.endswith("999...)")
    assert len(said) < 130


def test_a_password_in_an_address_is_never_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_JUDGE_URL", "http://me:secret@judge/v1")
    with pytest.raises(ValidationError) as raised:
        Settings()
    [said] = problems(raised.value, got=True)
    assert said.startswith("judge_url must be an http:// or https:// address")
    assert "secret" not in said
