"""Read the lines of training files as conversations. What is wrong with a line becomes a problem of that line."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slmops.training.values import DataProblem, ProblemKind

LONGEST_LINE = 1_000_000  # bytes; a longer line is not read to its end
MOST_PROBLEMS = 10_000  # reading stops after this many bad lines
SHOWN_CHARACTERS = 80  # how much of an item a message shows

ROLES = ("system", "user", "assistant")
_KEYS = ("messages", "prompt", "completion", "id")
# Unescaped, they would end a line for readers that split lines the way str.splitlines() does.
_LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


@dataclass(frozen=True)
class Example:
    """A conversation to learn from, and the name of its file and its line there, from 1."""

    file: str
    line: int
    messages: tuple[dict[str, str], ...]  # each with role and content; the last one is the assistant's

    @cached_property
    def json(self) -> str:
        """The normal form on one line: the same for every way to write the same conversation."""
        return json.dumps({"messages": self.messages}, ensure_ascii=False).translate(_LINE_ENDS)

    @property
    def place(self) -> str:
        return f"{shown(self.file)}:{self.line}"

    def problem(self, kind: ProblemKind, detail: str) -> DataProblem:
        return DataProblem(file=self.file, line=self.line, kind=kind, detail=detail)


@dataclass(frozen=True)
class ExamplesRead:
    """What training files hold: their good lines in order, the bad ones, and the number of good ones per file."""

    examples: list[Example]
    problems: list[DataProblem]
    files: dict[str, int]


class _BadLine(Exception):
    def __init__(self, kind: ProblemKind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def read(files: Sequence[Path]) -> ExamplesRead:
    """Read training files, and never more of a line than :data:`LONGEST_LINE`."""
    found = ExamplesRead([], [], {})
    for file in files:
        found.files[file.name] = 0
        for number, raw in _lines(file):
            try:
                found.examples.append(Example(file.name, number, _conversation(raw)))
                found.files[file.name] += 1
            except _BadLine as error:
                found.problems.append(DataProblem(file=file.name, line=number, kind=error.kind, detail=str(error)))
            if len(found.problems) == MOST_PROBLEMS:
                end = "nothing was read from here on"
                found.problems.append(DataProblem(file=file.name, line=number + 1, kind="schema", detail=end))
                return found
    return found


def shown(text: str) -> str:
    """The beginning of a user's text on one line, with control characters escaped."""
    cut = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line that is not blank. A line that is too long comes last, cut off."""
    with file.open("rb") as stream:
        for number, raw in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), 1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if line.strip() or len(raw) > LONGEST_LINE:
                yield number, line
            if len(raw) > LONGEST_LINE:
                return


def _conversation(raw: bytes) -> tuple[dict[str, str], ...]:
    if len(raw) > LONGEST_LINE:
        raise _BadLine("oversized", f"longer than {LONGEST_LINE:,} bytes; the file was not read from here on")
    value = _value(raw)
    if not isinstance(value, dict):
        raise _BadLine("schema", "not a JSON object")
    name = f" (id {shown(value['id'])})" if isinstance(value.get("id"), str) else ""
    try:
        messages = _messages(value)
        _check_turns(messages)
    except _BadLine as error:
        raise _BadLine(error.kind, f"{error}{name}") from None
    return messages


def _value(raw: bytes) -> Any:
    try:
        return json.loads(raw.rstrip().decode("utf-8"), object_pairs_hook=_each_key_once, parse_constant=_not_json)
    except UnicodeDecodeError as error:
        raise _BadLine("schema", f"not UTF-8: byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise _BadLine("schema", f"not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # a number with too many digits
        raise _BadLine("schema", f"not JSON: {error}") from None
    except RecursionError:
        raise _BadLine("schema", "nested too deeply") from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _BadLine("schema", f"the key '{shown(twice)}' occurs twice")
    return found


def _not_json(name: str) -> Any:
    raise _BadLine("schema", f"not JSON: {name}")


def _messages(value: dict[str, Any]) -> tuple[dict[str, str], ...]:
    """The turns of a line, in any of the formats."""
    _check_keys(value, _KEYS, "")
    given = {key: value[key] for key in ("messages", "prompt", "completion") if value.get(key) is not None}
    if set(given) == {"messages"}:
        return _turns(given["messages"], "messages")
    if set(given) == {"prompt", "completion"}:
        return _turns(given["prompt"], "prompt", "user") + _turns(given["completion"], "completion", "assistant")
    if "messages" in given:
        raise _BadLine("schema", "has both 'messages' and 'prompt' or 'completion'")
    raise _BadLine("schema", "needs either 'messages', or 'prompt' and 'completion'")


def _turns(value: Any, where: str, role: str = "") -> tuple[dict[str, str], ...]:
    """The turns of a list of messages, or the single turn of a text that ``role`` says."""
    if role and isinstance(value, str):
        _check_text(value, where)
        return ({"role": role, "content": value},)
    if not isinstance(value, list) or not value:
        raise _BadLine("schema", f"'{where}' is not a {'text or a ' if role else ''}list of messages")
    for number, turn in enumerate(value):
        name = f"{where}[{number}]"
        if not isinstance(turn, dict):
            raise _BadLine("schema", f"{name} is not an object")
        _check_keys(turn, ("role", "content"), f" of {name}")
        for key in ("role", "content"):
            if not isinstance(turn.get(key), str):
                raise _BadLine("schema", f"{name}.{key} is {'not a text' if key in turn else 'missing'}")
        if turn["role"] not in ROLES:
            raise _BadLine("schema", f"{name}.role is '{shown(turn['role'])}', not one of {', '.join(ROLES)}")
        _check_text(turn["content"], f"{name}.content")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in value)


def _check_keys(value: dict[str, Any], known: Iterable[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise _BadLine("schema", f"the key '{shown(key)}'{where} is unknown; known are {', '.join(known)}")


def _check_text(text: str, where: str) -> None:
    if "\0" in text:
        raise _BadLine("schema", f"{where} holds the character NUL")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadLine("schema", f"{where} holds {text[error.start]!r}, half a character") from None


def _check_turns(messages: tuple[dict[str, str], ...]) -> None:
    first = 1 if messages[0]["role"] == "system" else 0
    for number, message in enumerate(messages[first:], first):
        expected = ROLES[1 + (number - first) % 2]
        if message["role"] != expected:
            detail = f"message {number + 1} is from the {message['role']}, and should be from the {expected}"
            raise _BadLine("roles", detail)
    if messages[-1]["role"] != "assistant":
        raise _BadLine("roles", f"ends with the {messages[-1]['role']}, not with an answer")
    for number, message in enumerate(messages):
        if not message["content"].strip():
            raise _BadLine("empty", f"message {number + 1}, from the {message['role']}, is empty")
