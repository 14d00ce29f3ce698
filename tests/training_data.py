"""Folders of training data, and what a test asks of them."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from slmops.core.errors import DataError, SlmopsError
from slmops.core.settings import Settings
from slmops.training import sources
from slmops.training.sources import Fetched
from slmops.training.values import DataReport, Retrain, TrainingData

HELD_OUT = '{"prompt": "Is it held out?", "expected": "yes"}\n'


def nothing(*_: Any) -> Any:
    raise AssertionError("nothing should be asked of MLflow")


def fetch(source: str | Path, settings: Settings, evaluation: Path | None = None, **given: Any) -> Fetched:
    request = Retrain(model="tiny", data=str(source), evaluation_set=evaluation)
    return sources.fetch(request, settings, **{"download": nothing, "dataset": nothing, **given})


def refused(
    source: str | Path, settings: Settings, *said: str, error: type[SlmopsError] = DataError, **given: Any
) -> SlmopsError:
    """The error that is raised instead of fetching the source; its message holds all that is ``said``."""
    with pytest.raises(SlmopsError) as caught:
        fetch(source, settings, **given)
    assert type(caught.value) is error
    assert all(one in caught.value.message for one in said)
    assert caught.value.fix
    return caught.value


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def put(folder: Path, evaluation: str = HELD_OUT, **files: list[Any]) -> Path:
    """A folder of training files and an evaluation set."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.jsonl").write_text(evaluation)
    for name, items in files.items():
        write_lines(folder / f"{name}.jsonl", items)
    return folder


def pair(question: str, answer: str = "Fine.") -> dict[str, str]:
    return {"prompt": question, "completion": answer}


def conversation(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    roles = itertools.cycle(("user", "assistant"))
    said = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return said if system is None else [{"role": "system", "content": system}, *said]


def turns(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": conversation(question, answer)}


def write_lines(file: Path, items: Iterable[Any]) -> Path:
    file.write_text("".join(f"{json.dumps(item)}\n" for item in items), encoding="utf-8")
    return file


def checked(folder: Path, **found: Any) -> TrainingData:
    """Checked data whose files are in ``folder``, there or not, and what the checks found."""
    tokens = {"min": 20, "p50": 30, "p90": 40, "p99": 50, "max": 60, "total": 300}
    counts: dict[str, Any] = {"items": 10, "evaluation_items": 5, "dropped": 2, "problems": (), "tokens": tokens}
    report = DataReport(**{"files": {"train.jsonl": 12}, **counts, **found})
    files: dict[str, Any] = {name: folder / f"{name}.jsonl" for name in ("train", "validation", "evaluation")}
    return TrainingData(source="tickets", digest="d" * 64, evaluation_digest="e" * 64, report=report, **files)
