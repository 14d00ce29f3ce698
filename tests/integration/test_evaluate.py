"""Measuring variants in Foundry Local's runtime for real, and checking the figures by other means."""

from __future__ import annotations

import itertools
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from slmops import process
from slmops.errors import EvaluationError, UsageError
from slmops.evaluation import evaluate as evaluation
from slmops.evaluation.evaluate import against_baseline, evaluate
from slmops.files import sha256
from slmops.foundry.register import register
from slmops.job import Job
from slmops.models import Checkpoint, Evaluation, Registration, Variant
from slmops.settings import Settings
from tests import making
from tests.making import UNITS

pytestmark = pytest.mark.integration

PROMPTS, REPETITIONS, TOKENS = 3, 2, 32

Made = tuple[Variant, Registration]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def job(talkative: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    from pydoc_data import topics

    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text(topics.topics["assignment"] + " Ünïcödé 東京", encoding="utf-8")
    return making.job(
        talkative,
        evaluation_set=making.evaluation_set(folder),
        perplexity_text=folder / "text.txt",
    )


@pytest.fixture(scope="module")
def checkpoint(job: Job, settings: Settings) -> Checkpoint:
    return making.resolve(job, settings)


@pytest.fixture(scope="module")
def made(job: Job, settings: Settings, stock: Settings) -> dict[str, Made]:
    variants = [making.variant(name, job, stock) for name in ("fp32", "int8")]
    return {variant.name: (variant, register(variant, "tiny", job, settings)) for variant in variants}


@pytest.fixture(scope="module")
def measured(made: dict[str, Made], job: Job, settings: Settings) -> dict[str, Evaluation]:
    return {name: evaluate(*one, "tiny", job, settings) for name, one in made.items()}


def test_every_metric_is_there(measured: dict[str, Evaluation]) -> None:
    for one in measured.values():
        assert {name: measurement.unit for name, measurement in one.measurements.items()} == UNITS
        assert all(math.isfinite(value) and value > 0 for value in one.metrics.values()), one.metrics


def test_metrics_that_come_from_the_conversion(made: dict[str, Made], measured: dict[str, Evaluation]) -> None:
    for name, one in measured.items():
        variant, registration = made[name]
        onnx = sum(path.stat().st_size for path in registration.path.glob("*.onnx*"))
        assert one.metrics["size_mb"] == pytest.approx(onnx / 1e6)
        assert one.metrics["bits_per_weight"] == variant.weights.bits_per_weight
        assert one.metrics["convert_s"] == variant.convert_s
        assert one.metrics["convert_memory_peak_mb"] == variant.convert_memory_peak_mb


def test_speed_is_computed_from_the_samples_that_are_kept(measured: dict[str, Evaluation]) -> None:
    for one in measured.values():
        samples: dict[str, Any] = {key: np.array([row[key] for row in one.samples]) for key in one.samples[0]}
        assert sorted(zip(samples["prompt"], samples["repetition"], strict=True)) == [
            (prompt, repetition) for prompt in range(PROMPTS) for repetition in range(REPETITIONS)
        ]
        assert set(samples["completion_tokens"]) == {TOKENS}
        lengths = [set(samples["prompt_tokens"][samples["prompt"] == prompt]) for prompt in range(PROMPTS)]
        assert [len(length) for length in lengths] == [1, 1, 1]
        short, middle, long = (length.pop() for length in lengths)
        assert 20 < short < middle < long < 2048 - TOKENS
        assert (samples["first_s"] > 0).all()
        assert (samples["first_s"] < samples["last_s"]).all()
        assert (samples["last_s"] <= samples["total_s"]).all()
        gaps = (samples["last_s"] - samples["first_s"]) / (TOKENS - 1)
        expected = {
            "decode_tok_s": np.median(1 / gaps),
            "prefill_tok_s": np.median(long / samples["first_s"][samples["prompt_tokens"] == long]),
        }
        for percent in (50, 90, 99):
            expected[f"ttft_ms_p{percent}"] = np.percentile(samples["first_s"], percent) * 1e3
            expected[f"itl_ms_p{percent}"] = np.percentile(gaps, percent) * 1e3
            expected[f"response_s_p{percent}"] = np.percentile(samples["total_s"], percent)
        assert {name: one.metrics[name] for name in expected} == pytest.approx(expected)
        counts = {name: one.measurements[name].samples for name in expected}
        assert counts == {**dict.fromkeys(expected, PROMPTS * REPETITIONS), "prefill_tok_s": REPETITIONS}


def test_memory_and_cpu(measured: dict[str, Evaluation]) -> None:
    for one in measured.values():
        assert one.metrics["memory_peak_mb"] >= one.metrics["memory_loaded_mb"] > 20
        assert one.metrics["memory_peak_mb"] < 1000  # no torch: the runtime and a tiny model
        assert one.metrics["cpu_percent"] <= 100 * (psutil.cpu_count() or 1) * 1.1
        assert one.measurements["memory_loaded_mb"].samples >= 1


@pytest.mark.filterwarnings("ignore")  # torch and transformers, which work in child processes otherwise
def test_perplexity_is_that_of_the_checkpoint(
    measured: dict[str, Evaluation], made: dict[str, Made], job: Job, checkpoint: Checkpoint
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert job.perplexity_text is not None
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    text = job.perplexity_text.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0][:1024]
    assert len(ids) == 1024
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(part[None]).logits[0, :-1], part[1:], reduction="sum")
            for part in ids.split(512)
        ]
    expected = math.exp(float(sum(losses)) / (1024 - 2))
    assert measured["fp32"].metrics["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert measured["fp32"].measurements["perplexity"].samples == 1024 - 2
    assert expected > 100  # random weights
    # int8 is another model: near, and not the same.
    assert measured["int8"].metrics["perplexity"] == pytest.approx(expected, rel=0.1)
    assert measured["int8"].metrics["perplexity"] != pytest.approx(expected, rel=1e-6)

    both = against_baseline(measured["int8"], made["int8"][0], measured["fp32"], made["fp32"][0])
    assert set(both.metrics) == {*UNITS, "size_ratio", "perplexity_ratio"}
    assert both.metrics["perplexity_ratio"] == pytest.approx(
        measured["int8"].metrics["perplexity"] / expected, rel=2e-3
    )
    assert 0.25 < both.metrics["size_ratio"] < 1


def test_answers_are_judged(measured: dict[str, Evaluation], job: Job) -> None:
    for one in measured.values():
        assert [(a.id, a.category, a.correct) for a in one.answers] == [
            ("1", "general", True),
            ("2", "capitals", False),
            ("third", "general", True),
        ]
        assert all((a.finish_reason, a.completion_tokens) == ("length", 8) for a in one.answers)
        assert all(a.answer.strip() and a.seconds > 0 for a in one.answers)
        assert one.metrics["accuracy"] == pytest.approx(2 / 3)
        assert one.measurements["accuracy"].samples == 3
        assert job.evaluation_set is not None
        assert job.perplexity_text is not None
        assert one.evaluation_set_digest == sha256(job.evaluation_set)
        assert one.text_digest == sha256(job.perplexity_text)


def test_two_at_once_wait_for_each_other(
    made: dict[str, Made],
    job: Job,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "slmops")
    real = process.call
    sections: list[tuple[float, float, str]] = []

    def timed(module: str, *arguments: Any, **options: Any) -> Any:
        started = time.monotonic()
        try:
            return real(module, *arguments, **options)
        finally:
            sections.append((started, time.monotonic(), str(options["work"])))

    # The lock is the machine's, not the home's.
    variant, _ = made["int8"]
    other = Settings(home=tmp_path / "other")
    elsewhere = register(variant, "tiny", job, other)
    monkeypatch.setattr(evaluation.process, "call", timed)
    work = [(variant, made["int8"][1], "tiny", job, settings), (variant, elsewhere, "tiny", job, other)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda arguments: evaluate(*arguments), work))
    assert [result.metrics.keys() for result in results] == [UNITS.keys()] * 2
    sections.sort()
    assert len(sections) == 4
    for before, after in itertools.pairwise(sections):
        assert before[1] <= after[0]
    # Nor do they take turns within one evaluation.
    homes = [str(other.home) in where for _, _, where in sections]
    assert homes in ([True, True, False, False], [False, False, True, True])
    waiting = "waiting for this machine's conversions and measurements, held by another run (process "
    assert any(message.startswith(waiting) for message in caplog.messages)


