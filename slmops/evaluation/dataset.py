"""The evaluation set: one item in each line of JSONL or row of CSV, all checked before any work."""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from slmops.core.errors import UsageError
from slmops.core.validation import problems
from slmops.core.values import Frozen
from slmops.evaluation import matchers
from slmops.evaluation.matchers import parse_json

JUDGE_MISSING = "match 'judge' needs a judging model: set SLMOPS_JUDGE_URL and SLMOPS_JUDGE_MODEL"
GENERAL_SET = "general.jsonl"
SHOWN_PROBLEMS = 10
CSV_COLUMNS = (
    "prompt, expected, match, category, id, max_tokens, tolerance, threshold, format, messages, schema, tools, "
    "chat_template_kwargs"
)
_JSON_COLUMNS = ("messages", "schema", "format", "tools", "chat_template_kwargs")
_BELONGS = {"json_schema": ("json_schema",), "tolerance": ("numeric",), "threshold": ("rouge_l", "f1", "python")}


class ItemMessage(Frozen):
    role: Literal["system", "user", "assistant"]
    content: str


class ToolFunction(Frozen):
    name: str = Field(min_length=1)
    description: str = ""
    parameters: dict[str, Any] = Field({"type": "object", "properties": {}}, description="A JSON Schema.")


class Tool(Frozen):
    """What a model may call, in OpenAI's form."""

    type: Literal["function"] = "function"
    function: ToolFunction


class Call(Frozen):
    name: str
    arguments: dict[str, Any]


