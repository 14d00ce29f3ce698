"""Convert, register and measure variants, and send files of a job whose parts run on other machines through MLflow.

The timeouts are those of the child processes, which are killed whole; a task's own timeout would leave them running.
"""

from collections.abc import Sequence

from slmops.cluster import parts
from slmops.cluster.parts import Files, Part, PartResult
from slmops.conversion.convert import convert
from slmops.core.errors import SlmopsError
from slmops.core.job import JobContext
from slmops.core.values import Recipe, Registration, Variant
from slmops.evaluation import peers, quality, speed
from slmops.evaluation.speed import Peer
from slmops.foundry.register import register
from slmops.processes.children import Child
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


@stage("convert {recipe.name}")
def convert_variant(recipe: Recipe, context: JobContext, within: Child | None = None) -> Variant:
    return convert(recipe, context, within)


@stage("register {variant.recipe.name}")
def register_variant(variant: Variant, context: JobContext, within: Child | None = None) -> Registration:
    """Foundry Local registration, listing and one answered prompt."""
    return register(variant, context.name, context.job, context.settings, within)


make_gguf_files = stage()(peers.make_gguf_files)


@stage()
def measure_speed(
    made: list[tuple[Variant, Registration]], context: JobContext, peers: Sequence[Peer] = ()
) -> dict[str, speed.Speed | SlmopsError]:
    """Speed and memory of all variants and peers, in interleaved rounds, each turn in a fresh process."""
    return speed.measure(made, context.name, context.job, context.settings, peers)


score_checkpoint = stage()(quality.score_checkpoint)


@stage("measure quality of {variant.recipe.name}")
def measure_quality(variant: Variant, registration: Registration, context: JobContext) -> quality.Quality:
    """Distributions, answers and edge cases of one variant, each in a fresh process."""
    return quality.measure(variant, registration, context)


score_peer = stage("score {peer.name}")(quality.score_peer)


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
