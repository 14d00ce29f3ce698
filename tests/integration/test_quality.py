"""Quality of variants for real: ONNX Runtime's logits against those of torch, and answers in Foundry Local."""

import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from slmops.core.errors import EvaluationError
from slmops.core.files import sha256
from slmops.core.job import Job, JobContext
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Registration, Variant
from slmops.evaluation import edge_cases, quality, speed
from slmops.evaluation.logits_worker import LEAST_TOKENS, WINDOW
from slmops.evaluation.quality import BASELINE_REFERENCE, CHECKPOINT_REFERENCE, TOKENS, Quality
from slmops.evaluation.speed import Speed
from slmops.foundry.register import register
from slmops.processes import children
from tests import making, measured

pytestmark = pytest.mark.integration

NAME = "tiny"
Made = dict[str, tuple[Variant, Registration]]
Scored = dict[str, Quality]


@pytest.fixture(scope="module")
def job(talkative: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that is not quick, so that the checkpoint is scored too."""
    from pydoc_data import topics

    folder = tmp_path_factory.mktemp("inputs")
    text = "\n".join(topics.topics[topic] for topic in ("assignment", "class", "function")) + " Ünïcödé 東京"
    (folder / "text.txt").write_text(text, encoding="utf-8")
    asked = making.job(talkative, evaluation_set=making.evaluation_set(folder), perplexity_text=folder / "text.txt")
    return asked.model_copy(update={"quick": False})


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        making.work_in_process(patch)
        yield patch


@pytest.fixture(scope="module")
def context(checkpoint: Checkpoint, job: Job, home: Settings) -> JobContext:
    return JobContext(job, NAME, checkpoint, home)


@pytest.fixture(scope="module")
def checkpoint_nll(context: JobContext) -> tuple[float, ...]:
    scored = quality.score_checkpoint(context)
    assert scored.answers == ()
    return scored.nll


@pytest.fixture(scope="module")
def scored(made: Made, context: JobContext, checkpoint_nll: tuple[float, ...]) -> Scored:
    assert checkpoint_nll
    return {name: quality.measure(*one, context) for name, one in made.items()}


def asking(context: JobContext, name: str, **asked: Any) -> JobContext:
    """Another job of another model with the same checkpoint."""
    return replace(context, name=name, job=context.job.model_copy(update=asked))


def token_ids(made: Made, job: Job) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(made["fp32"][1].path / "tokenizer.json"))
    ids = tokenizer.encode(job.perplexity_text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    assert len(ids) > TOKENS
    return np.array(ids[:TOKENS])


@pytest.mark.filterwarnings("ignore")  # torch and transformers, which work in child processes otherwise
def test_perplexity_and_distribution_are_those_of_the_checkpoint(
    scored: Scored, made: Made, job: Job, checkpoint: Checkpoint, checkpoint_nll: tuple[float, ...]
) -> None:
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    windows = torch.from_numpy(token_ids(made, job)).split(WINDOW)
    with torch.no_grad():
        parts = [cross_entropy(model(part[None]).logits[0, :-1], part[1:], reduction="none") for part in windows]
    nll = torch.cat(parts).numpy()
    assert checkpoint_nll == pytest.approx(nll, rel=1e-4)
    assert scored["fp32"].nll == pytest.approx(nll, rel=1e-3, abs=1e-3)
    assert len(nll) == TOKENS - len(windows)
    expected = math.exp(nll.mean(dtype=float))
    assert expected > 100  # random weights
    assert math.exp(np.mean(scored["fp32"].nll)) == pytest.approx(expected, rel=1e-6)
    # int8 is another model: near, and not the same.
    int8 = math.exp(np.mean(scored["int8"].nll))
    assert int8 == pytest.approx(expected, rel=0.1)
    assert int8 != pytest.approx(expected, rel=1e-6)
    # The export computes what the checkpoint computes, and is the baseline, which is not compared with itself.
    assert scored["fp32"].distances.keys() == {CHECKPOINT_REFERENCE}
    found = scored["fp32"].distances[CHECKPOINT_REFERENCE]
    assert len(found.kl) == len(found.same_top) == len(nll)
    assert all(0 <= kl < 1e-5 for kl in found.kl)
    assert np.mean(found.kl) < 1e-6
    assert np.mean(found.same_top) > 0.999


def test_distance_of_a_quantized_variant_to_the_baseline(scored: Scored, made: Made, job: Job) -> None:
    from slmops.conversion.logits import OnnxModel

    assert scored["int8"].distances.keys() == {BASELINE_REFERENCE, CHECKPOINT_REFERENCE}
    found = scored["int8"].distances[BASELINE_REFERENCE]
    ids = token_ids(made, job)
    baseline, int8 = (OnnxModel(made[name][1].path) for name in ("fp32", "int8"))
    for number in (0, 2):  # the first, and one whose rows are not at the beginning of the reference
        part = ids[number * WINDOW : (number + 1) * WINDOW]
        p, q = (log_softmax(model.logits(part)[:-1].astype(float), axis=1) for model in (baseline, int8))
        rows = slice(number * (WINDOW - 1), (number + 1) * (WINDOW - 1))
        assert found.kl[rows] == pytest.approx(rel_entr(np.exp(p), np.exp(q)).sum(axis=1), rel=0.01, abs=1e-6)
        assert found.same_top[rows] == tuple(p.argmax(axis=1) == q.argmax(axis=1))
        assert scored["int8"].nll[rows] == pytest.approx(-q[np.arange(len(q)), part[1:]], rel=1e-5)
    assert np.mean(found.kl) > 1e-5  # far more than rounding
    assert 0.5 < np.mean(found.same_top) < 1
    # The export is exact, so that the distance to the checkpoint is the same.
    assert scored["int8"].distances[CHECKPOINT_REFERENCE].kl == pytest.approx(found.kl, rel=0.01, abs=1e-5)


def test_answers_are_judged(scored: Scored, job: Job) -> None:
    expected = [
        ("1", "general", "Say anything.", True, 1),
        ("2", "capitals", "What is the capital of France?", False, 0),
        ("third", "general", "Count", True, 1),
    ]
    for one in scored.values():
        assert [(a.id, a.category, a.prompt, a.correct, a.score) for a in one.answers] == expected
        assert all((a.finish_reason, a.completion_tokens, a.format_valid) == ("length", 8, None) for a in one.answers)
        assert all(a.answer.strip() and a.seconds > 0 for a in one.answers)
        assert len(one.cases) == len(edge_cases.EDGE_CASES)
        assert one.evaluation_set_digest == sha256(job.evaluation_set)
        assert one.text_digest == sha256(job.perplexity_text)


@pytest.fixture
def no_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edge cases take a while and have tests of their own."""
    monkeypatch.setattr(edge_cases, "run", lambda *_: measured.CASES)


@pytest.mark.usefixtures("no_cases")
def test_the_same_again(scored: Scored, made: Made, context: JobContext) -> None:
    reference = context.work / "logits" / f"{BASELINE_REFERENCE}.f32"
    before = sha256(reference)
    for name in ("int8", "fp32", "int8"):
        runs = (quality.measure(*made[name], context), scored[name])
        again, first = (one.model_dump(exclude={"cases": True, "answers": {"__all__": {"seconds"}}}) for one in runs)
        assert again == first, name
        assert sha256(reference) == before


def test_the_checkpoint_as_the_baseline(made: Made, context: JobContext, scored: Scored) -> None:
    own = asking(context, "own", quick=True, baseline="checkpoint")
    found = quality.score_checkpoint(own)
    # The fp32 variant, which computes the same in Foundry Local, says the same.
    assert [one.answer for one in found.answers] == [one.answer for one in scored["fp32"].answers]
    assert np.allclose(found.nll, scored["fp32"].nll[: len(found.nll)], atol=1e-3)
    int8 = quality.measure(*made["int8"], own)
    assert {*int8.distances} == {CHECKPOINT_REFERENCE}


@pytest.mark.usefixtures("no_cases")
def test_a_job_that_is_quick_or_has_little_time(made: Made, context: JobContext, tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text('{"prompt": "Q", "expected": "A", "max_tokens": 2}\n' * 25, encoding="utf-8")
    asked = asking(context, "quick", quick=True, evaluation_set=many)
    assert quality.score_checkpoint(asked) is None
    found = {name: quality.measure(*one, asked) for name, one in made.items()}
    windows = math.ceil(quality.QUICK_TOKENS / WINDOW)
    assert {len(one.nll) for one in found.values()} == {quality.QUICK_TOKENS - windows}
    assert {name: set(one.distances) for name, one in found.items()} == {"fp32": set(), "int8": {BASELINE_REFERENCE}}
    assert {len(one.answers) for one in found.values()} == {quality.QUICK_ITEMS}

    asked = asking(context, "hasty", minutes=0.001, evaluation_set=many)
    scored = quality.score_checkpoint(asked)
    found = {name: quality.measure(*one, asked) for name, one in made.items()}
    # The same ones for all, so that they compare; and no fewer than gates need.
    for one in found.values():
        assert len(one.nll) == len(scored.nll) == LEAST_TOKENS - math.ceil(LEAST_TOKENS / WINDOW)
        assert one.extent.model_dump().items() >= {"tokens": 1024, "questions": 20, "all_questions": 25}.items()
        assert one.extent.all_tokens > TOKENS
    assert found["int8"].distances.keys() == {BASELINE_REFERENCE, CHECKPOINT_REFERENCE}
    assert "intervals would be 1.1 times narrower" in found["int8"].extent.text


def test_a_checkpoint_that_transformers_cannot_run(
    context: JobContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((context.checkpoint.path / name).read_bytes())
    no_weights = replace(context, checkpoint=context.checkpoint.model_copy(update={"path": tmp_path}))
    weightless = asking(no_weights, "weightless")
    assert quality.score_checkpoint(weightless) is None
    assert any("not compared with the checkpoint itself" in message for message in caplog.messages)
    assert list((weightless.work / "logits").iterdir()) == []
    with pytest.raises(EvaluationError):  # as the baseline: nothing is left to judge by
        quality.score_checkpoint(asking(no_weights, "own", baseline="checkpoint"))


@pytest.mark.usefixtures("no_cases")
def test_two_at_once_wait_for_each_other(
    made: Made,
    context: JobContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "slmops")
    real = children.call
    sections: list[tuple[float, float, str]] = []

    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.monotonic()
        result = real(*arguments, **options)
        sections.append((started, time.monotonic(), str(options["log"])))
        return result

    # The lock is the machine's, not the home's.
    variant, registration = made["int8"]
    other = Settings(home=tmp_path / "other")
    elsewhere = register(variant, NAME, context.job, other)
    monkeypatch.setattr(children, "call", timed)
    quick = asking(context, "alone", quick=True, prompt_lengths=[32])
    with ThreadPoolExecutor(2) as pool:
        scoring = pool.submit(quality.measure, variant, registration, quick)
        timing = pool.submit(speed.measure, [(variant, elsewhere)], NAME, quick.job, other)
    assert scoring.result().nll
    assert isinstance(timing.result()["int8"], Speed)
    assert len(sections) >= 3  # a disturbed turn is measured twice
    # Text and questions of one go on side by side, but never beside a turn of the other, nor between its turns.
    here, there = ([one for one in sections if (str(other.home) in one[2]) == of] for of in (False, True))
    assert max(end for _, end, _ in here) <= min(begin for begin, _, _ in there) or max(
        end for _, end, _ in there
    ) <= min(begin for begin, _, _ in here)
    waiting = "waiting for this machine's conversions and measurements, held by another run (process "
    assert any(message.startswith(waiting) for message in caplog.messages)


def test_what_cannot_be_measured(
    made: Made, context: JobContext, tmp_path: Path, in_process: pytest.MonkeyPatch
) -> None:
    in_process.undo()  # the last ones are about children
    variant, registration = made["int8"]
    quick = asking(context, "bad", quick=True)
    unknown = registration.model_copy(update={"foundry_id": "tiny-int8-generic-cpu:7"})
    with pytest.raises(EvaluationError, match="tiny-int8-generic-cpu:7"):
        quality.measure(variant, unknown, quick)
    impatient = quick.settings.model_copy(update={"evaluation_timeout_s": 0.02})
    with pytest.raises(EvaluationError, match=r"took longer than 0\.02 s"):
        quality.measure(variant, registration, replace(quick, settings=impatient))
    assert making.workers("logits_worker") == []
    # A question that the context has no room for.
    (tmp_path / "long.jsonl").write_text('{"prompt": "Tell me.", "expected": "x", "max_tokens": 4096}\n')
    asked = asking(quick, "long", evaluation_set=tmp_path / "long.jsonl")
    with pytest.raises(EvaluationError, match=r"'Tell me\.'.*4096 output") as caught:
        quality.measure(variant, registration, asked)
    assert "--max-length" in caught.value.fix
