"""Each edge case with a model of strings, and how what was seen is judged."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmops.core.errors import EvaluationError
from slmops.core.settings import Settings
from slmops.core.values import CaseOutcome, Registration
from slmops.evaluation import edge_cases
from slmops.evaluation.edge_cases import CaseProgress, EdgeCase, Messages, Probe
from slmops.processes import children
from tests import values

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + TEMPLATE
CONTEXT = 200


def answer(text: str = "Paris.", finish_reason: str = "stop", prompt: int = 10, completion: int = 2) -> Any:
    """As the runtime's."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    thoughts, _, text = text.rpartition("</think>")
    return SimpleNamespace(text=text, reasoning=thoughts, finish_reason=finish_reason, **counts)


class RuntimeRefusal(Exception):
    """As the SDK's exception: a message and a code."""

    def __init__(self, message: str, error_code: int) -> None:
        super().__init__(message)
        self.error_code = error_code


class Model:
    """Counts words, and refuses what the real runtime refuses. With ``cuts`` it does so at a NUL, as that one does."""

    def __init__(self, *, cuts: bool = False, replies: list[Any] | None = None) -> None:
        self.cuts = cuts
        self.replies = replies or []
        self.asked: list[tuple[Messages, int]] = []

    def __call__(self, messages: Messages, max_tokens: int) -> Any:
        self.asked.append((messages, max_tokens))
        text = " ".join(message["content"] for message in messages)
        text.encode()
        tokens = self.count(text.split("\0")[0] if self.cuts else text)
        if tokens + max_tokens > CONTEXT:
            said = f"search_options.cc:108 int fl::Check(int64_t, int) {tokens} and {max_tokens} tokens (too many)"
            raise RuntimeRefusal(said, edge_cases.INVALID_ARGUMENT)
        reply = self.replies.pop(0) if self.replies else answer(prompt=tokens)
        if isinstance(reply, Exception):
            raise reply
        return reply

    @staticmethod
    def count(text: str) -> int:
        return len(text.replace("\0", " ").split()) + 7  # the template


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    added = [{"content": "<|end|>", "special": True}, {"content": "plain", "special": False}]
    folder = tmp_path / "variant"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "genai_config.json").write_text('{"model": {"context_length": 100}, "search": {}}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def go_through(
    folder: Path, name: str, model: Any = None, count: Callable[[str], int] = Model.count
) -> tuple[CaseProgress, Model]:
    asked = model or Model()
    return edge_cases.see(EdgeCase(id=name, expected="answered"), Probe(asked, count, CONTEXT, folder)), asked


SOUND = {  # a model that does all as it should
    **{case.id: "answered" for case in edge_cases.EDGE_CASES},
    **dict.fromkeys(("longer_than_context", "one_beyond_the_context", "repeated_tokens", "lone_surrogate"), "refused"),
}


def test_a_sound_model_and_what_it_is_sent(folder: Path) -> None:
    sent: dict[str, str] = {}
    for name, outcome in SOUND.items():
        seen, model = go_through(folder, name)
        assert seen.outcome == outcome, name
        sent[name] = model.asked[-1][0][0]["content"]
    assert "<|end|>" in sent["own_special_tokens"]
    assert "plain" not in sent["own_special_tokens"]
    assert "<|im_end|>" in sent["foreign_markers"]
    assert "\u200d" in sent["emoji"]
    assert "\0" in sent["nul_in_text"]
    assert (sent["empty"], sent["whitespace"].strip()) == ("", "")
    assert len(sent["repeated_tokens"].split()) == 10_000
    with pytest.raises(UnicodeEncodeError):
        sent["lone_surrogate"].encode()
    assert [*sent][-1] == "ordinary_question"  # whether it still answers, after all the others


def test_the_end_of_the_context_is_where_the_runtime_counts_it(folder: Path) -> None:
    for name, beyond in (("exactly_the_context", 0), ("one_beyond_the_context", 1)):
        # This tokenizer counts less than the runtime; the runtime's count decides.
        seen, model = go_through(folder, name, count=lambda text: Model.count(text) - 2)
        (first, one), (second, wanted) = model.asked
        assert (seen.outcome, first) == (SOUND[name], second)
        assert (one, wanted) == (1, CONTEXT - Model.count(first[0]["content"]) + beyond)
    seen, _ = go_through(folder, "exactly_the_context", count=lambda _: CONTEXT)
    assert "template leaves no room" in seen.detail


@pytest.mark.parametrize(
    ("name", "model", "outcome", "detail"),
    [
        ("nul_in_text", Model(cuts=True), "cut", "13 of 23 prompt tokens reached the model"),
        ("nul_in_text", Model(replies=[answer(prompt=9), ValueError("embedded NUL")]), "refused", "embedded NUL"),
        ("greedy_twice", Model(replies=[answer("Paris."), answer("Rome.")]), "unequal", "first 'Paris.', then 'Rome.'"),
        ("greedy_twice", Model(replies=[answer("One</think>"), answer("Two</think>")]), "unequal", "'One', then 'Two'"),
        ("emoji", Model(replies=[answer("", "stop", 9, 0)]), "answered", "9 prompt tokens, 0 generated (stop)"),
        ("emoji", Model(replies=[answer("x", "error")]), "failed", "(error)"),
        ("emoji", Model(replies=[RuntimeRefusal("out of memory", 2)]), "failed", "RuntimeRefusal: out of memory"),
        ("emoji", Model(replies=[KeyError("x")]), "failed", "KeyError"),
        ("repeated_tokens", Model(), "refused", "RuntimeRefusal: 10007 and 6 tokens (too many)"),
        ("assistant_first", Model(replies=[RuntimeRefusal("internal", 2)]), "failed", "internal"),
    ],
)
def test_what_can_go_wrong(name: str, model: Model, outcome: str, detail: str, folder: Path) -> None:
    seen, _ = go_through(folder, name, model)
    assert seen.outcome == outcome
    assert detail in seen.detail


