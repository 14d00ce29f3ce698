"""Evaluation sets in CSV: quotes, line ends and byte order marks, and every bad row named with its line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from slmops.core.errors import UsageError
from slmops.evaluation import dataset
from slmops.evaluation.dataset import Item, Pattern


def raised_by(path: Path) -> UsageError:
    with pytest.raises(UsageError) as raised:
        dataset.load(path)
    return raised.value


def table(tmp_path: Path, content: str, name: str = "my.csv", encoding: str = "utf-8") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode(encoding))
    return path


def test_csv(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "prompt,expected,match,category,id,max_tokens,tolerance,threshold,format,messages,schema\r\n"
        '"Say ""hi"", please\r\nand\nno more",hi,,,,,,,,,\r\n'
        ",,,,,,,,,,\r\n"
        "\r\n"
        "Pi?,3.14,numeric,sums,pi,8,0.01,,number,,\r\n"
        "Why?,because,f1,,,,,0.75,,,\r\n"
        ',Rome,,,,,,,,"[{""role"": ""system"", ""content"": ""Be""}, {""role"": ""user"", ""content"": ""Q""}]",\r\n'
        'JSON?,,json_schema,,,,,,,,"{""type"": ""object""}"\r\n'
        'Letter?,B,,,,,,,"{""regex"": ""[A-D]""}",,\r\n',
        encoding="utf-8-sig",
    )
    found = dataset.load(path)
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [i.id for i in found.items] == ["2", "pi", "8", "9", "10", "11"]  # where the rows begin
    first, pi, why, rome, schema, letter = found.items
    assert first == Item(prompt='Say "hi", please\r\nand\nno more', expected="hi", id="2")
    assert (pi.match, pi.category, pi.max_tokens, pi.tolerance, pi.format) == ("numeric", "sums", 8, 0.01, "number")
    assert (why.match, why.threshold) == ("f1", 0.75)
    assert rome.conversation == [{"role": "system", "content": "Be"}, {"role": "user", "content": "Q"}]
    assert schema.json_schema == {"type": "object"}
    assert letter.format == Pattern(regex="[A-D]")


def test_csv_is_what_the_suffix_says_and_may_be_empty(tmp_path: Path) -> None:
    content = "prompt,expected\nQ,A\n"
    assert len(dataset.load(table(tmp_path, content, "UPPER.CSV")).items) == 1
    assert "line 1: is not JSON" in raised_by(table(tmp_path, content, "my.jsonl")).message
    for empty in ("", "\n", "prompt,expected\n", "prompt, expected\n,\n"):
        assert raised_by(table(tmp_path, empty)).message == "my.csv has no items."


@pytest.mark.parametrize(
    ("rows", "problems"),
    [
        ("Q,A\nQ\nQ,A,x\nQ,A\n", [f"line {n}: has {m} cells, but the header has 2" for n, m in ((3, 1), (4, 3))]),
        (
            '"two\nlines",A\nQ,\n"two\nlines",\n',
            [f"line {number}: 'expected' must not be empty for match 'contains'" for number in (4, 5)],
        ),
        ('Q,A\n"Q,A\nQ,A\n', ["line 3: is not CSV from here on: unexpected end of data"]),
        ('Q,"A"B\n', ["line 2: is not CSV from here on: ',' expected after '\"'"]),
        pytest.param(
            "Q," + "x" * 140_000,
            ["line 2: is not CSV from here on: field larger than field limit (131072)"],
            id="large",
        ),
    ],
)
def test_bad_csv_rows(tmp_path: Path, rows: str, problems: list[str]) -> None:
    error = raised_by(table(tmp_path, "prompt,expected\n" + rows))
    assert error.message.splitlines() == ["my.csv has bad lines:", *(f"  - {problem}" for problem in problems)]


@pytest.mark.parametrize(
    ("column", "cell", "problem"),
    [
        ("max_tokens", "many", "line 2: max_tokens must be a whole number"),
        ("format", "xml", 'line 2: format must be "json"'),
        ("format", '"{""regex"""', "line 2: format is not JSON: Expecting ':' delimiter at column 9"),
        ("messages", "hello", "line 2: messages is not JSON: Expecting value at column 1"),
        ("schema", "{", "line 2: schema is not JSON: Expecting property name"),
        ("tolerance", "inf", "line 2: tolerance must be a finite number"),
        ("id", 'x\n"1\n2",A,y\nQ,A,x', "line 5: line 2 already has the id 'x'"),
    ],
)
def test_bad_csv_cells(tmp_path: Path, column: str, cell: str, problem: str) -> None:
    assert problem in raised_by(table(tmp_path, f"prompt,expected,{column}\nQ,A,{cell}\n")).message


@pytest.mark.parametrize(
    ("header", "said"),
    [
        *((f"prompt,{name}", f"an unknown column '{name}'.") for name in ("answer", "json_schema")),
        ("prompt;expected", "an unknown column 'prompt;expected'."),
        ("prompt,expected,", "an unknown column ''."),
        ("prompt,expected,prompt", "the column 'prompt' twice."),
    ],
)
def test_bad_csv_header(tmp_path: Path, header: str, said: str) -> None:
    error = raised_by(table(tmp_path, f"{header}\nQ,A\n"))
    assert error.message == f"my.csv has {said}"
    assert "prompt, expected, match, category, id, max_tokens, tolerance, threshold, format, mess" in error.fix
