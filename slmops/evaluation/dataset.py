"""The evaluation set: JSONL, one item a line, checked line by line before any work."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from slmops.errors import UsageError
from slmops.models import Frozen

DEFAULT = "general.jsonl"
SHOWN_PROBLEMS = 10


class Message(Frozen):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Item(Frozen):
    """One question, the expected answer, and how to compare.

    ``match``: ``contains`` (default; case does not count), ``exact`` (but for outer blanks), ``regex`` (found anywhere)
    or ``numeric`` (the last number of the answer).
    """

    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    expected: str
    match: Literal["contains", "exact", "regex", "numeric"] = "contains"
    category: str = "general"
    id: str | None = None
    max_tokens: int = Field(24, ge=1, le=4096)

    @model_validator(mode="after")
    def _one_question(self) -> Item:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either 'prompt' or 'messages'")
        if self.messages is not None and (not self.messages or self.messages[-1].role != "user"):
            raise ValueError("'messages' must end with a user message")
        if self.match == "regex":
            try:
                re.compile(self.expected)
            except re.error as error:
                raise ValueError(f"'expected' is no regular expression: {error}") from None
        if self.match == "numeric" and _number(self.expected) is None:
            raise ValueError("'expected' is no number")
        return self

    @field_validator("expected", mode="before")
    @classmethod
    def _number_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages to send."""
        if self.messages is None:
            return [{"role": "user", "content": self.prompt or ""}]
        return [message.model_dump() for message in self.messages]

    def correct(self, answer: str) -> bool:
        """Does ``answer`` match?"""
        return _MATCHERS[self.match](self.expected, answer)


class EvaluationSet(Frozen):
    """Checked items and the SHA-256 of the file they came from."""

    items: tuple[Item, ...]
    digest: str
    name: str


def load(path: Path | None) -> EvaluationSet:
    """Read an evaluation set, the packaged one without a path.

    Raises:
        UsageError: No such file, not UTF-8, no items, or bad lines, each named with its number and reason.
    """
    if path is None:
        raw, name = (resources.files("slmops.evaluation.data") / DEFAULT).read_bytes(), DEFAULT
    else:
        raw, name = read_bytes(path, "evaluation set"), path.name
    try:
        # Not splitlines(): that also splits at characters which a JSON string may hold, as U+2028.
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: {error}", "Save it as UTF-8.") from None
    items: list[Item] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = Item.model_validate(json.loads(line))
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: no JSON: {error.msg} at column {error.colno}")
        except ValidationError as error:
            what = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
            problems.append(f"line {number}: {what}")
        else:
            items.append(item if item.id else item.model_copy(update={"id": f"{number}"}))
    if problems:
        more = f"\n  - and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        listed = "\n  - ".join(problems[:SHOWN_PROBLEMS])
        raise UsageError(f"{name} has bad lines:\n  - {listed}{more}", "Mend or remove these lines.")
    if not items:
        raise UsageError(f"{name} has no items.", "One JSON object a line, with prompt and expected.")
    return EvaluationSet(items=tuple(items), digest=hashlib.sha256(raw).hexdigest(), name=name)


def perplexity_text(path: Path | None) -> tuple[str, str]:
    """The text for perplexity and its SHA-256; without a path Python's own language reference.

    That text comes with every interpreter and differs between Python versions, hence the digest beside each figure.
    """
    if path is None:
        from pydoc_data import topics

        text = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    else:
        try:
            text = read_bytes(path, "perplexity text").decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8: {error}", "Save it as UTF-8.") from None
        if not text.strip():
            raise UsageError(f"{path} is empty.", "Give a text of some thousand words.")
    return text, hashlib.sha256(text.encode()).hexdigest()


def read_bytes(path: Path, what: str) -> bytes:
    """Content of a user's file.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"The {what} {path} cannot be read: {error.strerror}.", "Check the path.") from None


def _number(text: str) -> float | None:
    """The last number of a text: an answer may repeat the numbers of its question first."""
    # A hyphen behind a letter or digit is no sign: GPT-4, 3-5.
    found = re.findall(r"(?:(?<!\w)-)?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return float(found[-1]) if found else None


def _numeric(expected: str, answer: str) -> bool:
    return _number(answer) == _number(expected)


_MATCHERS: dict[str, Callable[[str, str], bool]] = {
    "contains": lambda expected, answer: expected.casefold() in answer.casefold(),
    "exact": lambda expected, answer: expected.strip() == answer.strip(),
    "regex": lambda expected, answer: re.search(expected, answer) is not None,
    "numeric": _numeric,
}