def test_a_chat_template_may_refuse_that_the_assistant_begins(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(STRICT)
    seen, _ = go_through(folder, "assistant_first", Model(replies=[RuntimeRefusal("user first at row 1", 2)]))
    assert (seen.outcome, seen.detail) == ("refused", "the chat template refuses it")


def test_judging() -> None:
    broken = [(end, 0) for end in ("crashed", "hung", "cut", "unequal", "failed")]
    for expected, passes, fails in (
        ("answered", [("answered", 60)], [("refused", 0)]),
        ("refused", [("refused", 4.9)], [("refused", 5.1), ("answered", 0)]),
        ("answered or refused", [("answered", 60), ("refused", 60)], []),
    ):
        for outcome, seconds in [*passes, *fails, *broken]:
            end = CaseProgress(id="one", at=0, outcome=outcome, detail="said", seconds=seconds)
            judged = edge_cases._judge(EdgeCase(id="one", expected=expected), end)
            assert judged.passed is ((outcome, seconds) in passes), outcome
            assert (judged.id, judged.expected, judged.outcome) == ("one", expected, outcome)
            assert judged.detail == ("Only after 5 s: said" if seconds == 5.1 else "said")


def outcome(name: str, what: str, passed: bool = False) -> CaseOutcome:
    return CaseOutcome(id=name, expected="answered or refused", outcome=what, passed=passed, detail="")


CUT, WHOLE = outcome("nul_in_text", "cut"), outcome("nul_in_text", "answered", True)
GOOD, BAD = outcome("a", "answered", True), outcome("b", "hung")


@pytest.mark.parametrize(
    ("cases", "share", "samples", "note"),
    [
        ([GOOD, BAD], 0.5, 2, None),
        ([GOOD, BAD, CUT], 0.5, 2, "not counted: nul_in_text"),
        ([GOOD, WHOLE], 1.0, 2, None),
        ([GOOD, outcome("nul_in_text", "crashed")], 0.5, 2, None),  # another defect than the known one
        ([GOOD, outcome("a", "cut")], 0.5, 2, None),
    ],
)
def test_share_of_cases_passed(cases: list[CaseOutcome], share: float, samples: int, note: str | None) -> None:
    made = edge_cases.measurement(cases)
    assert (made.value, made.low, made.high, made.samples, made.note) == (share, share, share, samples, note)
    assert made.unit == "1"


class Children:
    """Stand in for processes that die after these lines unless a full stop follows.

    A letter is a line: a case begins (``a``) or ends (``A``), at a moment that has not come yet.
    """

    def __init__(self, *ends: str) -> None:
        self.ends = list(ends)
        self.asked: list[str] = []

    def __call__(self, _module: str, request: edge_cases.EdgeCaseRequest, *_: Any, **__: Any) -> None:
        self.asked.append("".join(case.id for case in request.cases))
        end = self.ends.pop(0)
        request.progress.parent.mkdir(parents=True, exist_ok=True)
        for name in end.rstrip("."):
            line = CaseProgress(id=name.lower(), at=1e12, outcome="answered" if name.isupper() else None)
            edge_cases.write(request.progress, line)
        if not end.endswith("."):
            raise EvaluationError("The process was killed by SIGSEGV: it said nothing", "Its log: x")


@pytest.mark.parametrize(
    ("ends", "asked", "outcomes"),
    [
        (["aAb", "cC."], ["abc", "c"], ["answered", "crashed", "answered"]),
        # Between two cases: nobody's fault that could be named, and the rest is tried again.
        (["aA", "bBcC."], ["abc", "bc"], ["answered"] * 3),
        (["aAbBcC"], ["abc"], ["answered"] * 3),  # after the last: all is there
        # Before any further case: the variant's fault.
        ([""], ["abc"], []),
        (["a", ""], ["abc", "bc"], []),
    ],
)
def test_what_a_crash_costs(
    ends: list[str], asked: list[str], outcomes: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = Children(*ends)
    monkeypatch.setattr(edge_cases.prompts, "counter", lambda _: Model.count)
    monkeypatch.setattr(children, "call", stand_in)
    settings = Settings(home=folder.parent / "home")
    registration = Registration(foundry_id="x-generic-cpu:1", path=folder, answer="")
    cases = [EdgeCase(id=name, expected="answered") for name in "abc"]
    with nullcontext() if outcomes else pytest.raises(EvaluationError, match="SIGSEGV"):
        found = edge_cases.run(values.variant(folder), registration, "tiny", settings, cases=cases)
        assert [(case.id, case.outcome) for case in found] == list(zip("abc", outcomes, strict=True))
    assert stand_in.asked == asked
    assert not (settings.work("tiny") / "int4-edge").exists()
