"""What a sweep measures of a variant: how far it is from the baseline, on the first tokens of the text and on all."""

from pathlib import Path
from statistics import fmean

from slmops.core import locks
from slmops.core.files import write_atomic
from slmops.core.job import JobContext
from slmops.core.values import Variant
from slmops.evaluation import dataset, logits_worker, statistics
from slmops.evaluation.logits_worker import LogitsRequest, LogitsResult
from slmops.evaluation.quality import BASELINE_REFERENCE, TOKENS, in_child
from slmops.processes.children import Child

FIRST_TOKENS = 256


def score_baseline(variant: Variant | None, context: JobContext, within: Child) -> LogitsResult:
    """Score the baseline, None being the checkpoint itself, and leave the text and its distributions for the trials."""
    write_atomic(context.work / "sweep" / "text.txt", dataset.perplexity_text(context.job.perplexity_text)[0])
    folder = variant.path if variant else context.checkpoint.path
    _score(folder, FIRST_TOKENS, context, within, is_baseline=True)
    return _score(folder, TOKENS, context, within, is_baseline=True)


def first_kl(variant: Variant, context: JobContext, within: Child) -> float:
    """Mean KL divergence of the baseline to a variant on the first tokens of the text, in nats."""
    return fmean(_score(variant.path, FIRST_TOKENS, context, within).distances[BASELINE_REFERENCE].kl)


def measure(variant: Variant, baseline: LogitsResult, context: JobContext, within: Child) -> dict[str, float]:
    """The distance to the baseline on the whole text, by the names that the metrics have in a job."""
    scored = _score(variant.path, TOKENS, context, within)
    distance = scored.distances[BASELINE_REFERENCE]
    return {
        "kl_mean": fmean(distance.kl),
        "top1_agreement": fmean(distance.same_top),
        "perplexity_ratio": statistics.perplexity_ratio(scored.nll, baseline.nll).value,
    }


def _score(folder: Path, tokens: int, context: JobContext, within: Child, *, is_baseline: bool = False) -> LogitsResult:
    work, checkpoint = context.work / "sweep", context.checkpoint
    reference = work / f"{tokens}.f32"
    request = LogitsRequest(
        folder=folder,
        hugging_face=folder == checkpoint.path,
        trust_remote_code=context.job.trust_remote_code,
        text=work / "text.txt",
        tokens=tokens,
        context_length=checkpoint.context_length,
        references={} if is_baseline else {BASELINE_REFERENCE: reference},
        write=reference if is_baseline else None,
    )
    with locks.machine(context.settings):
        return in_child(logits_worker.handle, request, context.name, "trial.logits", context.settings, within=within)
