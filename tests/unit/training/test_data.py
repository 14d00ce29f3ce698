"""What people are told of the data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from slmops.training import data
from slmops.training.values import DataProblem, TrainingData
from tests.training_data import checked, write_lines


def prepared(folder: Path, **found: Any) -> TrainingData:
    write_lines(folder / "validation.jsonl", "ab")
    return checked(folder, **found)


def test_summary_and_markdown(tmp_path: Path) -> None:
    said = "8 items to train and 2 to validate with, 5 to evaluate; 30 tokens each, 60 at most"
    assert data.summary(prepared(tmp_path)) == f"{said}; 2 duplicates dropped"
    assert data.summary(prepared(tmp_path, dropped=0)) == said
    text = data.markdown(prepared(tmp_path))
    rows = {re.sub(" +", " ", line.strip("| ")) for line in text.splitlines() if line.startswith("|")}
    assert {
        *("source | tickets", "training items | 8", "validation items | 2", "evaluation items | 5"),
        *("exact duplicates, dropped | 2", "train.jsonl | 12"),
        *(f"SHA-256 of the items | {'d' * 16}", f"SHA-256 of the evaluation set | {'e' * 16}"),
        *("min | p50 | p90 | p99 | max | total", "20 | 30 | 40 | 50 | 60 | 300"),
    } <= rows
    assert text.endswith("## Worth a look\n\nNothing.\n")


def test_what_items_say_is_no_markup(tmp_path: Path) -> None:
    detail = "<script>alert(1)</script> [x](javascript:y) `a` | b *c* _d_ \\ &amp;"
    problem = DataProblem(file="a|b.jsonl", line=3, kind="near_duplicate", fatal=False, detail=detail)
    text = data.markdown(prepared(tmp_path, problems=(problem,)))
    [line] = [line for line in text.splitlines() if "alert" in line]
    assert line.startswith("| a\\|b.jsonl:3 | near duplicate | &lt;script&gt;alert(1)&lt;/script&gt; ")
    assert "\\[x\\](javascript:y) \\`a\\` \\| b \\*c\\* \\_d\\_ \\\\ &amp;amp; |" in line
