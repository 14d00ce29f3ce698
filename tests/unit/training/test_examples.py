"""Training items: lines of files, good and bad, duplicates, leaks and the split."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from slmops.evaluation.dataset import Item
from slmops.training import checks, examples
from slmops.training.examples import Example, ExamplesRead
from tests.retraining import conversation

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


# --- compared with each other and with the evaluation set

NINE = "the old printer on the second floor eats paper"  # nine words: five 5-grams


def example(*turns: str, line: int = 1, system: str | None = None) -> Example:
    """With an answer added where the user has the last word."""
    said = [*turns, "Fine."] if len(turns) % 2 else [*turns]
    return Example("a.jsonl", line, tuple(conversation(*said, system=system)))


def numbered(*texts: str) -> list[Example]:
    return [example(text, line=line) for line, text in enumerate(texts, 1)]


def item(*turns: str, system: str | None = None) -> Item:
    return Item.model_validate({"id": "q1", "messages": conversation(*turns, system=system), "expected": "x"})


PASSWORD = "How do I reset my password?"
SHORT_TURN = item(NINE, "Shall I order paper?", "Yes please.")


def found(train: Sequence[Example], *held_out: Item, threshold: float = 0.8) -> list[tuple[int, str]]:
    return [(problem.line, problem.kind) for problem in checks.leaks(train, held_out, threshold)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's  THE\n“end”.", ["it", "s", "the", "end"]),
        ("ＦＵＬＬ ﬁne ²", ["full", "fine", "2"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("cafe\u0301", ["café"]),
        ("क्या हाल", ["क्या", "हाल"]),
        ("日本語 ok", ["日", "本", "語", "ok"]),
        ("2+2", ["2", "+", "2"]),
        ("5-3 5 * 3 6/2", ["5", "−", "3", "5", "×", "3", "6", "÷", "2"]),
        ("a-b", ["a", "b"]),
        ("😀", ["😀"]),
        (" ?! ", ["?!"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert checks.words(text) == expected


def test_exact_duplicates_are_kept_once() -> None:
    train = numbered("a", "b", "a", "a")
    kept, problems = checks.unique(train)
    assert kept == train[:2]
    assert problems == [one.problem("duplicate", "the same as a.jsonl:1; kept once") for one in train[2:]]


def test_near_duplicates_and_contradictions() -> None:
    train = [
        example(NINE, "Call us."),
        example(NINE.upper() + "!", "call us", line=2),
        example(NINE, "Buy\na new one.", line=3),
        example(f"{NINE} again", "Call us.", line=4),
        example("something else altogether is what this one asks", line=5),
    ]
    assert [(problem.line, problem.kind, problem.detail) for problem in checks.alike(train, 0.8)] == [
        (2, "near_duplicate", "the same as a.jsonl:1 except for case, spaces and punctuation"),
        (3, "near_duplicate", "asks the same as a.jsonl:1, with a different answer: 'Buy\\na new one.'"),
        (4, "near_duplicate", "asks nearly the same as a.jsonl:1 (similarity 0.83)"),
    ]
    other_prompt = [example(NINE, "Ja.", system="Answer in German."), example(NINE, "Oui.", system="Answer in French.")]
    [problem] = checks.alike(other_prompt, 0.8)
    assert problem.detail == "asks nearly the same as a.jsonl:1 (similarity 1.00)"


@pytest.mark.parametrize(
    ("train", "held_out", "expected"),
    [
        (numbered("One thing."), item("Another matter.", system="One thing."), []),  # a system prompt is not compared
        (numbered("No.", f" {NINE}", f"{NINE.upper()}…", NINE.replace("paper", "“ＰＡＰＥＲ”")), item(NINE), [2, 3, 4]),
        # Short questions that differ in a word.
        (numbered("How do I reset my screen?", PASSWORD), item(PASSWORD), [2]),
        (numbered("👎", "👍"), item("👍"), [2]),
        (numbered("日本の人口はどこですか", "日本の首都はどこですか"), item("日本の首都はどこですか"), [2]),
        (numbered("5 - 3?", "5 * 3?", "5 / 3?", "What is 12 + 6?", "Is 3 > 5?"), item("5 + 3?"), []),
        (numbered("What is 12 - 5?", "What is 12 + 6?"), item("What is 12 + 5?"), []),
        (numbered("Is 3 > 5?"), item("Is 5 > 3?"), []),
        (numbered("Hello", "Hello you", "you hello", "hello, you there"), item("Hello you!"), [2]),
        ([example(NINE, "Since when?", "Since Monday.")], item(NINE), [1]),
        ([example("Good morning", "Yes?", NINE)], item(NINE), [1]),
        ([example("Can the weather change until tomorrow", "It can.", "Yes, please!")], SHORT_TURN, []),
        ([example(NINE, "Order some?", "yes, please")], SHORT_TURN, [1]),
        ([example("one", "?", NINE, "Order some?", "yes, please")], SHORT_TURN, [1]),  # what came before does not count
    ],
)
def test_leaks(train: list[Example], held_out: Item, expected: list[int]) -> None:
    assert found(train, held_out) == [(line, "leak") for line in expected]


def test_the_threshold_itself_is_a_leak() -> None:
    # Nine words are five 5-grams; the first eight have four of them.
    train = numbered("No.", NINE.rpartition(" ")[0], NINE)
    assert found(train, item(NINE), threshold=0.81) == [(3, "leak")]
    assert checks.leaks(train, [item(NINE)], 0.8) == [
        train[1].problem("near_leak", "asks nearly the same as evaluation item q1 (similarity 0.80)"),
        train[2].problem("leak", "asks the same as evaluation item q1"),
    ]


def test_a_word_more_is_near() -> None:
    for words in range(5, 30):
        question = " ".join(f"w{number}" for number in range(words))
        assert found(numbered(f"{question} please"), item(question)) == [(1, "near_leak")], words


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7, 0.8, 1.0])
def test_nothing_is_missed(threshold: float) -> None:
    """Against comparing each with each."""
    rng = random.Random(threshold)

    def text() -> list[str]:
        return rng.choices("abc", k=rng.randint(1, 12))

    questions, texts = [text() for _ in range(60)], [text() for _ in range(120)]

    def first(candidates: Sequence[list[str]], other: list[str]) -> tuple[int, float] | None:
        for number, question in enumerate(candidates):
            one, two = (checks._grams(text, checks._gram(len(question))) for text in (question, other))
            if (similarity := len(one & two) / len(one | two)) >= threshold:
                return number, similarity
        return None

    similar = {place: hit for place, other in enumerate(texts) if (hit := first(questions, other))}
    assert similar == checks._similar(questions, texts, threshold) != {}
    similar = {place: hit for place, other in enumerate(texts) if (hit := first(texts[:place], other))}
    assert similar == checks._similar(texts, texts, threshold, before=True)


@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_the_split(seed: int) -> None:
    train = numbered(*(f"question {number}" for number in range(1000)))
    training, validation = checks.split(train, 0.1, seed)
    assert sorted([*training, *validation], key=lambda one: one.line) == train
    assert 70 < len(validation) < 130
    assert [one.line for one in validation] == sorted(one.line for one in validation)
    assert checks.split(train, 0.1, seed + 1)[1] != validation
    _, before = checks.split(train[:300], 0.1, seed)  # more data move nothing
    assert {one.line for one in before} == {one.line for one in validation if one.line <= 300}


@pytest.mark.parametrize("share", [1e-9, 0.1, 0.499])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_neither_side_is_empty(count: int, share: float) -> None:
    for seed in range(20):
        assert all(checks.split(numbered(*map(str, range(count))), share, seed))


def test_long_lists_are_shortened() -> None:
    problems = [one.problem("duplicate", "x") for one in numbered(*"a" * 50)]
    assert checks.shortened(problems[:20]) == problems[:20]
    *listed, last = checks.shortened(problems)
    assert listed == problems[:20]
    assert (last.line, last.detail) == (21, "and 30 more like this, from here on")
