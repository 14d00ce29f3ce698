"""Quality of one variant: distributions on a text, answers to the evaluation set, edge cases."""

import hashlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from slmops.conversion import bf16_worker, recipes
from slmops.core import locks, machine
from slmops.core.errors import EvaluationError
from slmops.core.files import write_atomic
from slmops.core.job import CHECKPOINT, Job, JobContext
from slmops.core.settings import Settings
from slmops.core.values import Answer, CaseOutcome, Extent, Frozen, Registration, Variant
from slmops.evaluation import answers_worker, dataset, edge_cases, logits_worker, scoring
from slmops.evaluation.answers_worker import MOST_SESSIONS, AnswersRequest
from slmops.evaluation.dataset import EvaluationSet
from slmops.evaluation.logits_worker import Distance, LogitsRequest, LogitsResult
from slmops.evaluation.speed import Peer
from slmops.foundry.layout import model_name, sessions_that_fit, stage
from slmops.foundry.register import register_folder
from slmops.processes import children
from slmops.processes.children import Request, Result

log = logging.getLogger(__name__)

TOKENS, QUICK_TOKENS = 2048, 512
QUICK_ITEMS = 8
BASELINE_REFERENCE, CHECKPOINT_REFERENCE = "baseline", "hugging_face"
"""The references: the fp32 variant, and the checkpoint itself in transformers."""


class Quality(Frozen):
    """Raw results; :mod:`slmops.evaluation.summary` makes metrics of them."""

    nll: tuple[float, ...]
    distances: dict[str, Distance]
    answers: tuple[Answer, ...]
    cases: tuple[CaseOutcome, ...]
    text_digest: str
    evaluation_set_digest: str
    extent: Extent


class Share:
    """At most ``count`` tokens or questions; if nobody has found out yet, what there is time for in ``budget_s``.

    The first model that is measured finds out what there is time for, and the others get the same: so they compare pair
    by pair. Later jobs of this model with as much time get it too, among them the same job after it was killed.
    """

    def __init__(self, kind: str, most: int, digest: str, context: JobContext) -> None:
        job, settings, of = context.job, context.settings, context.checkpoint
        with_checkpoint = job.baseline == CHECKPOINT or not job.quick
        models = len(recipes.names(job, settings)) + (job.olive_config is not None) + with_checkpoint
        # By default so much that no model runs into the timeout that is up to four times as slow as the first.
        seconds = 60 * job.minutes / models / 2 if job.minutes else settings.evaluation_timeout_s / 4
        key = json.dumps([kind, most, digest, of.name, of.parameters, seconds])
        kept = settings.home / "extents" / hashlib.sha256(key.encode()).hexdigest()[:16]
        # The first travels to the other machines of a job, with the logits.
        self._files = (context.work / "logits" / kind, kept)
        known = [int(file.read_text(encoding="utf-8")) for file in self._files if file.exists()]
        self.count = known[0] if known else most
        self.budget_s = None if known else seconds

    def keep(self, count: int) -> None:
        """Remember how many there were time for."""
        for file in self._files:
            write_atomic(file, str(count))


def score_checkpoint(context: JobContext) -> Quality | None:
    """What transformers makes of the text, its logits in a file; and of the evaluation set if it is the baseline.

    None, unless it is the baseline, if quick or if it cannot; a baseline that cannot is an EvaluationError.
    """
    job, folder = context.job, context.checkpoint.path
    is_baseline = job.baseline == CHECKPOINT
    if job.quick and not is_baseline:
        return None
    reference = _logits(context)[CHECKPOINT_REFERENCE]
    asked = _questions(context)
    try:
        with locks.machine(context.settings):
            log.info("measuring quality of the checkpoint itself")
            scored, digest = _score(CHECKPOINT, context, folder=folder, hugging_face=True, write=reference)
            answers = _ask(CHECKPOINT, asked, context, folder=folder) if is_baseline else ()
    except EvaluationError as error:
        if is_baseline:
            raise
        log.warning("the variants are not compared with the checkpoint itself: %s", error)
        reference.unlink(missing_ok=True)
        return None
    return _quality(scored, digest, asked, answers, (), context.settings)


def measure(variant: Variant, registration: Registration, context: JobContext) -> Quality:
    """Score the text, answer the evaluation set, go through the edge cases; EvaluationError if it is not all measured.

    Measure the baseline first: it leaves its logits for the others. The judging model is asked last, without the lock.
    UsageError: the evaluation set, the text or the matcher is bad.
    """
    job, name, settings = context.job, context.name, context.settings
    questions, files = _questions(context), _logits(context)
    own = files.pop(BASELINE_REFERENCE) if variant.recipe.baseline else None
    with locks.machine(settings):
        log.info("%s: measuring quality", variant.name)
        files_of: dict[str, Any] = {"folder": registration.path, "references": _there(files), "write": own}
        sessions = sessions_that_fit(registration.path, MOST_SESSIONS)
        home, foundry_id = settings.foundry, registration.foundry_id
        if registration.not_run:  # questions are answered by the CPU, as the text is scored by it on any machine
            home, foundry_id = _on_the_cpu(variant, registration, name, settings)
        asked: dict[str, Any] = {"folder": home, "foundry_id": foundry_id}
        # The child is the first to end: of an interruption nobody waits for the thread.
        with ThreadPoolExecutor(1) as beside, children.Child() as child:
            scoring = beside.submit(_score, variant.name, context, within=child, **files_of)
            if not _fits_twice(variant, job):
                wait([scoring])
            answers = _ask(variant.name, questions, context, sessions=sessions, **asked)
            cases = () if job.quick or registration.not_run else edge_cases.run(variant, registration, name, settings)
            scored, text_digest = scoring.result()
    return _quality(scored, text_digest, questions, answers, cases, settings)


