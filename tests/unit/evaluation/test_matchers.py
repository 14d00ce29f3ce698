"""Matchers: what is right, what is wrong, and what cannot be judged."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from slmops.checkpoints.abilities import Pair
from slmops.core.errors import UsageError
from slmops.core.settings import Settings
from slmops.evaluation import answers_worker, matchers, scoring
from slmops.evaluation.dataset import Item
from slmops.evaluation.matchers import Judgement


def judged(match: str, expected: Any, answer: str, **options: Any) -> Judgement:
    item = Item.model_validate({"prompt": "?", "match": match, "expected": expected, **options})
    return scoring.judgement(item, answer, None, Settings())


@pytest.mark.parametrize(
    ("match", "expected", "right", "wrong"),
    [
        ("contains", "Paris", ["The capital is PARIS."], ["Pari s", ""]),
        ("contains", "straße", ["Die STRASSE"], ["Die Strase"]),
        ("exact", "Paris", [" Paris\n"], ["paris", "Paris."]),
        ("regex", r"\b[Pp]aris\b", ["in Paris, France"], ["Parisian"]),
        ("regex", r"^Paris$", ["Paris"], ["Paris, France"]),
        ("regex", ".*", [""], []),
        ("regex", "b", ["a" * 19_999 + "b"], ["a" * 20_000 + "b"]),  # in the last character that counts, and behind it
        ("numeric", "4", ["2 + 2 = 4.", "4.0", "GPT-4"], ["4 is 2 + 2", "four", "", "1" * 10_000]),  # the last counts
        ("numeric", "1234567.5", ["That makes 1,234,567.5 in all."], ["1,234,567"]),
        ("numeric", "-5", ["It is -5 degrees.", "=-5"], ["Between 3-5.", "GPT-5"]),
        ("numeric", "5", ["Between 3-5."], ["It is -5 degrees."]),
        ("numeric", "1,000", ["1000"], ["1"]),
        ("numeric", "9007199254740993", ["9007199254740993"], ["9007199254740992"]),  # equal in binary floating point
    ],
)
def test_right_or_wrong(match: str, expected: str, right: list[str], wrong: list[str]) -> None:
    for answer in right:
        assert judged(match, expected, answer) == Judgement(score=1, correct=True), answer[:30]
    for answer in wrong:
        assert judged(match, expected, answer) == Judgement(score=0, correct=False), answer[:30]


def test_a_tool_call_has_its_name_and_its_arguments() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    f, g = ({"name": name, "arguments": {"a": 1, "b": [True]}} for name in ("f", "g"))

    def right(expected: Any, answer: str) -> bool | None:
        return judged("tool_call", expected, answer, tools=tools).correct

    turned = {"arguments": {"b": [True], "a": 1.0}, "name": "f"}
    for expected in (f, json.dumps(f), [f]):
        assert right(expected, matchers.as_answer([turned])), expected
    assert right([f, g], matchers.as_answer([f, g]))
    assert right(f, matchers.as_answer([{"name": "f", "arguments": json.dumps(f["arguments"])}]))  # as the runtime says
    others = (
        [{"name": "f", "arguments": "Paris"}],
        [g],
        [f, f],
        [f, g],
        [],
        [{**f, "arguments": {"a": 1}}],
        [{**f, "arguments": {"a": 1, "b": [1]}}],
    )
    for answer in (*map(matchers.as_answer, others), json.dumps(f), "f", ""):
        assert not right(f, answer), answer
    assert not right([f, g], matchers.as_answer([g, f]))


def test_the_calls_and_the_answer_of_a_checkpoint_are_told_from_its_thoughts() -> None:
    call, thought = (Pair(opening=f"<{name}>", closing=f"</{name}>", ids=(1, 2)) for name in ("call", "think"))
    f, g = '{"name": "f", "arguments": {"a": 1}}', '[{"name": "g", "parameters": {}}]'
    found = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    assert answers_worker.calls_of(f"So:<call>\n{f}\n</call>\n<call>{g}</call>", call) == found
    for broken in (f, f"<call>{f}", "<call>f(1)</call>", "<call>3</call>"):
        assert answers_worker.calls_of(broken, call) == [], broken
    assert answers_worker.calls_of(f"<call>{f}</call>", None) == []
    for tokens, pair, prompt, shown in (
        ([1, 5, 2, 6], thought, "", [6]),
        ([5, 2, 6], thought, "<think>\n", [6]),
        ([5, 6], thought, "<think>\n", []),
        ([1, 5], thought, "", []),
        ([5, 6], thought, "", [5, 6]),
        ([1, 5, 2, 6], None, "", [1, 5, 2, 6]),
    ):
        assert answers_worker.without_thoughts(tokens, pair, prompt) == shown


def test_tolerance() -> None:
    for expected, answer, tolerance, right in (
        ("1", "1.1", 0.1, True),  # 0.10000000000000009 in binary floating point
        ("1", "1.1000001", 0.1, False),
        ("-5", "5", 1, False),
        ("0.0000001", "0.0000002", 1e-7, True),
        ("5", "none", 100, False),
    ):
        assert judged("numeric", expected, answer, tolerance=tolerance).correct is right, answer


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
VALID = [
    '{"name": "Ada", "age": 36}',
    ' \n{"name": "Ada"}\n',
    *(f'```{language}{{"name": "Ada"}}\n```' for language in ("json\n", "JSON\n", "\n", "")),
    'Here you are:\n```json\n{"name": "Ada"}\n```\nAnything else?',
    '```json\n{"name": "Ada"}',
    '```python\nprint()\n```\n```json\n{"name": "Ada"}\n```',
    '{"name": "``` Ada ```"}',
]
INVALID = [
    *('{"name": 3}', '{"age": 3}', '{"name": "Ada", "x": 1}', '{"name": "Ada"', "{'name': 'Ada'}"),
    *('The answer is {"name": "Ada"}', "", "```json\n```", '{"name": "Ada", "age": NaN}', "[" * 100_000),
]
DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "string"}]}


@pytest.mark.parametrize(
    ("schema", "expected", "right", "wrong"),
    [
        (PERSON, "", VALID, INVALID),
        (
            PERSON,
            '{"name": "Ada", "age": 36}',
            ['{"age": 36, "name": "Ada"}', '{"name": "Ada", "age": 36.0}'],
            ['{"name": "Eve", "age": 36}', '{"name": "Ada"}'],
        ),
        ({}, "[1]", ["[1.0]"], ["[true]"]),
        (DRAFT_7, "", ['["a"]'], ["[1]"]),  # an array of schemas there is a tuple
    ],
)
def test_json_schema(schema: dict[str, Any], expected: str, right: list[str], wrong: list[str]) -> None:
    for answer in (*right, *wrong):
        assert judged("json_schema", expected, answer, schema=schema) == Judgement.of(answer in right), answer[:50]


def test_schema_that_cannot_be_applied() -> None:
    for reference in ("#/$defs/none", "http://127.0.0.1:9/schema.json", "#/items"):
        found = judged("json_schema", "", "[1]", schema={"items": {"$ref": reference}})
        assert (found.score, found.correct) == (None, None), reference
        assert (found.reason or "").startswith("the schema cannot be applied: ")


@pytest.mark.parametrize(
    ("match", "expected", "answer", "score"),
    [
        ("rouge_l", "the cat sat", "The cat sat.", 1.0),
        ("rouge_l", "a b c d", "d c b a", 1 / 4),  # in order: one word
        *(("rouge_l", "the cat sat", other, 0.0) for other in ("a dog ran", "", "кот")),
        ("f1", "The Eiffel Tower", "eiffel tower!", 1.0),  # articles, case and punctuation do not count
        ("f1", "a b c d", "d c b", 1.0),  # in any order, and `a` is an article
        ("f1", "Eiffel Tower", "the tall tower", 2 * 1 / (2 + 2)),
        ("f1", "b b c", "b", 2 * 1 / (1 + 3)),  # each word as often as it is there
        *(("f1", "Eiffel Tower", other, 0.0) for other in ("Big Ben", "", "the")),
        ("f1", "Зимний дворец", "зимний дворец", 1.0),
        ("f1", "theatre", "atre", 0.0),  # only whole articles
        *((match, "red green blue", "red green", 0.8) for match in ("rouge_l", "f1")),
    ],
)
def test_words_in_common(match: str, expected: str, answer: str, score: float) -> None:
    for threshold in (None, 0.0, 0.6, 0.9, 1.0):
        found = judged(match, expected, answer, threshold=threshold)
        assert found.score == pytest.approx(score)
        assert found.correct is (score >= (0.5 if threshold is None else threshold))


def written(folder: Path, code: str) -> str:
    path = folder / "mine.py"
    path.write_text(textwrap.dedent(code), encoding="utf-8")
    return f"{path}:score"


def by_python(folder: Path, code: str, **options: Any) -> Judgement:
    item = Item(prompt="?", expected="Paris", match="python", **options)
    return scoring.judgement(item, "Rome", matchers.load_function(written(folder, code)), Settings())


@pytest.mark.parametrize(
    ("result", "score"),
    [
        *(("expected == answer", 0), ("expected == 'Paris' and answer == 'Rome'", 1)),
        *(("0.75", 0.75), ("0.25", 0.25), ("1", 1), ("0", 0)),
        *(("__import__('numpy').bool_(True)", 1), ("__import__('numpy').float32(0.25)", 0.25)),
    ],
)
def test_python(tmp_path: Path, result: str, score: float) -> None:
    code = f"def score(expected, answer): return {result}"
    assert by_python(tmp_path, code) == Judgement(score=score, correct=score >= 0.5)
    assert by_python(tmp_path, code, threshold=0.8).correct is (score == 1)


def test_python_file_with_a_dataclass_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = """
        from __future__ import annotations
        from dataclasses import dataclass
        print("loaded")

        @dataclass
        class Scorer:
            least: int

            def __call__(self, expected: str, answer: str) -> bool:
                print("called")
                return len(answer) >= self.least

        score = Scorer(3)
    """
    assert by_python(tmp_path, code).correct is True
    assert capsys.readouterr() == ("", "loaded\ncalled\n"), "standard output is for data"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ValueError('no such city')", "the function raised ValueError: no such city in line 3"),
        ("import json; return json.loads(answer)", "Expecting value: line 1 column 1 (char 0) in line 3"),
        ("return eval('1 +')", "the function raised SyntaxError: invalid syntax in line 3"),
        ("raise SystemExit(3)", "the function raised SystemExit: 3 in line 3"),
        ("return score(expected, answer)", "the function raised RecursionError: maximum recursion depth exceeded"),
        ("return 'yes'", "the function returned 'yes', "),
        ("return -1", "the function returned -1, which is neither"),
        ("return float('nan')", "the function returned nan, which is neither"),
        ("return [1] * 99", "the function returned [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, which"),
        ("return 10 ** 5000", "the function raised ValueError: Exceeds the limit"),
        ("raise Odd", "the function raised Odd: <exception str() failed> in line 3"),
    ],
)
def test_python_that_fails_is_unscored(tmp_path: Path, body: str, reason: str) -> None:
    odd = "class Odd(Exception):\n    __str__ = None\n"
    found = by_python(tmp_path, f"import sys\ndef score(expected, answer):\n    {body}\n{odd}")
    assert (found.score, found.correct) == (None, None)
    assert reason in (found.reason or "")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def score(expected, answer)\n    pass\n", "does not import: SyntaxError: expected ':' in line 1"),
        ("x = 1\nimport no_such_module\n", "does not import: ModuleNotFoundError: No module named 'no_such_mod"),
        ("import json\njson.loads('')\n", "(char 0) in line 2"),
        ("import sys\nsys.exit('bye')\n", "does not import: SystemExit: bye in line 2"),
        ("def scores(expected, answer): pass\n", "has no function score."),
        ("score = 3\n", "is not a function: int."),
        ("def score(answer): pass\n", "cannot be called with (expected, answer): too many positional arguments."),
    ],
)
def test_file_that_cannot_be_used(tmp_path: Path, code: str, said: str) -> None:
    spec = written(tmp_path, code)
    with pytest.raises(UsageError) as raised:
        matchers.load_function(spec)
    assert said in raised.value.message
    assert spec.rpartition(":")[0] in raised.value.message
    assert (raised.value.fix or "").startswith("Give FILE.py:FUNCTION")


def test_no_such_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").touch()
    for spec in ("none.py:score", "none.py", ":score", "."):
        with pytest.raises(UsageError, match="There is no file"):
            matchers.load_function(spec)
    with pytest.raises(UsageError, match="is not a Python file"):
        matchers.load_function("mine.txt:score")


@pytest.mark.usefixtures("no_settings")
def test_without_what_it_needs() -> None:
    assert judged("python", "x", "x").reason == "no function was given"
    found = scoring.judgement(Item(prompt="?", match="judge"), "x", None, Settings())
    assert found.correct is None
    assert "SLMOPS_JUDGE_URL" in (found.reason or "")
