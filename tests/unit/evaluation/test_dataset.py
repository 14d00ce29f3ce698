"""The evaluation set: what counts as right, and every bad line named with its number and reason."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slmops.errors import UsageError
from slmops.evaluation import dataset
from slmops.evaluation.dataset import Item


def written(tmp_path: Path, *lines: str | dict[str, Any], encoding: str = "utf-8") -> Path:
    path = tmp_path / "my.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text, encoding=encoding)
    return path


def item(expected: str, match: Any) -> Item:
    return Item(prompt="?", expected=expected, match=match)


GOOD = {"prompt": "Capital of France?", "expected": "Paris"}


def test_good_lines(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        GOOD,
        "",
        {"prompt": "2+2?", "expected": 4, "match": "numeric", "category": "sums", "id": "s1", "max_tokens": 8},
        {"prompt": "Half?", "expected": 0.5, "match": "numeric"},
        "   ",
    )
    found = dataset.load(path)
    assert found.name == "my.jsonl"
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [(i.id, i.prompt, i.expected, i.match, i.category, i.max_tokens) for i in found.items] == [
        ("1", "Capital of France?", "Paris", "contains", "general", 24),
        ("s1", "2+2?", "4", "numeric", "sums", 8),
        ("4", "Half?", "0.5", "numeric", "general", 24),  # the number of its line
    ]


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD).encode() + b"\r\n")
    assert [i.id for i in dataset.load(path).items] == ["1", "3"]


def test_line_separators_inside_a_string_end_no_line(tmp_path: Path) -> None:
    prompt = "one\u2028two\u2029three\x85four"
    path = written(tmp_path, {"prompt": prompt, "expected": "x"}, GOOD)
    assert [i.prompt for i in dataset.load(path).items] == [prompt, GOOD["prompt"]]


def test_messages(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Capital of Italy?"},
    ]
    [found] = dataset.load(written(tmp_path, {"messages": messages, "expected": "Rome"})).items
    assert found.conversation == messages
    assert item("x", "contains").conversation == [{"role": "user", "content": "?"}]


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON: Expecting property name enclosed in double quotes at column 2"),
        ("Paris", "no JSON: Expecting value at column 1"),
        ("[1]", "Input should be a valid dictionary"),
        ("null", "Input should be a valid dictionary"),
        ({"prompt": "x"}, "expected Field required"),
        ({"expected": "x"}, "Value error, needs either 'prompt' or 'messages'"),
        ({"prompt": "x", "messages": [USER], "expected": "x"}, "needs either 'prompt' or 'messages'"),
        ({"messages": [], "expected": "x"}, "'messages' must end with a user message"),
        ({"messages": [USER, {**USER, "role": "assistant"}], "expected": "x"}, "must end with a user message"),
        ({"messages": [{"role": "tool", "content": "x"}], "expected": "x"}, "messages.0.role Input should be 'system'"),
        ({"messages": [{"role": "user"}], "expected": "x"}, "messages.0.content Field required"),
        ({"prompt": 3, "expected": "x"}, "prompt Input should be a valid string"),
        ({"prompt": "x", "expected": True}, "expected Input should be a valid string"),
        ({"prompt": "x", "expected": "x", "match": "fuzzy"}, "match Input should be 'contains', 'exact', 'regex' or"),
        ({"prompt": "x", "expected": "x", "answer": "y"}, "answer Extra inputs are not permitted"),
        ({"prompt": "x", "expected": "x", "max_tokens": 0}, "max_tokens Input should be greater than or equal to 1"),
        ({"prompt": "x", "expected": "(", "match": "regex"}, "'expected' is no regular expression: missing ), unterm"),
        ({"prompt": "x", "expected": "four", "match": "numeric"}, "'expected' is no number"),
    ],
)
def test_bad_line_is_named_with_number_and_reason(tmp_path: Path, line: str | dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as raised:
        dataset.load(written(tmp_path, GOOD, "", line, GOOD))
    heading, *problems = raised.value.message.splitlines()
    assert heading == "my.jsonl has bad lines:"
    assert len(problems) == 1
    assert problems[0].startswith("  - line 3: ")
    assert reason in problems[0]
    assert raised.value.fix == "Mend or remove these lines."


def test_all_bad_lines_are_named_up_to_ten(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        dataset.load(written(tmp_path, *["{"] * 13))
    problems = raised.value.message.splitlines()[1:]
    assert [line.partition(":")[0] for line in problems[:-1]] == [f"  - line {number}" for number in range(1, 11)]
    assert problems[-1] == "  - and 3 more"


def test_several_faults_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 1: prompt Input .*; expected Field required; max_tokens Input"):
        dataset.load(written(tmp_path, {"prompt": 1, "max_tokens": 9999}))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"my\.jsonl has no items"):
        dataset.load(written(tmp_path, text))


def test_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"my\.jsonl is not UTF-8: .* byte 0xe9 in position 15") as raised:
        dataset.load(written(tmp_path, {"prompt": "Caf\xe9?", "expected": "x"}, encoding="latin-1"))
    assert raised.value.fix == "Save it as UTF-8."


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"The evaluation set .*nothing\.jsonl cannot be read: No such file") as raised:
        dataset.load(tmp_path / "nothing.jsonl")
    assert raised.value.fix == "Check the path."
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        dataset.load(tmp_path)


@pytest.mark.parametrize(
    ("match", "expected", "answer", "right"),
    [
        ("contains", "Paris", "The capital is PARIS.", True),
        ("contains", "straße", "Die STRASSE", True),
        ("contains", "Paris", "Pari s", False),
        ("exact", "Paris", " Paris\n", True),
        ("exact", "Paris", "paris", False),
        ("exact", "Paris", "Paris.", False),
        ("regex", r"\b[Pp]aris\b", "in Paris, France", True),
        ("regex", r"\bParis\b", "Parisian", False),
        ("regex", r"^Paris$", "Paris, France", False),
        ("numeric", "4", "2 + 2 = 4", True),
        ("numeric", "4", "4.0", True),
        ("numeric", "4", "4 is 2 + 2", False),  # the last number counts
        ("numeric", "4", "four", False),
        ("numeric", "1234567.5", "That makes 1,234,567.5 in all.", True),
        ("numeric", "3", "1, 2, 3", True),
        ("numeric", "-5", "It is -5 degrees.", True),
        ("numeric", "5", "It is -5 degrees.", False),
        ("numeric", "5", "Between 3-5.", True),
        ("numeric", "4", "GPT-4", True),
        ("numeric", "-4", "=-4", True),
        ("numeric", "10", "It is 10.", True),
        ("numeric", "1,000", "1000", True),
    ],
)
def test_judging(match: str, expected: str, answer: str, right: bool) -> None:
    assert item(expected, match).correct(answer) is right


def test_packaged_set() -> None:
    found = dataset.load(None)
    assert found.name == "general.jsonl"
    assert len(found.items) == 40
    assert len({i.id for i in found.items}) == 40
    assert len({i.conversation[-1]["content"] for i in found.items}) == 40
    assert min(Counter(i.category for i in found.items).values()) >= 4
    assert not any(i.correct("") for i in found.items), "saying nothing is never right"


def test_default_text_is_the_same_in_each_process() -> None:
    text, digest = dataset.perplexity_text(None)
    assert len(text.split()) > 10_000
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    program = "from slmops.evaluation.dataset import perplexity_text; print(perplexity_text(None)[1])"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest


def test_text_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("Zwölf\r\nBoxkämpfer".encode())
    text, digest = dataset.perplexity_text(path)
    assert text == "Zwölf\r\nBoxkämpfer"
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b" \n\t", "is empty"), (b"\xff\xfeA\x00", "is not UTF-8"), (None, "cannot be read")],
)
def test_bad_text(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=said) as raised:
        dataset.perplexity_text(path)
    assert str(path) in raised.value.message
    assert raised.value.fix
