"""The evaluation set: JSONL, one item a line, or CSV, one item a row; checked line by line before any work."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from slmops.core.errors import UsageError
from slmops.core.validation import problems
from slmops.core.values import Frozen
from slmops.evaluation import matchers, records

JUDGE_MISSING = "match 'judge' needs a judging model: set SLMOPS_JUDGE_URL and SLMOPS_JUDGE_MODEL"
GENERAL_SET = "general.jsonl"
SHOWN_PROBLEMS = 10
FORMATS = ("json", "number", "one_line")
_BELONGS = {"json_schema": ("json_schema",), "tolerance": ("numeric",), "threshold": ("rouge_l", "f1", "python")}


class ItemMessage(Frozen):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Pattern(Frozen):
    """A format of the user's own: a regular expression that the whole answer must match, outer blanks aside."""

    regex: str


class Item(Frozen):
    """One question, the expected answer, and how to compare.

    ``match``: ``contains`` (default; case does not count), ``exact`` (but for outer blanks), ``regex`` (found
    anywhere), ``numeric`` (the last number of the answer, within ``tolerance``), ``json_schema`` (a JSON document that
    ``schema`` allows and that equals ``expected``, where given), ``rouge_l`` and ``f1`` (words in common, right from
    ``threshold`` on), ``python`` (the user's function) or ``judge`` (a judging model). See
    :mod:`slmops.evaluation.matchers`.

    ``format`` is the structure that the answer must have, right or wrong: ``json`` (the whole answer is one JSON
    document), ``number`` (it is one number), ``one_line``, or ``{"regex": ...}``.
    """

    model_config = ConfigDict(populate_by_name=True)

    prompt: str | None = None
    messages: tuple[ItemMessage, ...] | None = None
    # Above `expected`, whose validator looks at it.
    match: Literal["contains", "exact", "regex", "numeric", "json_schema", "rouge_l", "f1", "python", "judge"] = (
        "contains"
    )
    expected: str = ""
    category: str = "general"
    id: str | None = None
    max_tokens: int = Field(24, ge=1, le=4096)
    tolerance: float | None = Field(None, ge=0, allow_inf_nan=False)
    threshold: float | None = Field(None, ge=0, le=1)
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    format: Literal["json", "number", "one_line"] | Pattern | None = None

    @field_validator("expected", mode="before")
    @classmethod
    def _as_text(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("match") == "json_schema" and not isinstance(value, str):
            return json.dumps(value)
        if isinstance(value, float):
            return format(Decimal(repr(value)), "f")  # str() would write 1e-07
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("category")
    @classmethod
    def _part_of_a_metric_name(cls, value: str) -> str:
        if not re.fullmatch(r"[\w -]{1,50}", value.strip()):
            raise ValueError("must be 1 to 50 letters, digits, blanks, hyphens and underscores")
        return value.strip()

    @field_validator("format", mode="before")
    @classmethod
    def _known_format(cls, value: Any) -> Any:
        if value is None or isinstance(value, Pattern) or value in FORMATS:
            return value
        if isinstance(value, dict) and set(value) == {"regex"} and isinstance(value["regex"], str):
            _compiled(value["regex"], "'regex'")
            return Pattern(regex=value["regex"])
        raise ValueError('must be "json", "number", "one_line" or {"regex": "..."}')

    @model_validator(mode="after")
    def _one_question(self) -> Item:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either 'prompt' or 'messages'")
        if self.messages is not None and (not self.messages or self.messages[-1].role != "user"):
            raise ValueError("'messages' must end with a user message")
        return self

    @model_validator(mode="after")
    def _options_of_its_matcher(self) -> Item:
        for option, owners in _BELONGS.items():
            if getattr(self, option) is not None and self.match not in owners:
                name = "schema" if option == "json_schema" else option
                raise ValueError(f"'{name}' means nothing to match '{self.match}', only to {' and '.join(owners)}")
        return self

    @model_validator(mode="after")
    def _something_to_match(self) -> Item:
        if self.match in ("python", "judge"):
            return self
        if self.match == "json_schema":
            self._check_schema()
        elif not (self.expected if self.match == "regex" else self.expected.strip()):
            # An empty text is in each answer.
            raise ValueError(f"expected Field required, and not empty, by match '{self.match}'")
        elif self.match == "regex":
            _compiled(self.expected, "'expected'")
        elif self.match == "numeric" and not matchers.is_number(self.expected):
            raise ValueError("'expected' is no number, as -1234.5")
        elif self.match == "rouge_l" and not re.search("[a-z0-9]", self.expected.lower()):
            raise ValueError("'expected' has no words of a-z and 0-9, which are all that ROUGE counts")
        elif self.match == "f1" and not matchers.squad_words(self.expected):
            raise ValueError("'expected' has no words but articles")
        return self

    def _check_schema(self) -> None:
        if self.json_schema is None:
            raise ValueError("'schema' is needed by match 'json_schema'")
        if problem := matchers.schema_problem(self.json_schema):
            raise ValueError(f"'schema' is no JSON Schema: {problem}")
        if self.expected and not matchers.is_json(self.expected):
            raise ValueError("'expected' is no JSON, as match 'json_schema' needs it")
        # Any document shows a $ref to nothing at the top.
        probe = matchers.json_schema(self.json_schema, self.expected, self.expected or "{}")
        if probe.reason:
            raise ValueError(probe.reason)
        if self.expected and not probe.correct:
            raise ValueError("'expected' is not what 'schema' allows")

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages to send."""
        if self.messages is None:
            return [{"role": "user", "content": self.prompt or ""}]
        return [message.model_dump() for message in self.messages]

    def format_valid(self, answer: str) -> bool | None:
        """Has ``answer`` the structure that the item asks for? None: none is asked for.

        A ``schema`` without a ``format`` asks for a document that it allows, in a code fence or not.
        """
        match self.format:
            case Pattern(regex=expression):
                return matchers.full_regex(expression, answer)
            case "json":
                return matchers.is_json(answer)
            case "number":
                return matchers.is_number(answer)
            case "one_line":
                return len(answer.strip().splitlines()) == 1
        if self.json_schema is None:
            return None
        return matchers.json_schema(self.json_schema, "", answer).correct


class EvaluationSet(Frozen):
    """Checked items and the SHA-256 of the file they came from."""

    items: tuple[Item, ...]
    digest: str
    name: str


def load(path: Path | None, *, matcher: str | None = None, judge: bool = False) -> EvaluationSet:
    """Read an evaluation set, the packaged one without a path.

    Args:
        path: JSONL, or CSV if it ends in ``.csv``.
        matcher: The job's FILE.py:FUNCTION, without which items with match ``python`` are errors.
        judge: A judging model is configured; without one, items with match ``judge`` are errors.

    Raises:
        UsageError: No such file, not UTF-8, no items, or bad lines, each named with its number and reason.
    """
    if path is None:
        raw, name = (resources.files("slmops.evaluation.data") / GENERAL_SET).read_bytes(), GENERAL_SET
    else:
        raw, name = read_bytes(path, "evaluation set"), path.name
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: {error}", "Save it as UTF-8.") from None
    items: dict[int, Item] = {}
    problems: list[str] = []
    lines: dict[str, int] = {}
    for number, found in records.of_csv(text, name) if name.lower().endswith(".csv") else records.of_jsonl(text):
        item = _item(found, matcher=matcher, judge=judge)
        if isinstance(item, str):
            problems.append(f"line {number}: {item}")
        elif item.id and item.id in lines:
            problems.append(f"line {number}: id '{item.id}' is that of line {lines[item.id]} already")
        else:
            items[number] = item
            if item.id:
                lines[item.id] = number
    if problems:
        more = f"\n  - and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        listed = "\n  - ".join(problems[:SHOWN_PROBLEMS])
        raise UsageError(f"{name} has bad lines:\n  - {listed}{more}", "Mend or remove these lines.")
    if not items:
        raise UsageError(f"{name} has no items.", "One JSON object a line, or a CSV row, with prompt and expected.")
    named = tuple(
        item if item.id else item.model_copy(update={"id": _unused(str(number), lines)})
        for number, item in items.items()
    )
    return EvaluationSet(items=named, digest=hashlib.sha256(raw).hexdigest(), name=name)


def subset(items: Sequence[Item], count: int) -> tuple[Item, ...]:
    """At most ``count`` items in the order of the file, spread evenly over the categories: always the same ones.

    The first of each category, then the second of each, and so on.
    """
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, int]] = []
    for position, item in enumerate(items):
        ranked.append((seen[item.category], position))
        seen[item.category] += 1
    return tuple(items[position] for position in sorted(position for _, position in sorted(ranked)[: max(count, 0)]))


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


def _item(found: Any, *, matcher: str | None, judge: bool) -> Item | str:
    """The item, or what is wrong with it."""
    if isinstance(found, ValueError):
        return str(found)
    try:
        item = Item.model_validate(found)
    except ValidationError as error:
        return "; ".join(problems(error))
    if item.match == "python" and matcher is None:
        return "match 'python' needs --matcher FILE.py:FUNCTION"
    if item.match == "judge" and not judge:
        return JUDGE_MISSING
    return item


def _unused(name: str, taken: dict[str, int]) -> str:
    """The number of its line for an item without an id; with a prefix if that is the id of another."""
    while name in taken:
        name = f"line-{name}"
    return name


def _compiled(expression: str, what: str) -> None:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{what} is no regular expression: {error}") from None
