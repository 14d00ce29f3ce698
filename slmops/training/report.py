"""What the checks of the training data found, written for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from tabulate import tabulate

from slmops.training.values import TrainingData

DIGEST_CHARACTERS = 16


def markdown(data: TrainingData) -> str:
    """Files, items, the split, tokens and problems as Markdown. Markup in the data is escaped."""
    report = data.report
    validation = _validation_items(data)
    facts = [
        ["source", data.source],
        ["training items", str(report.items - validation)],
        ["validation items", str(validation)],
        ["evaluation items", str(report.evaluation_items)],
        ["exact duplicates, dropped", str(report.dropped)],
        ["SHA-256 of the items", data.digest[:DIGEST_CHARACTERS]],
        ["SHA-256 of the evaluation set", data.evaluation_digest[:DIGEST_CHARACTERS]],
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
    """The same in one line."""
    report = data.report
    validation = _validation_items(data)
    said = (
        f"{report.items - validation} items to train and {validation} to validate with, {report.evaluation_items} to "
        f"evaluate; {report.tokens['p50']:.0f} tokens each, {report.tokens['max']:.0f} at most"
    )
    return f"{said}; {report.dropped} duplicates dropped" if report.dropped else said


def _validation_items(data: TrainingData) -> int:
    with data.validation.open("rb") as lines:
        return sum(1 for _ in lines)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[_escaped(cell) for cell in row] for row in rows]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def _escaped(text: str) -> str:
    """Markdown that shows exactly this text."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escape(text, quote=False))
