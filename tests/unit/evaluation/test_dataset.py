"""The evaluation set, JSONL or CSV: what counts as right, and every bad line named with its number and reason."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slmops.core.errors import UsageError
from slmops.core.settings import Settings
from slmops.evaluation import dataset, scoring
from slmops.evaluation.dataset import Item


def written(tmp_path: Path, *lines: str | dict[str, Any]) -> Path:
    path = tmp_path / "my.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def raised_by(path: Path, read: Any = dataset.load, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as raised:
        read(path, **options)
    assert raised.value.fix
    return raised.value


GOOD = {"prompt": "Capital of France?", "expected": "Paris"}


def test_good_lines(tmp_path: Path) -> None:
    messages = [{"role": role, "content": f"{role}?"} for role in ("system", "user", "assistant", "user")]
    path = written(
        tmp_path,
        GOOD,
        "",
        {"prompt": "2+2?", "expected": 4, "match": "numeric", "category": "sums", "id": "s1", "max_tokens": 8},
        {"prompt": "Half?", "expected": 0.5, "match": "numeric", "id": ""},
        "   ",
        {"prompt": "Tiny?", "expected": 1e-7, "match": "numeric", "tolerance": 1e-8},
        {"messages": messages, "expected": "Rome"},
    )
    found = dataset.load(path)
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [(i.id, i.prompt, i.expected, i.match, i.category, i.max_tokens) for i in found.items] == [
        ("1", "Capital of France?", "Paris", "contains", "general", 24),
        ("s1", "2+2?", "4", "numeric", "sums", 8),
        ("4", "Half?", "0.5", "numeric", "general", 24),  # the number of its line
        ("6", "Tiny?", "0.0000001", "numeric", "general", 24),
        ("7", None, "Rome", "contains", "general", 24),
    ]
    assert found.items[0].conversation == [{"role": "user", "content": "Capital of France?"}]
    assert found.items[-1].conversation == messages
    # What ends a line, and what does not.
    prompt = "one\u2028two\u2029three\x85four"
    path = written(tmp_path, {"prompt": prompt, "expected": "x"}, "", GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [(i.id, i.prompt) for i in dataset.load(path).items] == [("1", prompt), ("3", GOOD["prompt"])]


def test_items_survive_the_way_to_a_worker() -> None:
    items = [
        Item(prompt="?", match="json_schema", schema={"type": "object"}, expected={"a": [1, True]}),
        Item(prompt="?", expected="1", match="numeric", tolerance=0.5, format={"regex": r"\d"}),
        Item(prompt="?", expected="1", match="rouge_l", threshold=0.9, format="one_line"),
        Item.model_validate({**CALL, "chat_template_kwargs": {"enable_thinking": False}}),
    ]
    for item in items:
        assert Item.model_validate_json(item.model_dump_json()) == item
    assert items[0].expected == '{"a": [1, true]}'
    [tool] = items[3].request["tools"]
    assert tool["function"] == {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert items[3].request["chat_template_kwargs"] == {"enable_thinking": False}
    assert items[1].request.keys() == {"messages", "max_tokens"}
    for category in ("a", "x" * 50, "two words", "snake_case-2", "Länder", " padded "):
        assert Item(prompt="?", expected="x", category=category).category == category.strip()


USER = {"role": "user", "content": "x"}
X = {"prompt": "x", "expected": "x"}
SCHEMA = {"prompt": "x", "match": "json_schema"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = {"prompt": "x", "match": "tool_call", "tools": TOOLS, "expected": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[1]", "it must be a table of keys and values"),
        *(
            ({"prompt": "x", "expected": empty, "match": match}, f"must not be empty for match '{match}'")
            for match, empty in (("contains", ""), ("numeric", " \n"), ("regex", ""))
        ),
        ({"expected": "x"}, "needs either 'prompt' or 'messages'"),
        ({"prompt": "x", "messages": [USER], "expected": "x"}, "needs either 'prompt' or 'messages'"),
        ({"messages": [], "expected": "x"}, "'messages' must end with a user message"),
        ({"messages": [USER, {**USER, "role": "assistant"}], "expected": "x"}, "must end with a user message"),
        ({"messages": [{"role": "tool", "content": "x"}], "expected": "x"}, "messages.0.role must be 'system'"),
        ({"prompt": "x", "expected": True}, "expected must be text"),
        ({**X, "match": "fuzzy"}, "match must be 'contains', 'exact', 'regex', "),
        ({**X, "answer": "y"}, "answer is not a known key"),
        ({"prompt": 3, "expected": "x", "max_tokens": 9999}, "prompt must be text; max_tokens must be at most"),
        ({"prompt": "x", "expected": "(", "match": "regex"}, "'expected' is not a regular expression: missing ), "),
        ({"prompt": "x", "expected": "1e-7", "match": "numeric"}, "'expected' is not a number"),
        ({"prompt": "x", "expected": "мир", "match": "rouge_l"}, "'expected' has no words of a-z and 0-9"),
        ({"prompt": "x", "expected": "The a!", "match": "f1"}, "'expected' has only articles"),
        ({"prompt": "x", "expected": "1", "match": "numeric", "tolerance": -1}, "tolerance must be at least"),
        ('{"prompt": "x", "expected": "1", "match": "numeric", "tolerance": NaN}', "is not JSON: NaN is not JSON"),
        ({**X, "threshold": 1}, "'threshold' is only for match rouge_l or"),
        ({**X, "schema": {}}, "'schema' is only for match json_schema"),
        (SCHEMA, "match 'json_schema' needs a 'schema'"),
        ({**SCHEMA, "schema": {"properties": 3}}, "JSON Schema: 3 is not of type 'object' at $.properties"),
        ({**SCHEMA, "schema": {"pattern": "("}}, "'schema' is not a JSON Schema: '(' is not"),
        ({**SCHEMA, "schema": {"$ref": "http://127.0.0.1:9/s.json"}}, "the schema cannot be applied: Unresolv"),
        ({**SCHEMA, "schema": {}, "expected": "red"}, "'expected' is not JSON"),
        ({**SCHEMA, "schema": {"type": "array"}, "expected": {"a": 1}}, "'schema' does not allow 'expected'"),
        *(
            ({**CALL, "expected": wrong}, "'expected' is not a call such as {\"name\"")
            for wrong in ("", "f", [], "[]", {"name": "f"}, [{"name": "f", "arguments": "{}"}])
        ),
        ({**CALL, "tools": []}, "'expected' calls f, which is not among its 'tools'"),
        ({**CALL, "tools": [{"type": "custom"}]}, "tools.0.type must be 'function'"),
        *(
            ({**X, "format": wrong}, 'format must be "json", "number", "one_line" or {"reg')
            for wrong in ("xml", 3, ["json"], {}, {"regex": 3}, {"regex": "x", "flags": "i"})
        ),
        ({**X, "format": {"regex": "("}}, "format 'regex' is not a regular expression"),
        *(
            ({**X, "category": wrong}, "category must be 1 to 50 letters, digits, blanks")
            for wrong in ("", " ", "a/b", "a.b", "a\nb", "x" * 51)
        ),
        pytest.param("[" * 100_000, "is not JSON: nested too deeply", id="deep"),
        pytest.param('{"prompt": ' + "1" * 5000 + "}", "is not JSON: Exceeds the limit", id="digits"),
        ('{"prompt": "\\ud800", "expected": "x"}', r"is not text: '\ud800' is half a character"),
    ],
)
def test_bad_line_is_named_with_number_and_reason(tmp_path: Path, line: str | dict[str, Any], reason: str) -> None:
    heading, problem = raised_by(written(tmp_path, GOOD, "", line, GOOD)).message.splitlines()
    assert heading == "my.jsonl has bad lines:"
    assert problem.startswith("  - line 3: ")
    assert reason in problem


@pytest.mark.parametrize(
    ("read", "content", "said"),
    [
        *((dataset.load, content, "my.jsonl has no items") for content in (b"", b"\n \n")),
        (dataset.load, '{"prompt": "Caf\xe9?", "expected": "x"}'.encode("latin-1"), "byte 0xe9 in position 15"),
        (dataset.load, None, "my.jsonl cannot be read: No such file"),
        *((dataset.perplexity_text, content, "my.jsonl is empty") for content in (b"", b" \n\t")),
        (dataset.perplexity_text, b"\xff\xfeA\x00", "my.jsonl is not UTF-8"),
        (dataset.perplexity_text, None, "my.jsonl cannot be read"),
    ],
)
def test_file_that_is_of_no_use(tmp_path: Path, read: Any, content: bytes | None, said: str) -> None:
    path = tmp_path / "my.jsonl"
    if content is not None:
        path.write_bytes(content)
    error = raised_by(path, read)
    assert said in error.message
    assert read is dataset.load or str(path) in error.message


def test_matchers_that_need_configuration(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "x", "match": "python"}, {"prompt": "x", "match": "judge", "expected": "y"})
    assert len(dataset.load(path, matcher="mine.py:score", judge=True).items) == 2
    assert "line 1: match 'python' needs --matcher FILE.py:FUNCTION" in raised_by(path, judge=True).message
    assert "line 2" not in raised_by(path, judge=True).message
    assert "line 2: match 'judge' needs a judging model: set SLMOPS_JUDGE_URL" in raised_by(path, matcher="x").message


def test_all_bad_lines_are_named_up_to_ten_and_ids_are_unique(tmp_path: Path) -> None:
    problems = raised_by(written(tmp_path, *["{"] * 13)).message.splitlines()[1:]
    assert [line.partition(":")[0] for line in problems[:-1]] == [f"  - line {number}" for number in range(1, 11)]
    assert problems[-1] == "  - and 3 more"
    error = raised_by(written(tmp_path, {**GOOD, "id": "a"}, GOOD, {**GOOD, "id": "b"}, "{", {**GOOD, "id": "a"}))
    assert error.message.splitlines()[1:] == [
        "  - line 4: is not JSON: Expecting property name enclosed in double quotes at column 2",
        "  - line 5: line 1 already has the id 'a'",
    ]
    # A line's number may be the id of another.
    path = written(tmp_path, GOOD, {**GOOD, "id": "1"}, GOOD, {**GOOD, "id": "line-3"}, {**GOOD, "id": "3"})
    assert [i.id for i in dataset.load(path).items] == ["line-1", "1", "line-line-3", "line-3", "3"]


OBJECT = {"match": "json_schema", "schema": {"type": "object", "required": ["a"]}, "expected": {"a": 1}}
FENCED = '```json\n{"a": 2}\n```'  # it need not be right


@pytest.mark.parametrize(
    ("asked", "valid", "invalid"),
    [
        ({"format": "json"}, [' {"a": 1}\n', "4"], [FENCED, '{"a": NaN}', "", "[" * 100_000]),
        ({"format": "number"}, ["4", " -1,234.5.\n", "10."], ["10..", "1,23", "2 + 2", "It is 4.", ""]),
        ({"format": "one_line"}, ["A sentence. And one more.\n"], ["First.\nSecond.", "First.\u2028Second.", " \n"]),
        ({"format": {"regex": "[A-D]"}}, [" B\n"], ["BC", "The answer is B"]),
        ({"format": {"regex": "a*"}}, ["a" * 20_000], ["a" * 20_001]),
        (OBJECT, [FENCED], ['{"b": 1}']),
        ({**OBJECT, "format": "json"}, ['{"b": 1}'], [FENCED]),
    ],
)
def test_format(asked: dict[str, Any], valid: list[str], invalid: list[str]) -> None:
    item = Item.model_validate({"prompt": "?", "expected": "x", **asked})
    for answer in (*valid, *invalid):
        assert item.format_valid(answer) is (answer in valid), answer[:30]
    assert Item(prompt="?", expected="x").format_valid("anything") is None


def test_subset_is_spread_over_the_categories() -> None:
    names = ("a1", "a2", "a3", "a4", "b1", "b2", "c1", "a5")
    items = [Item(prompt="?", expected="x", id=name, category=name[0]) for name in names]
    chosen = {0: "", -1: "", 2: "a1 b1", 3: "a1 b1 c1", 5: "a1 b1 c1 a2 b2", 6: "a1 b1 c1 a2 b2 a3"}
    chosen |= dict.fromkeys((8, 99), "a1 b1 c1 a2 b2 a3 a4 a5")
    assert {count: " ".join(str(item.id) for item in dataset.subset(items, count)) for count in chosen} == chosen


def test_packaged_set() -> None:
    found = dataset.load(None)
    assert len(found.items) == len({i.id for i in found.items}) == 40
    assert len({i.conversation[-1]["content"] for i in found.items}) == 40
    assert min(Counter(i.category for i in found.items).values()) >= 4
    assert not any(scoring.judgement(item, "", None, Settings()).correct for item in found.items)
    forms = {"Answer with the number only.": ("number", 8), "Answer in one sentence.": ("one_line", 16)}
    for item in found.items:
        asked = [want for text, want in forms.items() if (item.prompt or "").endswith(text)]
        assert [(item.format, item.max_tokens)] == asked or (item.format is None and item.max_tokens in (16, 24))


def test_text_of_the_user_and_the_default_one(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("Zwölf\r\nBoxkämpfer".encode())
    assert dataset.perplexity_text(path) == ("Zwölf\r\nBoxkämpfer", hashlib.sha256(path.read_bytes()).hexdigest())
    text, digest = dataset.perplexity_text(None)
    assert len(text.split()) > 10_000
    assert digest == hashlib.sha256(text.encode()).hexdigest()


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
    assert letter.format == {"regex": "[A-D]"}


def test_csv_is_what_the_suffix_says_and_may_be_empty(tmp_path: Path) -> None:
    content = "prompt,expected\nQ,A\n"
    assert len(dataset.load(table(tmp_path, content, "UPPER.CSV")).items) == 1
    assert "line 1: is not JSON" in raised_by(table(tmp_path, content, "my.jsonl")).message
    for empty in ("", "\n", "prompt,expected\n", "prompt, expected\n,\n"):
        assert raised_by(table(tmp_path, empty)).message == "my.csv has no items."


@pytest.mark.parametrize(
    ("column", "rows", "problems"),
    [
        ("", "Q,A\nQ\nQ,A,x\nQ,A\n", ["line 3: has 1 cells, but the header has 2", "line 4: has 3 cells"]),
        ("", '"two\nlines",A\nQ,\n"two\nlines",\n', ["line 4: 'expected' must", "line 5: 'expected' must"]),
        ("", 'Q,A\n"Q,A\nQ,A\n', ["line 3: is not CSV from here on: unexpected end of data"]),
        (",format", "Q,A,xml\n", ['line 2: format must be "json"']),
        (",format", 'Q,A,"{""regex"""\n', ["line 2: format is not JSON: Expecting ':' delimiter at column 9"]),
        (",tolerance", "Q,A,inf\n", ["line 2: tolerance must be a finite number"]),
        (",id", 'Q,A,x\n"1\n2",A,y\nQ,A,x\n', ["line 5: line 2 already has the id 'x'"]),
    ],
)
def test_bad_csv_rows(tmp_path: Path, column: str, rows: str, problems: list[str]) -> None:
    heading, *found = raised_by(table(tmp_path, f"prompt,expected{column}\n{rows}")).message.splitlines()
    assert heading == "my.csv has bad lines:"
    for line, problem in zip(found, problems, strict=True):
        assert line.startswith(f"  - {problem}")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        *((f"prompt,{name}", f"an unknown column '{name}'.") for name in ("answer", "json_schema")),
        ("prompt,expected,", "an unknown column ''."),
        ("prompt,expected,prompt", "the column 'prompt' twice."),
    ],
)
def test_bad_csv_header(tmp_path: Path, header: str, said: str) -> None:
    error = raised_by(table(tmp_path, f"{header}\nQ,A\n"))
    assert error.message == f"my.csv has {said}"
    assert "prompt, expected, match, category, id, max_tokens, tolerance, threshold, format, mess" in error.fix
