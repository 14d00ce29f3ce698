"""What one machine does: all variants of a job, or one part of a job that fans out."""

from collections.abc import Mapping
from dataclasses import replace

from prefect import flow
from pydantic import Json

from flows.running import ProgressBar, plainly
from slmops.checkpoints import room
from slmops.cluster import parts
from slmops.cluster.parts import Failure, Figures, Measured, MeasuredPeer, Outcomes, Part, PartResult
from slmops.conversion.convert import in_order, together
from slmops.core import blobs, machine
from slmops.core.errors import SlmopsError, TrackingError
from slmops.core.job import JobContext
from slmops.core.settings import Settings
from slmops.core.values import Recipe, Registration, Variant
from slmops.evaluation.earlier import Earlier
from slmops.evaluation.peers import NAMES as PEERS
from slmops.evaluation.quality import Quality
from slmops.evaluation.speed import Peer, Speed
from slmops.local import stack
from slmops.processes.children import Child
from slmops.tracking.exchange import Exchange
from tasks import variant as steps


def make_here(recipes: list[Recipe], context: JobContext, progress: ProgressBar) -> Outcomes:
    """Convert all, then measure them side by side; yield each recipe's outcome as it comes."""
    converted: list[Variant] = []
    with together(context.name, context.settings) as child:
        for recipe in in_order(recipes):
            try:
                converted.append(steps.convert_variant(recipe, context, child))
            except SlmopsError as error:
                progress.step(2)  # one that is not made is not measured
                yield recipe.name, error
    made: dict[str, tuple[Variant, Registration]] = {}
    with Child() as child:
        for variant in converted:
            try:
                made[variant.name] = (variant, steps.register_variant(variant, context, child))
            except SlmopsError as error:
                progress.step(2)
                yield variant.name, error
            else:
                progress.step()
    if not made:
        return
    peers: list[Peer] = []
    if context.job.peer:
        try:
            peers = steps.make_gguf_files(context)
        except SlmopsError as error:
            yield from ((name, error) for name in PEERS)
    earlier = Earlier(list(made.values()), context.job, context.settings)
    here = [(variant, registration) for variant, registration in made.values() if not registration.not_run]
    speeds: Mapping[str, Speed | SlmopsError]
    if known := earlier.speeds():
        speeds = known.variants
    else:
        speeds = steps.measure_speed(here, context, peers) if here or peers else {}
        earlier.keep_speeds(speeds)
    scores = earlier.qualities()
    scored = scores.checkpoint if scores else steps.score_checkpoint(context)
    taken_over = {what: one.measured for what, one in (("speed", known), ("quality", scores)) if one}
    qualities: dict[str, Quality] = {}
    for variant, registration in made.values():
        outcome: Measured | SlmopsError
        speed = speeds.get(variant.name)
        try:
            if isinstance(speed, SlmopsError):
                raise speed
            quality = scores.variants[variant.name] if scores else steps.measure_quality(variant, registration, context)
            outcome = Measured(
                variant=variant,
                registration=registration,
                speed=speed,
                quality=quality,
                scored=scored,
                hardware=machine.hardware(),
                earlier=taken_over,
            )
            qualities[variant.name] = quality
        except SlmopsError as error:
            outcome = error
        progress.step()
        yield variant.name, outcome
    for peer in peers:
        yield peer.name, _measure_peer(peer, speeds[peer.name], scored, context)
    if not scores:
        earlier.keep_qualities(qualities, scored)


def _measure_peer(
    peer: Peer, speed: Speed | SlmopsError, scored: Quality | None, context: JobContext
) -> MeasuredPeer | SlmopsError:
    try:
        if isinstance(speed, SlmopsError):
            raise speed
        return MeasuredPeer(
            size_mb=peer.file.stat().st_size / 1e6,
            speed=speed,
            quality=steps.score_peer(peer, context),
            scored=scored,
            hardware=machine.hardware(),
        )
    except SlmopsError as error:
        return error


@flow(name="variant", persist_result=False)
@plainly
def variant(part: Json[Part]) -> None:
    """Do one part of a job, and leave the result where the job fetches it.

    The part comes as text: on PostgreSQL, Prefect keeps parameters in a form that forgets the order of keys, and the
    passes of a recipe have one.

    A part whose work fails leaves the error as its result; one that ends without a result is done again elsewhere.

    Raises:
        SlmopsError: What the work failed at, or why there is no result.
    """
    settings = Settings()
    exchange = Exchange(stack.tracking_uri(settings), part.exchange, settings)
    try:
        _do(part, exchange, settings)
    finally:
        parts.clear(part, settings)


def _do(part: Part, exchange: Exchange, settings: Settings) -> None:
    blobs.prune(settings)
    context, recipe = steps.prepare_part(part, exchange, settings)
    try:
        result = _convert(recipe, context, exchange) if part.stage == "convert" else _measure(part, context, exchange)
    except TrackingError:
        raise  # the work is not at fault
    except SlmopsError as error:
        steps.leave_result(PartResult(failure=Failure.of(error)), part, context, exchange)
        raise
    steps.leave_result(result, part, context, exchange)


def _convert(recipe: Recipe, context: JobContext, exchange: Exchange) -> PartResult:
    room.check([recipe], context.checkpoint, context.job, context.settings)
    made = steps.convert_variant(recipe, context)
    return PartResult(key=made.key, variant=steps.send_variant(made, exchange))


def _measure(part: Part, context: JobContext, exchange: Exchange) -> PartResult:
    made = steps.fetch_variant(part.key or "", part.variant, exchange, context.settings)
    registration = steps.register_variant(made, replace(context, name=part.name))
    speed = steps.measure_speed([(made, registration)], context)[made.name]
    if isinstance(speed, SlmopsError):
        raise speed
    baseline = part.recipe.baseline
    scored = steps.score_checkpoint(context) if baseline else None
    quality = steps.measure_quality(made, registration, context)
    figures = Figures(speed=speed, quality=quality, scored=scored, hardware=machine.hardware())
    return PartResult(figures=figures, references=steps.send_references(context, exchange) if baseline else ())
