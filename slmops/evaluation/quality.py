"""Quality of one variant: distributions on a text, answers to the evaluation set, edge cases."""

from __future__ import annotations

import logging
from pathlib import Path

from slmops.core import locks
from slmops.core.errors import EvaluationError
from slmops.core.files import write_atomic
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Answer, CaseOutcome, Checkpoint, Frozen, Registration, Variant
from slmops.evaluation import answers_worker, dataset, edge_cases, logits_worker
from slmops.evaluation.logits_worker import Distance
from slmops.processes import children

log = logging.getLogger(__name__)

TOKENS, QUICK_TOKENS = 2048, 512
QUICK_ITEMS = 8
BASELINE, HUGGING_FACE = "baseline", "hugging_face"
"""The references: the fp32 variant, and the checkpoint itself as transformers runs it."""


class Quality(Frozen):
    """Raw results; :mod:`slmops.evaluation.summary` makes metrics of them."""

    nll: tuple[float, ...]
    distances: dict[str, Distance]
    answers: tuple[Answer, ...]
    cases: tuple[CaseOutcome, ...]
    text_digest: str
    evaluation_set_digest: str


def score_checkpoint(checkpoint: Checkpoint, name: str, job: Job, settings: Settings) -> tuple[float, ...] | None:
    """Have transformers score the text and leave its logits for the variants to be compared with.

    Returns:
        Negative log-likelihood of each scored token in nats; None in a quick job, which does without, or if
        transformers cannot run the checkpoint, which is said and spoils nothing else.
    """
    if job.quick:
        return None
    reference = _reference(HUGGING_FACE, name, settings)
    try:
        return _score_checkpoint(checkpoint, reference, name, job, settings)
    except EvaluationError as error:
        log.warning("the variants are not compared with the checkpoint itself: %s", error)
        reference.unlink(missing_ok=True)
        return None


def _score_checkpoint(
    checkpoint: Checkpoint, reference: Path, name: str, job: Job, settings: Settings
) -> tuple[float, ...]:
    with locks.exclusive(settings.machine_lock, "this machine's conversions and measurements", wait=True):
        log.info("scoring the text with the checkpoint itself")
        result, _ = children.call(
            "slmops.evaluation.logits_worker",
            logits_worker.LogitsRequest(
                folder=checkpoint.path,
                hugging_face=True,
                trust_remote_code=job.trust_remote_code,
                text=_text(name, job, settings)[0],
                tokens=TOKENS,
                write=reference,
            ),
            logits_worker.LogitsResult,
            work=settings.work(name) / "checkpoint-logits",
            log=settings.logs / name / "checkpoint.logits.log",
            timeout_s=settings.evaluation_timeout_s,
            error=EvaluationError,
        )
    return result.nll


def measure(variant: Variant, registration: Registration, name: str, job: Job, settings: Settings) -> Quality:
    """Score the text, answer the evaluation set, go through the edge cases. The baseline comes first: it leaves its
    logits for the others.

    Raises:
        EvaluationError: It could not be measured; nothing is reported of it then.
        UsageError: The evaluation set, the text or the matcher is bad.
    """
    questions = load_questions(job, settings)
    text, text_digest = _text(name, job, settings)
    work = settings.work(name)
    with locks.exclusive(settings.machine_lock, "this machine's conversions and measurements", wait=True):
        log.info("%s: measuring quality", variant.name)
        baseline, checkpoint = (_reference(which, name, settings) for which in (BASELINE, HUGGING_FACE))
        references = (
            {HUGGING_FACE: checkpoint} if variant.recipe.baseline else {BASELINE: baseline, HUGGING_FACE: checkpoint}
        )
        scored, _ = children.call(
            "slmops.evaluation.logits_worker",
            logits_worker.LogitsRequest(
                folder=registration.path,
                text=text,
                tokens=QUICK_TOKENS if job.quick else TOKENS,
                references={which: file for which, file in references.items() if file.exists()},
                write=baseline if variant.recipe.baseline else None,
            ),
            logits_worker.LogitsResult,
            work=work / f"{variant.name}-logits",
            log=settings.logs / name / f"{variant.name}.logits.log",
            timeout_s=settings.evaluation_timeout_s,
            error=EvaluationError,
        )
        answered, _ = children.call(
            "slmops.evaluation.answers_worker",
            answers_worker.Request(
                home=settings.foundry,
                foundry_id=registration.foundry_id,
                items=dataset.subset(questions.items, QUICK_ITEMS) if job.quick else questions.items,
                matcher=job.matcher,
            ),
            answers_worker.Result,
            work=work / f"{variant.name}-answers",
            log=settings.logs / name / f"{variant.name}.answers.log",
            timeout_s=settings.evaluation_timeout_s,
            error=EvaluationError,
        )
        cases = () if job.quick else edge_cases.run(variant, registration, name, settings)
    return Quality(
        nll=scored.nll,
        distances=scored.distances,
        answers=answered.answers,
        cases=cases,
        text_digest=text_digest,
        evaluation_set_digest=questions.digest,
    )


def load_questions(job: Job, settings: Settings) -> dataset.EvaluationSet:
    """The job's evaluation set.

    Raises:
        UsageError: It is bad, or wants a matcher or a judge that is not there.
    """
    return dataset.load(job.evaluation_set, matcher=job.matcher, judge=settings.judge_configured)


def _text(name: str, job: Job, settings: Settings) -> tuple[Path, str]:
    """The file with the text, and the text's digest."""
    text, digest = dataset.perplexity_text(job.perplexity_text)
    path = settings.work(name) / "text.txt"
    write_atomic(path, text)
    return path, digest


def _reference(which: str, name: str, settings: Settings) -> Path:
    """Where the logits of a reference are left: 4 bytes x tokens x vocabulary. Gone with the job's other work."""
    folder = settings.work(name) / "logits"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{which}.npy"
