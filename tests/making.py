"""What a test needs from the stages before the one that it tests."""

import contextlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import psutil
import pytest
from filelock import FileLock

from slmops.checkpoints import source
from slmops.conversion import recipes
from slmops.conversion.convert import convert
from slmops.core import machine
from slmops.core.errors import SlmopsError
from slmops.core.job import Job, JobContext
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Recipe, Variant
from slmops.processes import children
from tests import tiny

T = TypeVar("T")
EVALUATION_SET = """\
{"prompt": "Say anything.", "expected": ".*", "match": "regex", "max_tokens": 8}
{"prompt": "What is the capital of France?", "expected": "no model says this", "category": "capitals", "max_tokens": 8}
{"id": "third", "messages": [{"role": "user", "content": "Count"}], "expected": ".*", "match": "regex", "max_tokens": 8}
"""
"""Three items: random weights answer the first and the third right (anything will do) and the second wrong."""


def _units(metrics: dict[str, str]) -> dict[str, str]:
    return {name: unit for unit, names in metrics.items() for name in names.split()}


UNITS = _units(
    {
        "MB": "size_mb convert_memory_peak_mb memory_before_mb memory_loaded_mb memory_peak_mb memory_unloaded_mb",
        "bits": "bits_per_weight",
        "s": "load_s convert_s response_s_p50 response_s_p90 response_s_p99",
        "ms": "ttft_ms_p50 ttft_ms_p90 ttft_ms_p99 ttft_model_ms_p50 itl_ms_p50 itl_ms_p90 itl_ms_p99",
        "tokens/s": "decode_tok_s prefill_tok_s",
        "% of one core": "cpu_percent",
        "% of all cores": "cpu_percent_total",
        "%": "noise_percent",
        "J/token": "" if machine.energy_j() is None else "energy_j_per_token",
        "items": "unscored",
        "texts": "tokenizer_mismatches",
        "conversations": "template_mismatches",
        "1": "size_source_ratio decode_consistency truncated_rate stop_rate "
        "perplexity accuracy accuracy.general accuracy.capitals score",
    }
)
"""Every metric that one variant of a quick job has after those items, whatever the others are."""

RELATIVE_UNITS = _units(
    {
        "1": "size_ratio perplexity_ratio top1_agreement accuracy_drop score_drop mcnemar_p length_ratio",
        "nats": "kl_mean kl_median kl_p99 kl_max",
        "items": "flips",
    }
)
"""And those relative to the baseline."""


def talkative(kind: str, folder: Path) -> Path:
    """A tiny checkpoint that says nothing but ASCII, and on and on.

    Random weights may pick half a character for ever, which is no text and cannot be timed, or end at once.
    """
    from safetensors.numpy import load_file, save_file

    weights = tiny.make(kind, folder) / "model.safetensors"
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    mute = [number for token, number in vocabulary.items() if not token.isascii() or token.startswith("<|")]
    tensors = load_file(weights)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name].copy()
            tensors[name][mute] *= 1e-3
    save_file(tensors, weights, {"format": "pt"})
    return folder


def job(model: Path, **asked: Any) -> Job:
    return Job(model=str(model), quick=True, **asked)


def resolve(asked: Job, settings: Settings) -> Checkpoint:
    """The checked checkpoint of a job; nothing is downloaded."""
    return source.resolve(asked, settings, download=no_download)


def recipe(name: str, asked: Job, checkpoint: Checkpoint) -> Recipe:
    """One of the job's recipes, which come with slmops."""
    [found] = [recipe for recipe in recipes.for_job(asked, checkpoint, Settings()) if recipe.name == name]
    return found


def variant(name: str, asked: Job, settings: Settings, model: str = "tiny") -> Variant:
    """A converted variant, for real; made once where several tests, or test processes, ask for it in one home."""
    settings.home.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.home / "making.lock"), pytest.MonkeyPatch.context() as patch:
        work_in_process(patch)
        checkpoint = resolve(asked, settings)
        return convert(recipe(name, asked, checkpoint), JobContext(asked, model, checkpoint, settings))


def place(names: Iterable[str], asked: Job, stock: Settings, home: Path) -> None:
    """Put links to converted variants into a home, as if a job had made them there."""
    for name in names:
        made = variant(name, asked, stock)
        shutil.copytree(made.path, home / "variants" / made.key, copy_function=os.link)


IN_PROCESS = (
    *(f"slmops.checkpoints.{which}_worker" for which in ("merge", "unpack")),
    *(f"slmops.conversion.{which}_worker" for which in ("olive", "schema", "thin", "verify")),
    *(f"slmops.evaluation.{which}_worker" for which in ("answers", "logits")),
    "slmops.training.finetune_worker",
)
"""They spend most of their time on imports. Those with Foundry Local's libraries cannot be where Olive's are."""


def work_in_process(patch: pytest.MonkeyPatch) -> None:
    """Let workers work in this process, which saves seconds of imports: for what they make, not for how they end."""
    real = children.call

    def call(handle: Any, request: Any, *, log: Path, **how: Any) -> tuple[Any, children.Finished]:
        if handle.__module__ not in IN_PROCESS or getattr(request, "foundry_id", None):
            return real(handle, request, log=log, **how)
        log.parent.mkdir(parents=True, exist_ok=True)
        variables, quiet = mock.patch.dict(os.environ, how.get("env") or {}), warnings.catch_warnings(action="ignore")
        try:
            with log.open("a", encoding="utf-8") as said, contextlib.redirect_stdout(said), variables, quiet:
                made = handle(request)
        except SlmopsError:
            raise
        except Exception as broken:  # a child would end without a result
            raise how["error"](str(broken)) from broken
        for line in log.read_text(encoding="utf-8").splitlines() if "on_line" in how else ():
            how["on_line"](line)
        return made, children.Finished(0, 1.0, [])

    patch.setattr(children, "call", call)


def put_databases(home: Path, databases: Path) -> None:
    """Spare the servers of a home their migrations."""
    for name in ("prefect", "mlflow"):
        (home / name).mkdir(parents=True)
        shutil.copy(databases / f"{name}.db", home / name)


def evaluation_set(folder: Path) -> Path:
    path = folder / "three.jsonl"
    path.write_text(EVALUATION_SET, encoding="utf-8")
    return path


def workers(module: str) -> list[psutil.Process]:
    """Child processes of the tests that run a module of ours; dead ones that nobody has asked about do not count."""
    running = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if module in " ".join(child.cmdline()):
                running.append(child)
    return running


def at_work(home: Path) -> list[psutil.Process]:
    """Processes that were told of a folder in this home."""
    running = psutil.process_iter(["cmdline"])
    return [one for one in running if any(str(home) in argument for argument in one.info["cmdline"] or ())]


def until(condition: Callable[[], T], what: str = "it comes true", seconds: float = 60) -> T:
    """Wait for it; returns what it is then."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)
    return found


def no_download(_uri: str, _target: Path) -> Path:
    raise AssertionError("nothing should be downloaded")
