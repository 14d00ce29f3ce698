"""What the checks of the training data found, for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from tabulate import tabulate

from slmops.training.values import TrainingData

DIGEST_SHOWN = 16


def markdown(data: TrainingData) -> str:
    """Files, items, the split, tokens and problems as Markdown; nothing in it is markup but ours."""
    report = data.report
    validation = _lines(data)
    facts = [
        ["source", data.source],
        ["training items", str(report.items - validation)],
        ["validation items", str(validation)],
        ["evaluation items", str(report.evaluation_items)],
        ["exact duplicates, dropped", str(report.dropped)],
        ["SHA-256 of the items", data.digest[:DIGEST_SHOWN]],
        ["SHA-256 of the evaluation set", data.evaluation_digest[:DIGEST_SHOWN]],
    ]
    parts = [
        "# Training data",
        _table(["", ""], facts),
        "## Files",
        _table(["file", "items"], [[name, str(count)] for name, count in report.files.items()]),
        "## Tokens per item",
        _table(list(report.tokens), [[f"{value:.0f}" for value in report.tokens.values()]]),
        "## Worth a look",
    ]
    rows = [[f"{one.file}:{one.line}", one.kind.replace("_", " "), one.detail] for one in report.problems]
    parts.append(_table(["line", "kind", "what"], rows) if rows else "Nothing.")
    return "\n\n".join(parts) + "\n"


def summary(data: TrainingData) -> str:
    """The same in a line."""
    report = data.report
    validation = _lines(data)
    said = (
        f"{report.items - validation} items to train and {validation} to validate with, {report.evaluation_items} to "
        f"evaluate; {report.tokens['p50']:.0f} tokens each, {report.tokens['max']:.0f} at most"
    )
    return f"{said}; {report.dropped} duplicates dropped" if report.dropped else said


def _lines(data: TrainingData) -> int:
    """Items of the validation."""
    with data.validation.open("rb") as lines:
        return sum(1 for _ in lines)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[_text(cell) for cell in row] for row in rows]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def _text(text: str) -> str:
    """Text as Markdown that shows just it."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escape(text, quote=False))
