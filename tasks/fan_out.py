"""Files of a job whose parts run on other machines, on their way through MLflow."""

from __future__ import annotations

from pathlib import Path

from slmops.cluster import parts
from slmops.cluster.parts import Files, Part, PartResult, SentJob
from slmops.core.context import JobContext
from slmops.core.settings import Settings
from slmops.core.values import Recipe, Variant
from slmops.tracking.exchange import Exchange
from tasks.stage import stage

# --- on the machine of the job


@stage(tracking=True)
def open_exchange(context: JobContext) -> tuple[Exchange, list[str]]:
    """A place for the files of the job; what killed jobs left in theirs is deleted.

    Returns:
        The place, and the MLflow run ids of those of the killed jobs.
    """
    return Exchange.open(context.tracking_uri, context.run_id, context.settings)


@stage(tracking=True)
def close_exchange(exchange: Exchange) -> None:
    """Delete the place with all its files."""
    exchange.close()


@stage(tracking=True)
def send_job(context: JobContext, exchange: Exchange) -> SentJob:
    """The checkpoint and the user's files, for all parts."""
    return parts.send_job(context, exchange)


@stage("fetch result of {part.id}", tracking=True)
def fetch_result(part: Part, exchange: Exchange, logs: Path) -> PartResult | None:
    """What a part has left, with its logs; None: it was lost before it left anything."""
    return parts.fetch_result(part, exchange, logs)


# --- on either side


@stage("send {variant.recipe.name}", tracking=True)
def send_variant(variant: Variant, exchange: Exchange) -> Files:
    """A converted variant, for whoever measures or deploys it."""
    return parts.send_variant(variant, exchange)


@stage("fetch {key}", tracking=True)
def fetch_variant(key: str, files: Files, exchange: Exchange, settings: Settings) -> Variant:
    """A variant that was converted elsewhere."""
    return parts.fetch_variant(key, files, exchange, settings)


# --- on the machine of a part


@stage(tracking=True)
def prepare_part(part: Part, exchange: Exchange, settings: Settings) -> tuple[JobContext, Recipe]:
    """All that the part needs, fetched and checked."""
    return parts.prepare(part, exchange, settings)


@stage(tracking=True)
def send_references(context: JobContext, exchange: Exchange) -> Files:
    """The logits that the others are compared with."""
    return exchange.put({path.name: path for path in sorted((context.work / "logits").glob("*.npy"))})


@stage(tracking=True)
def leave_result(result: PartResult, part: Part, context: JobContext, exchange: Exchange) -> None:
    """Logs and result, the result last."""
    logs = parts.send_logs(part, context, exchange)
    exchange.leave(part.id, result.model_copy(update={"logs": logs}))
