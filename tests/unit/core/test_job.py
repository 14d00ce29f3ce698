"""The job: what it refuses."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from slmops.core.errors import UsageError
from slmops.core.job import Job
from slmops.core.validation import problems
from slmops.core.values import NAME_PATTERN, to_name


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
        ("__x__", "x"),
        ("Größe", "gr-e"),
        ("модель", "model"),
        ("", "model"),
        ("..", "model"),
        ("a" * 100, "a" * 63),
        ("a" * 62 + "-b", "a" * 62),  # no dash at the end where it is cut
        ("İstanbul", "i-stanbul"),
        ("-rf", "rf"),
    ],
)
def test_to_name(text: str, name: str) -> None:
    assert to_name(text) == name
    assert re.match(NAME_PATTERN, name)
    assert to_name(name) == name