def _on_the_cpu(variant: Variant, registration: Registration, name: str, settings: Settings) -> tuple[Path, str]:
    """A Foundry home in which the CPU runs a variant for another device, and its id there."""
    home = settings.work(name) / f"{variant.name}-on-the-cpu"
    staged = stage(registration, home, on_the_cpu=f"{model_name(name, 'on-the-cpu')}:1")
    if bf16_worker.makes(variant.recipe):
        in_child(
            bf16_worker.handle, bf16_worker.RewriteRequest(folder=staged.folder), name, f"{variant.name}.bf16", settings
        )
    log_file = settings.logs / name / f"{variant.name}.cpu.log"
    register_folder(home, staged.folder, staged.foundry_id, staged.foundry_id, log=log_file)
    return home, staged.foundry_id


def _fits_twice(variant: Variant, job: Job) -> bool:
    """Whether the text may be scored while questions are answered: each process loads the variant."""
    return job.baseline != CHECKPOINT and 8 * variant.model_mb * 1e6 < machine.memory()[1]


def score_peer(peer: Peer, context: JobContext) -> Quality:
    """What llama.cpp makes of the text, relative to the references that there are; it is asked no questions."""
    references = _there(_logits(context))
    with locks.machine(context.settings):
        log.info("%s: measuring quality", peer.name)
        scored, digest = _score(peer.name, context, folder=peer.folder, gguf=peer.file, references=references)
    return _quality(scored, digest, EvaluationSet(items=(), digest=""), (), (), context.settings)


def _questions(context: JobContext) -> EvaluationSet:
    job = context.job
    return dataset.load(job.evaluation_set, matcher=job.matcher, judge=context.settings.judge_configured)


def _quality(
    scored: LogitsResult,
    text_digest: str,
    asked: EvaluationSet,
    answers: tuple[Answer, ...],
    cases: tuple[CaseOutcome, ...],
    settings: Settings,
) -> Quality:
    questions_of = {"questions": len(answers), "all_questions": len(asked.items)}
    return Quality(
        nll=scored.nll,
        distances=scored.distances,
        answers=scoring.ask_judge(dataset.subset(asked.items, len(answers)), answers, settings),
        cases=cases,
        text_digest=text_digest,
        evaluation_set_digest=asked.digest,
        extent=Extent(tokens=scored.tokens, all_tokens=scored.all_tokens, **questions_of),
    )


def _score(
    label: str, context: JobContext, within: children.Child | None = None, **model: Any
) -> tuple[LogitsResult, str]:
    """What a model makes of its share of the text, and the text's digest."""
    job, name = context.job, context.name
    text, digest = dataset.perplexity_text(job.perplexity_text)
    file = context.work / "text.txt"
    write_atomic(file, text)
    share = Share("tokens", QUICK_TOKENS if job.quick else TOKENS, digest, context)
    model |= {"context_length": context.checkpoint.context_length, "trust_remote_code": job.trust_remote_code}
    request = LogitsRequest(text=file, tokens=share.count, budget_s=share.budget_s, **model)
    scored = in_child(logits_worker.handle, request, name, f"{label}.logits", context.settings, within=within)
    share.keep(scored.tokens)
    return scored, digest


def _ask(label: str, asked: EvaluationSet, context: JobContext, **model: Any) -> tuple[Answer, ...]:
    """What a model answers to its share of the evaluation set, without the judging model's verdicts."""
    job = context.job
    share = Share("questions", QUICK_ITEMS if job.quick else len(asked.items), asked.digest, context)
    items = dataset.subset(asked.items, share.count)
    model |= {"trust_remote_code": job.trust_remote_code}
    request = AnswersRequest(items=items, matcher=job.matcher, budget_s=share.budget_s, **model)
    answers = in_child(answers_worker.handle, request, context.name, f"{label}.answers", context.settings).answers
    share.keep(len(answers))
    return answers


def in_child(
    handle: Callable[[Request], Result],
    request: Request,
    name: str,
    log: str,
    settings: Settings,
    env: dict[str, str] | None = None,
    within: children.Child | None = None,
) -> Result:
    """Score a text or have a model answer; EvaluationError if it fails, UsageError for a bad matcher.

    ``name`` is the model's, and ``log`` names the file for the output, such as ``int4.answers``. The caller holds the
    machine lock; give answers to :func:`slmops.evaluation.scoring.ask_judge` once it is free.
    """
    found, _ = children.call(
        handle,
        request,
        log=settings.logs / name / f"{log}.log",
        timeout_s=settings.evaluation_timeout_s,
        error=EvaluationError,
        env=env,
        within=within,
    )
    return found


def _logits(context: JobContext) -> dict[str, Path]:
    """Where the logits of each reference are left: 4 bytes x tokens x vocabulary. Removed with the job's other work."""
    folder = context.work / "logits"
    folder.mkdir(parents=True, exist_ok=True)
    return {which: folder / f"{which}.f32" for which in (CHECKPOINT_REFERENCE, BASELINE_REFERENCE)}


def _there(files: dict[str, Path]) -> dict[str, Path]:
    return {which: file for which, file in files.items() if file.exists()}
