"""Measure one registered variant: each part in a fresh process, one variant at a time on the whole machine."""

from __future__ import annotations

import logging
import math

from slmops import locks, process
from slmops.errors import EvaluationError
from slmops.evaluation import chat_worker, dataset, perplexity_worker
from slmops.evaluation.prompts import speed_prompts
from slmops.evaluation.statistics import percentile
from slmops.files import write_atomic
from slmops.job import Job
from slmops.models import Evaluation, Measurement, Registration, Variant
from slmops.settings import Settings

log = logging.getLogger(__name__)

REPETITIONS, QUICK_REPETITIONS = 5, 2
TOKENS, QUICK_TOKENS = 3072, 1024
PERCENTILES = (50, 90, 99)


def evaluate(variant: Variant, registration: Registration, name: str, job: Job, settings: Settings) -> Evaluation:
    """Load, time, question and score one variant.

    Raises:
        EvaluationError: It could not be measured; nothing is reported of it then.
        UsageError: The evaluation set or the text is bad.
    """
    questions = dataset.load(job.evaluation_set)
    text, text_digest = dataset.perplexity_text(job.perplexity_text)
    work = settings.work(name) / f"{variant.name}-evaluate"
    logs = settings.logs / name
    write_atomic(work / "text.txt", text)
    with locks.exclusive(settings.machine_lock, "this machine's conversions and measurements", wait=True):
        log.info("%s: measuring speed, memory and answers in Foundry Local", variant.name)
        chat, finished = process.call(
            "slmops.evaluation.chat_worker",
            chat_worker.Request(
                home=settings.foundry,
                foundry_id=registration.foundry_id,
                prompts=speed_prompts(),
                repetitions=QUICK_REPETITIONS if job.quick else REPETITIONS,
                items=questions.items,
            ),
            chat_worker.Result,
            work=work / "chat",
            log=logs / f"{variant.name}.evaluate.log",
            timeout_s=settings.evaluation_timeout_s,
            error=EvaluationError,
        )
        log.info("%s: measuring perplexity", variant.name)
        scored, _ = process.call(
            "slmops.evaluation.perplexity_worker",
            perplexity_worker.Request(
                folder=registration.path, text=work / "text.txt", tokens=QUICK_TOKENS if job.quick else TOKENS
            ),
            perplexity_worker.Result,
            work=work / "perplexity",
            log=logs / f"{variant.name}.perplexity.log",
            timeout_s=settings.evaluation_timeout_s,
            error=EvaluationError,
        )
    right = sum(answer.correct for answer in chat.answers)
    measurements = {
        **_speed(chat),
        **_memory(chat, finished),
        **_of_variant(variant),
        "perplexity": Measurement(value=math.exp(scored.nll), unit="1", samples=scored.tokens),
        "accuracy": Measurement(value=right / len(chat.answers), unit="1", samples=len(chat.answers)),
    }
    return Evaluation(
        measurements=measurements,
        answers=chat.answers,
        samples=tuple({**timed.model_dump()} for timed in chat.timed),
        evaluation_set_digest=questions.digest,
        text_digest=text_digest,
    )


def against_baseline(evaluation: Evaluation, variant: Variant, baseline: Evaluation, of: Variant) -> Evaluation:
    """Add the figures that are relative to the baseline: ``size_ratio`` and ``perplexity_ratio``."""
    perplexity = evaluation.metrics["perplexity"] / baseline.metrics["perplexity"]
    relative = {
        "size_ratio": Measurement(value=variant.model_mb / of.model_mb, unit="1"),
        "perplexity_ratio": Measurement(
            value=perplexity, unit="1", samples=evaluation.measurements["perplexity"].samples
        ),
    }
    return evaluation.model_copy(update={"measurements": {**evaluation.measurements, **relative}})


def _speed(chat: chat_worker.Result) -> dict[str, Measurement]:
    """Time to first token, inter-token latency, rates and response time.

    Time to first token: request to first non-empty text, templating and tokenization included. Inter-token latency of
    a request: (last - first) / (completion tokens - 1), with the runtime's count, since a piece of text need not be
    one token. Prefill tokens/s: prompt tokens / time to first token of the longest prompt.
    """
    decoding = [t for t in chat.timed if t.completion_tokens > 1 and t.last_s > t.first_s]
    if not decoding:
        raise EvaluationError(
            "The model answers each of the speed prompts with less than two tokens, so nothing can be timed.",
            "Is its chat template right? See the answers in the log of its registration.",
        )
    longest = max(t.prompt_tokens for t in chat.timed)
    gaps = [(t.last_s - t.first_s) / (t.completion_tokens - 1) for t in decoding]
    measured = {
        "load_s": Measurement(value=chat.load_s, unit="s"),
        "decode_tok_s": _median([1 / gap for gap in gaps], "tokens/s"),
        "prefill_tok_s": _median(
            [t.prompt_tokens / t.first_s for t in chat.timed if t.prompt_tokens == longest], "tokens/s"
        ),
    }
    for metric, samples, unit in (
        ("ttft_ms", [t.first_s * 1e3 for t in chat.timed], "ms"),
        ("itl_ms", [gap * 1e3 for gap in gaps], "ms"),
        ("response_s", [t.total_s for t in chat.timed], "s"),
    ):
        for percent in PERCENTILES:
            measured[f"{metric}_p{percent}"] = Measurement(
                value=percentile(samples, percent), unit=unit, samples=len(samples)
            )
    return measured


def _median(samples: list[float], unit: str) -> Measurement:
    return Measurement(value=percentile(samples, 50), unit=unit, samples=len(samples))


def _memory(chat: chat_worker.Result, finished: process.Finished) -> dict[str, Measurement]:
    at_rest = [mb for at, mb in finished.memory if chat.loaded_from <= at <= chat.loaded_to]
    if not at_rest:
        raise EvaluationError("Memory could not be sampled while the model was loaded.")
    return {
        "memory_peak_mb": Measurement(value=finished.memory_peak_mb, unit="MB", samples=len(finished.memory)),
        "memory_loaded_mb": Measurement(value=percentile(at_rest, 50), unit="MB", samples=len(at_rest)),
        "cpu_percent": Measurement(value=chat.cpu_percent, unit="% of one core"),
    }


def _of_variant(variant: Variant) -> dict[str, Measurement]:
    return {
        "size_mb": Measurement(value=variant.model_mb, unit="MB"),
        "bits_per_weight": Measurement(value=variant.weights.bits_per_weight, unit="bits"),
        "convert_s": Measurement(value=variant.convert_s, unit="s"),
        "convert_memory_peak_mb": Measurement(value=variant.convert_memory_peak_mb, unit="MB"),
    }
