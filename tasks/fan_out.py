"""Files of a job whose parts run on other machines, on their way through MLflow."""

from slmops.cluster import parts
from slmops.cluster.parts import Files, Part, PartResult
from slmops.core.job import JobContext
from slmops.tracking.exchange import Exchange
from tasks.stage import stage

# On the machine of the job.
open_exchange = stage("open exchange", tracking=True)(Exchange.open)
close_exchange = stage("close exchange", tracking=True)(Exchange.close)
send_job = stage(tracking=True)(parts.send_job)
fetch_result = stage("fetch result of {part.id}", tracking=True)(parts.fetch_result)

# On either side.
send_variant = stage("send {variant.recipe.name}", tracking=True)(parts.send_variant)
fetch_variant = stage("fetch {key}", tracking=True)(parts.fetch_variant)

# On the machine of a part.
prepare_part = stage("prepare part", tracking=True)(parts.prepare)


@stage(tracking=True)
def send_references(context: JobContext, exchange: Exchange) -> Files:
    """The logits that the others are compared with, and what they get of the text and the questions."""
    return exchange.put({path.name: path for path in sorted((context.work / "logits").iterdir())})


@stage(tracking=True)
def leave_result(result: PartResult, part: Part, context: JobContext, exchange: Exchange) -> None:
    """Logs and result, the result last."""
    own = context.logs.glob("*.log")
    registered = (context.settings.logs / part.name).glob(f"{part.recipe.name}.register.log")
    logs = exchange.put({path.name: path for path in (*own, *registered)})
    exchange.leave(part.id, result.model_copy(update={"logs": logs}))
