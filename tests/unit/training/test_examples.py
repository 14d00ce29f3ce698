"""Lines of training files, good and bad."""

import json
from pathlib import Path

import pytest

from slmops.training import examples
from slmops.training.examples import ExamplesRead
from tests.training_data import conversation

GOOD = '{"prompt": "Hi?", "completion": "Ho."}'
TURNS = tuple(conversation("Hi?", "Ho."))


def read(folder: Path, *lines: str | bytes, end: bytes = b"\n") -> ExamplesRead:
    file = folder / "train.jsonl"
    file.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + end for line in lines))
    return examples.read([file])


def chat(*turns: str) -> str:
    """A line of turns as 'user: Hi?'."""
    said = (turn.partition(": ") for turn in turns)
    return json.dumps({"messages": [{"role": role, "content": text} for role, _, text in said]})


@pytest.mark.parametrize(
    "line",
    [
        GOOD,
        '{"completion":"Ho.", "id": 7, "prompt":"Hi?"}',
        '{"prompt": "Hi?", "completion": "Ho.", "messages": null}',
        chat("user: Hi?", "assistant: Ho."),
        '{"prompt": [{"content": "Hi?", "role": "user"}], "completion": [{"role": "assistant", "content": "Ho."}]}',
    ],
)
def test_all_formats_have_one_normal_form(tmp_path: Path, line: str) -> None:
    found = read(tmp_path, line)
    assert not found.problems
    assert (found.examples[0].messages, found.examples[0].json) == (TURNS, json.dumps({"messages": TURNS}))
    assert found.files == {"train.jsonl": 1}


def test_lines_are_counted_as_editors_do(tmp_path: Path) -> None:
    lines = ("\ufeff" + GOOD, "", "  \t", GOOD.replace("Hi", "a\u2028b\x85c"))
    found = read(tmp_path, *lines, end=b"\r\n")
    assert not found.problems
    assert [example.line for example in found.examples] == [1, 4]
    assert len(read(tmp_path, GOOD + "\n" + GOOD, end=b"").examples) == 2  # the last one needs no end
    assert found.examples[1].messages[0]["content"] == "a\u2028b\x85c?"
    for nothing in (b"", b"\n\n \r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"):
        assert read(tmp_path, nothing, end=b"") == ExamplesRead([], [], {"train.jsonl": 0})


def test_the_normal_form_is_one_line_for_every_reader(tmp_path: Path) -> None:
    messages = conversation("ä\u2028\u2029\x85\n\x0b", "2", "3", "4", system="S")
    [example] = read(tmp_path, json.dumps({"messages": messages})).examples
    assert list(example.messages) == json.loads(example.json)["messages"] == messages
    assert len(example.json.splitlines()) == 1
    assert "ä" in example.json


@pytest.mark.parametrize(
    ("line", "kind", "detail"),
    [
        ("{", "schema", "column 2"),
        ("[1]", "schema", "not a JSON object"),
        ("[" * 100_000, "schema", "nested too deeply"),
        ('{"prompt": ' + "9" * 5000 + "}", "schema", "4300 digits"),
        ('{"prompt": NaN, "completion": "x"}', "schema", "not JSON: NaN"),
        (b'{"prompt": "\xe4"}', "schema", "byte 13 "),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "schema", "'prompt'"),
        ('{"prompt": "a", "completion": "b", "id": "i7", "a\\nb": 1}', "schema", "'a\\nb'"),
        ('{"prompt": "a"}', "schema", "'prompt' and 'completion'"),
        ('{"messages": [], "prompt": "a"}', "schema", "both 'messages' and 'prompt'"),
        ('{"messages": []}', "schema", "'messages'"),
        ('{"messages": "Hi?"}', "schema", "'messages'"),
        ('{"prompt": 7, "completion": "x"}', "schema", "'prompt'"),
        ('{"messages": ["Hi?"]}', "schema", "messages[0]"),
        ('{"messages": [{"role": "user", "content": 7}]}', "schema", "messages[0].content"),
        ('{"messages": [{"role": "user"}]}', "schema", "messages[0].content"),
        ('{"messages": [{"role": "user", "content": "a", "name": "x"}]}', "schema", "messages[0]"),
        (chat("tool: a"), "schema", "'tool'"),
        (GOOD.replace("Hi", "\\ud83d"), "schema", "'\\ud83d'"),
        (GOOD.replace("Ho", "\\u0000"), "schema", "NUL"),
        (chat("user: a\0", "assistant: b"), "schema", "NUL"),
        (chat("user: a"), "roles", "ends with the user, not with an answer"),
        (chat("system: a"), "roles", "ends with the system, not with an answer"),
        (chat("assistant: a"), "roles", "message 1 is from the assistant, and should be from the user"),
        (chat("user: a", "user: b"), "roles", "message 2 is from the user, and should be from the assistant"),
        (chat("system: a", "system: b"), "roles", "message 2 is from the system, and should be from the user"),
        (chat("user: a", "assistant:  \t"), "empty", "message 2, from the assistant, is empty"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_bad_lines_are_named(tmp_path: Path, line: str | bytes, kind: str, detail: str) -> None:
    found = read(tmp_path, GOOD, line, GOOD)
    problem = found.problems[0]
    assert (problem.file, problem.line, problem.kind) == ("train.jsonl", 2, kind)
    assert detail in problem.detail
    assert found.examples[0].line == 1


def test_the_longest_line(tmp_path: Path) -> None:
    room = examples.LONGEST_LINE - len(GOOD) - 1
    fits = GOOD.replace("Hi", "Hi" + "x" * room)
    assert not read(tmp_path, fits).problems
    assert read(tmp_path, fits.replace("Hi", "Hix")).problems[0].kind == "oversized"


def test_reading_ends_when_nothing_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MOST_PROBLEMS", 3)
    found = read(tmp_path, *["x"] * 5)
    assert [problem.line for problem in found.problems] == [1, 2, 3, 4]
    assert found.problems[-1].detail == "nothing was read from here on"


def test_several_files_in_their_order(tmp_path: Path) -> None:
    files = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    for file in files:
        file.write_text(f'{GOOD}\n{{"x": 1}}\n{chat("user: a")}\n')
    found = examples.read(files)
    assert [(example.file, example.line) for example in found.examples] == [("b.jsonl", 1), ("a.jsonl", 1)]
    assert found.files == {"b.jsonl": 1, "a.jsonl": 1}
    assert [f"{one.file}:{one.line}" for one in found.problems] == ["b.jsonl:2", "b.jsonl:3", "a.jsonl:2", "a.jsonl:3"]


def test_shown() -> None:
    for text in ("plain ä 中", "x" * 80):
        assert examples.shown(text) == text
    assert examples.shown("x" * 81) == "x" * 79 + "…"
    assert examples.shown("a\nb\x1b[31m\u202e\x00\ud83d") == r"a\nb\x1b[31m\u202e\x00\ud83d"
