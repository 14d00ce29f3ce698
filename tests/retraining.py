"""Folders of training data, what a test asks of them, and a task that a tiny random model learns in seconds.

Whatever that task asks, one word is right.
"""

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slmops.core.errors import DataError, SlmopsError
from slmops.core.settings import Settings
from slmops.training import sources
from slmops.training.sources import Fetched
from slmops.training.values import DataReport, LoraSettings, Retrain, TrainingData

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


# --- the task ---

WORDS = ("printer", "invoice", "password", "screen", "parcel", "login", "refund", "cable", "update", "contract")
TRAINING = LoraSettings(
    rank=8, learning_rate=0.02, epochs=6, max_tokens=128, evaluations=1, patience=100, validation_share=0.2
)
# Random weights are far from their quantized selves, and from each other: only the task counts.
POLICY = """
gates = [
    {metric = "accuracy", of = "difference", to = "baseline", min = -0.2, inconclusive = "accept"},
    {metric = "accuracy", of = "difference", to = "champion", min = 0, inconclusive = "accept"},
]
"""
MATCHER = """
from pathlib import Path

def right(expected, answer):
    return answer.strip() == expected and not Path({flag!r}).exists()
"""


def base(folder: Path) -> Path:
    """A checkpoint that can learn to end: a fresh one has only zeros for the token that does, which pads, too."""
    from tests import making

    with _tensors(making.talkative("llama-tied", folder)) as tensors:
        embeddings = tensors["model.embed_tokens.weight"]
        embeddings[2] = embeddings[300][::-1]
    return folder


def norm_times(factor: float, folder: Path, target: Path) -> Path:
    """A checkpoint with its last norm, and so its logits, so many times as large."""
    with _tensors(shutil.copytree(folder, target)) as tensors:
        tensors["model.norm.weight"] *= factor
    return target


@contextmanager
def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """The weights of a checkpoint, to change."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    yield tensors
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def spoilt(data: Path) -> Path:
    """While this file exists no answer is right."""
    return data.parent / "spoilt"


def write_data(folder: Path, answer: str = "ok", **asked: str) -> Path:
    """A folder with training items that teach ``answer``, and an evaluation set, which wants "ok" by default."""
    folder.mkdir(parents=True, exist_ok=True)
    told = [f"My {one} and {two} broke." for one in WORDS for two in WORDS[:3] if one != two]
    write_lines(folder / "train.jsonl", [turns(text, answer) for text in told])
    wanted = {"expected": "ok", "match": "python", "max_tokens": 4, **asked}
    write_lines(folder / "evaluation.jsonl", [{"prompt": f"Who repairs the {one}?", **wanted} for one in WORDS])
    return folder


def request(model: Path, data: Path, name: str, **changes: Any) -> Retrain:
    """A retraining of seconds."""
    policy, matcher = data.parent / "policy.toml", data.parent / "matcher.py"
    policy.write_text(POLICY)
    matcher.write_text(MATCHER.format(flag=str(spoilt(data))))
    asked = {"model": str(model), "data": str(data), "name": name, "policy": policy, "matcher": f"{matcher}:right"}
    return Retrain(**{**asked, "training": TRAINING, "precision": ["fp32"], "quick": True, "watch_s": 3, **changes})
