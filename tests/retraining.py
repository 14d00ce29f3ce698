"""A task that a tiny random model learns in seconds: whatever is asked, one word is right."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slmops.training.values import LoraSettings, Retrain
from tests.training_data import turns, write_lines

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