class Item(Frozen):
    """One question, the expected answer, and how to compare: see :mod:`slmops.evaluation.matchers`.

    ``match``: ``contains`` (case does not count), ``exact``, ``regex`` (anywhere), ``numeric`` (the last number, within
    ``tolerance``), ``json_schema`` (a document that ``schema`` allows and that equals ``expected``, if given),
    ``tool_call`` (calls ``expected``, or all of a list of calls, of its ``tools``),
    ``rouge_l`` and ``f1`` (words in common, right from ``threshold`` on), ``python`` (the user's function) or ``judge``
    (a judging model). ``format`` is the structure that any answer must have, right or wrong; a ``regex`` must match
    the whole answer, apart from outer blanks.
    """

    model_config = ConfigDict(populate_by_name=True)

    prompt: str | None = None
    messages: tuple[ItemMessage, ...] | None = None
    # Before `expected`, because that one's validator looks at it.
    match: Literal[
        "contains", "exact", "regex", "numeric", "json_schema", "tool_call", "rouge_l", "f1", "python", "judge"
    ] = "contains"
    expected: str = ""
    category: str = "general"
    id: str | None = None
    max_tokens: int = Field(24, ge=1, le=4096)
    tolerance: float | None = Field(None, ge=0, allow_inf_nan=False)
    threshold: float | None = Field(None, ge=0, le=1)
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    tools: tuple[Tool, ...] = ()
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Such as {'enable_thinking': False}.")
    format: Literal["json", "number", "one_line"] | dict[Literal["regex"], str] | None = None

    @field_validator("expected", mode="before")
    @classmethod
    def _as_text(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("match") in ("json_schema", "tool_call") and not isinstance(value, str):
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
        if isinstance(value, dict) and set(value) == {"regex"} and isinstance(value["regex"], str):
            _compiled(value["regex"], "'regex'")
        elif value not in (None, "json", "number", "one_line"):
            raise ValueError('must be "json", "number", "one_line" or {"regex": "..."}')
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either 'prompt' or 'messages'")
        if self.messages is not None and (not self.messages or self.messages[-1].role != "user"):
            raise ValueError("'messages' must end with a user message")
        for option, owners in _BELONGS.items():
            if getattr(self, option) is not None and self.match not in owners:
                name = "schema" if option == "json_schema" else option
                raise ValueError(f"'{name}' is only for match {' or '.join(owners)}, not '{self.match}'")
        if self.match not in ("python", "judge") and (problem := self._problem()):
            raise ValueError(problem)
        return self

    def _problem(self) -> str | None:
        """Why a matcher cannot use what the item gives it."""
        if self.match == "json_schema":
            return self._schema_problem()
        if self.match == "tool_call":
            return self._call_problem()
        if not (self.expected if self.match == "regex" else self.expected.strip()):
            return f"'expected' must not be empty for match '{self.match}'"  # an empty text is part of any answer
        if self.match == "regex":
            _compiled(self.expected, "'expected'")
        if self.match == "numeric" and not matchers.is_number(self.expected):
            return "'expected' is not a number such as -1234.5"
        if self.match == "rouge_l" and not re.search("[a-z0-9]", self.expected.lower()):
            return "'expected' has no words of a-z and 0-9, the only ones that ROUGE counts"
        if self.match == "f1" and not matchers.squad_words(self.expected):
            return "'expected' has only articles"
        return None

    def _schema_problem(self) -> str | None:
        if self.json_schema is None:
            return "match 'json_schema' needs a 'schema'"
        if problem := matchers.schema_problem(self.json_schema):
            return f"'schema' is not a JSON Schema: {problem}"
        if self.expected and not matchers.is_json(self.expected):
            return "'expected' is not JSON, which match 'json_schema' needs"
        # Any document shows a $ref to nothing at the top.
        probe = matchers.json_schema(self.json_schema, self.expected, self.expected or "{}")
        return probe.reason or ("'schema' does not allow 'expected'" if self.expected and not probe.correct else None)

    def _call_problem(self) -> str | None:
        try:
            expected = parse_json(self.expected)
            wanted = [Call.model_validate(one) for one in (expected if isinstance(expected, list) else [expected])]
        except ValueError:
            wanted = []
        if not wanted:
            return '\'expected\' is not a call such as {"name": ..., "arguments": {...}}, or a list of calls'
        unknown = {call.name for call in wanted} - {tool.function.name for tool in self.tools}
        return f"'expected' calls {', '.join(sorted(unknown))}, which is not among its 'tools'" if unknown else None

    @property
    def conversation(self) -> list[dict[str, str]]:
        if self.messages is None:
            return [{"role": "user", "content": self.prompt or ""}]
        return [message.model_dump() for message in self.messages]

    @property
    def request(self) -> dict[str, Any]:
        """What asks for an answer, in OpenAI's form."""
        asked = {
            "messages": self.conversation,
            "max_tokens": self.max_tokens,
            "tools": [tool.model_dump() for tool in self.tools],
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return {name: value for name, value in asked.items() if value}

    def format_valid(self, answer: str) -> bool | None:
        """Whether ``answer`` has the structure that ``format``, or else ``schema``, asks for; None: neither does."""
        match self.format:
            case {"regex": expression}:
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


def load(path: Path | None, *, matcher: str | None = None, judge: bool = False) -> EvaluationSet:
    """Read an evaluation set, JSONL or ``.csv``; without a path, the packaged one.

    Items with match ``python`` need the job's ``matcher``, those with match ``judge`` a configured judging model.
    UsageError: no such file, not UTF-8, no items, or bad lines, each with its number and reason.
    """
    if path is None:
        raw, name = (resources.files("slmops.evaluation.data") / GENERAL_SET).read_bytes(), GENERAL_SET
    else:
        raw, name = read_bytes(path, "evaluation set"), path.name
    text = _decoded(raw, name, "utf-8-sig")
    items: dict[int, Item] = {}
    bad: list[str] = []
    lines: dict[str, int] = {}
    # Not splitlines(), which also splits at characters that a JSON string may hold, such as U+2028.
    rows = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for number, row in _of_csv(text, name) if name.lower().endswith(".csv") else rows:
        try:
            item = _item(row, matcher=matcher, judge=judge)
            if item.id in lines:
                raise ValueError(f"line {lines[item.id]} already has the id '{item.id}'")
        except ValueError as error:
            said = "; ".join(problems(error)) if isinstance(error, ValidationError) else error
            bad.append(f"line {number}: {said}")
            continue
        items[number] = item
        if item.id:
            lines[item.id] = number
    if bad:
        more = [f"and {len(bad) - SHOWN_PROBLEMS} more"] if len(bad) > SHOWN_PROBLEMS else []
        listed = "".join(f"\n  - {problem}" for problem in [*bad[:SHOWN_PROBLEMS], *more])
        raise UsageError(f"{name} has bad lines:{listed}", "Fix or remove these lines.")
    if not items:
        fix = "Give each item a line of JSON, or a CSV row, with prompt and expected."
        raise UsageError(f"{name} has no items.", fix)
    for number, item in items.items():
        own = item.id or str(number)
        while not item.id and own in lines:
            own = f"line-{own}"
        items[number] = item.model_copy(update={"id": own})
    return EvaluationSet(items=tuple(items.values()), digest=hashlib.sha256(raw).hexdigest())


def subset(items: Sequence[Item], count: int) -> tuple[Item, ...]:
    """At most ``count`` items: the first of each category, then the second, and so on."""
    seen: Counter[str] = Counter()
    ranks = []
    for item in items:
        ranks.append(seen[item.category])
        seen[item.category] += 1
    return tuple(items[place] for place in sorted(range(len(items)), key=ranks.__getitem__)[: max(count, 0)])


def perplexity_text(path: Path | None, what: str = "perplexity text") -> tuple[str, str]:
    """The text and its SHA-256; without a path, the Python version's language reference. UsageError if it is bad."""
    if path is None:
        from pydoc_data import topics

        text = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    else:
        text = _decoded(read_bytes(path, what), str(path), "utf-8")
        if not text.strip():
            raise UsageError(f"{path} is empty.", "Give a text of a few thousand words.")
    return text, hashlib.sha256(text.encode()).hexdigest()


def read_bytes(path: Path, what: str) -> bytes:
    """The bytes of a user's file; UsageError if it cannot be read."""
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"The {what} {path} cannot be read: {error.strerror}.", "Check the path.") from None


def _decoded(raw: bytes, name: str, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: {error}", "Save it as UTF-8.") from None


def _of_csv(text: str, name: str) -> Iterator[tuple[int, dict[str, str] | ValueError]]:
    """Number of the first line of each row and its filled cells, or the error of a bad row."""
    # Strict, or a quote that is never closed would make the rest of the file one cell.
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    fix = f"Name columns in the first line, separated by commas: {CSV_COLUMNS}."
    number = 1
    try:
        for cells in rows:
            if any(cells) and not header:
                header = [cell.strip() for cell in cells]
                for column in header:
                    if column not in CSV_COLUMNS.split(", "):
                        raise UsageError(f"{name} has an unknown column '{column}'.", fix)
                    if header.count(column) > 1:
                        raise UsageError(f"{name} has the column '{column}' twice.", fix)
            elif any(cells) and len(cells) != len(header):
                yield number, ValueError(f"has {len(cells)} cells, but the header has {len(header)}")
            elif any(cells):
                yield number, {column: cell for column, cell in zip(header, cells, strict=True) if cell}
            number = rows.line_num + 1
    except csv.Error as error:
        # Nobody can tell where the next row begins.
        yield number, ValueError(f"is not CSV from here on: {error}")


def _item(row: str | dict[str, str] | ValueError, *, matcher: str | None, judge: bool) -> Item:
    """The item of a JSON line or of the cells of a CSV row; ValueError with what is wrong with it."""
    if isinstance(row, ValueError):
        raise row
    item = Item.model_validate(_parsed(row) if isinstance(row, str) else _typed(row))
    if item.match == "python" and matcher is None:
        raise ValueError("match 'python' needs --matcher FILE.py:FUNCTION")
    if item.match == "judge" and not judge:
        raise ValueError(JUDGE_MISSING)
    return item


def _typed(cells: dict[str, str]) -> dict[str, Any]:
    """The object that a JSON line would hold."""
    row: dict[str, Any] = dict(cells)
    for column in _JSON_COLUMNS:
        if column in cells and (column != "format" or cells[column].lstrip().startswith("{")):
            try:
                row[column] = _parsed(cells[column])
            except ValueError as error:
                raise ValueError(f"{column} {error}") from None
    return row


def _parsed(text: str) -> Any:
    try:
        value = parse_json(text)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"is not text: {error.object[error.start]!r} is half a character") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None


def _compiled(expression: str, what: str) -> None:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{what} is not a regular expression: {error}") from None
