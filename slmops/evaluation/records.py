"""The lines of an evaluation set as plain objects, from JSONL or CSV, before they are checked."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from slmops.core.errors import UsageError
from slmops.evaluation.matchers import parse_json

CSV_COLUMNS = (
    *("prompt", "expected", "match", "category", "id", "max_tokens", "tolerance", "threshold", "format"),
    *("messages", "schema"),
)
"""The last two hold JSON."""


def of_jsonl(text: str) -> Iterator[tuple[int, Any]]:
    """Number of each line and its object, or the error of a bad line."""
    # Not splitlines(), which also splits at characters that a JSON string may hold, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parsed(line)


def of_csv(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """Number of the first line of each row and its filled cells, or the error of a bad row.

    Raises:
        UsageError: The header is bad.
    """
    # Strict, or a quote that is never closed would make the rest of the file one cell.
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        number = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            # Nobody can tell where the next row begins.
            yield number, ValueError(f"is not CSV from here on: {error}")
            return
        if not any(cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            _check_header(header, name)
        elif len(cells) != len(header):
            yield number, ValueError(f"has {len(cells)} cells, but the header has {len(header)}")
        else:
            yield number, _typed({column: cell for column, cell in zip(header, cells, strict=True) if cell})


def _check_header(header: list[str], name: str) -> None:
    fix = f"Name columns in the first line, separated by commas: {', '.join(CSV_COLUMNS)}."
    for column in header:
        if column not in CSV_COLUMNS:
            raise UsageError(f"{name} has an unknown column '{column}'.", fix)
    if twice := [column for column, count in Counter(header).items() if count > 1]:
        raise UsageError(f"{name} has the column '{twice[0]}' twice.", fix)


def _typed(cells: dict[str, str]) -> Any:
    """The object that a JSON line would hold, or the error."""
    row: dict[str, Any] = dict(cells)
    for column in ("messages", "schema", "format"):
        if column in cells and (column != "format" or cells[column].lstrip().startswith("{")):
            row[column] = _parsed(cells[column])
            if isinstance(row[column], ValueError):
                return ValueError(f"{column} {row[column]}")
    return row


def _parsed(text: str) -> Any:
    """The JSON value, or the error."""
    try:
        value = parse_json(text)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        return ValueError(f"is not JSON: {error.msg} at column {error.colno}")
    except UnicodeEncodeError as error:
        return ValueError(f"is not text: {error.object[error.start]!r} is half a character")
    except ValueError as error:
        return ValueError(f"is not JSON: {error}")