def test_what_cannot_be_measured(made: dict[str, Made], job: Job, settings: Settings, tmp_path: Path) -> None:
    variant, registration = made["int8"]
    unknown = registration.model_copy(update={"foundry_id": "tiny-int8-generic-cpu:7"})
    with pytest.raises(EvaluationError, match="tiny-int8-generic-cpu:7 is not registered in Foundry Local"):
        evaluate(variant, unknown, "tiny", job, settings)

    impatient = settings.model_copy(update={"evaluation_timeout_s": 0.2})
    with pytest.raises(EvaluationError, match="took longer than 0 s"):
        evaluate(variant, registration, "tiny", job, impatient)
    assert not [child for child in psutil.Process().children(recursive=True) if "chat_worker" in str(child.cmdline())]

    (tmp_path / "bad.jsonl").write_text('{"prompt": "Q", "expected": "A"}\n{"prompt": "Q"}\n')
    bad = job.model_copy(update={"evaluation_set": tmp_path / "bad.jsonl"})
    with pytest.raises(UsageError, match=r"bad\.jsonl has bad lines:\n  - line 2: expected Field required"):
        evaluate(variant, registration, "tiny", bad, settings)
    short = job.model_copy(update={"perplexity_text": tmp_path / "short.txt"})
    (tmp_path / "short.txt").write_text("e")
    with pytest.raises(EvaluationError, match="fewer than two tokens"):
        evaluate(variant, registration, "tiny", short, settings)
