"""The main job: one checkpoint, converted at each precision, registered, measured, compared."""

import logging
import shutil
import time
from contextlib import ExitStack, closing

from prefect import flow, runtime

from flows.fan_out import fan_out, find_workers
from flows.running import ProgressBar, aborted_on_error, named, plainly, turn
from flows.variant import make_here
from slmops import preflight
from slmops.checkpoints import room
from slmops.cluster.parts import Measured, MeasuredPeer, figures, peer_figures
from slmops.core import blobs
from slmops.core.errors import GateError, SlmopsError, WorkError
from slmops.core.files import remove_scratch
from slmops.core.job import CHECKPOINT, PEER_PREFIX, Job, JobContext
from slmops.core.settings import Settings
from slmops.core.targets import target_of
from slmops.core.values import Comparison, Recipe, VariantResult
from slmops.evaluation import summary
from slmops.local import stack
from slmops.selection import policy as policies
from slmops.tracking.tracker import Tracker
from tasks import track as steps
from tasks.prepare import check_environment, get_checkpoint, plan_recipes
from tasks.stage import timed

log = logging.getLogger("slmops.optimize")


@flow(name="optimize", flow_run_name=named("optimize {job.label}"), persist_result=False)
@plainly
def optimize(job: Job) -> Comparison:
    """Convert, register, measure and compare one checkpoint; choose the variant to deploy.

    Raises:
        SlmopsError: What went wrong. If single variants failed, or no variant passes the gates, the error comes last
            and carries the comparison.
    """
    began, settings = time.monotonic(), Settings()
    log.info("this run in Prefect: %s", runtime.flow_run.ui_url)
    with ExitStack() as held:
        seconds = held.enter_context(timed())
        job = preflight.check(job, settings)
        check_environment(settings)
        tracking_uri = stack.tracking_uri(settings)
        peaks = held.enter_context(room.watched(settings))
        checkpoint = get_checkpoint(job, settings, tracking_uri)
        context = JobContext(job, job.name or checkpoint.name, checkpoint, settings, tracking_uri)
        held.enter_context(turn(settings.locks / f"run-{context.name}.lock", f"the job of {context.name!r}"))
        remove_unfinished_work(context)
        context, recipes = plan_recipes(context)
        context = steps.start_tracking(context, runtime.flow_run.id or "")
        with aborted_on_error(lambda _: Tracker(tracking_uri).abort_job(context.run_id)):
            comparison, url = _compare(recipes, context, peaks)
        steps.show_comparison(comparison, url)
        remove_unfinished_work(context)
        steps.track_seconds(context, seconds, time.monotonic() - began)

    error: SlmopsError
    if failed := comparison.failed:
        error = WorkError(f"{len(failed)} of {len(comparison.variants)} variants failed: {', '.join(failed)}.")
    elif len(comparison.chosen) < len(job.targets):
        without = [one for one in job.targets if one not in {target_of(chosen.name) for chosen in comparison.chosen}]
        said = f"No variant for {', '.join(without)} passes" if len(job.targets) > 1 else "No variant passes"
        error = GateError(f"{said} the policy's gates.", "The comparison says which gate refused which.")
    else:
        return comparison
    error.comparison = comparison
    raise error


def _compare(recipes: list[Recipe], context: JobContext, peaks: dict[str, float]) -> tuple[Comparison, str]:
    """Make and measure all variants, choose one, and log all of it; returns the address of its page in MLflow, too."""
    made, results, peers = _make(recipes, context)
    policy = policies.load(context.job.policy)
    targets, tracker = context.job.targets, Tracker(context.tracking_uri)
    measured = {target_of(one.name): one.run_id for one in reversed(results) if one.status == "ok"}
    champions = {target: steps.get_champion(tracker, context.name, measured.get(target)) for target in targets}
    baseline = _checkpoint_as_baseline(made, context)
    choices, judged = steps.choose_variants(targets, results, policy, champions, baseline)
    for place, one in enumerate(judged):
        # Without a choice for its target there was nothing to judge by, or nothing that passed.
        if one.accepted and (found := choices.get(target_of(one.name))) and found.variant is not None:
            judged[place] = steps.register_version(context, made[one.name], one)
    choice = choices.pop(targets[0])
    comparison = Comparison(
        model=context.name,
        run_id=context.run_id,
        choice=choice,
        other_choices=choices,
        variants=tuple(judged),
        baseline=baseline,
        room=context.room and context.room.model_copy(update=peaks),
        measured_earlier=next((one.earlier for one in made.values()), {}),
        peers=tuple(peers),
    )
    return comparison, steps.finish_tracking(context, comparison, policy)


def _checkpoint_as_baseline(made: dict[str, Measured], context: JobContext) -> VariantResult | None:
    scored = next((one.scored for one in made.values() if one.scored and one.scored.answers), None)
    if scored is None:
        return None
    figures = summary.of_checkpoint(context.checkpoint, scored)
    metrics = {name: figure.value for name, figure in figures.items()}
    return VariantResult(name=CHECKPOINT, status="ok", metrics=metrics, measurements=figures)


def _make(
    recipes: list[Recipe], context: JobContext
) -> tuple[dict[str, Measured], list[VariantResult], list[VariantResult]]:
    """Make and measure all variants here or on other machines; returns what was made, results, and those of peers."""
    tracker, progress = Tracker(context.tracking_uri), ProgressBar(context.name, steps=2 * len(recipes))
    workers = find_workers(context) if context.settings.pools else None
    outcomes = fan_out(workers, recipes, context, progress) if workers else make_here(recipes, context, progress)
    made: dict[str, Measured] = {}
    results: dict[str, VariantResult] = {}
    baseline: Measured | None = None
    with closing(outcomes):
        for name, outcome in outcomes:
            if isinstance(outcome, SlmopsError):
                kind = "peer" if name.startswith(PEER_PREFIX) else "variant"
                results[name] = steps.track_failure(tracker, context.run_id, name, str(outcome), context.logs, kind)
                continue
            if isinstance(outcome, MeasuredPeer):
                measured = peer_figures(outcome, baseline, context.checkpoint)
                results[name] = steps.track_peer(tracker, context.run_id, name, measured)
                continue
            if outcome.variant.recipe.baseline:
                baseline = outcome
            made[name] = outcome
            results[name] = _track(outcome, baseline, context, tracker)
    variants = [results.pop(recipe.name) for recipe in recipes]
    return made, variants, list(results.values())


def _track(one: Measured, baseline: Measured | None, context: JobContext, tracker: Tracker) -> VariantResult:
    """Make metrics of what was measured, and log them."""
    evaluation, left_out = figures(one, baseline)
    if left_out is not None:
        log.warning("%s: %s", one.variant.name, left_out)
    # A run's hardware says what its figures compare with: the machine that measured, whichever converted.
    variant = one.variant.model_copy(update={"hardware": one.hardware})
    result = steps.track_variant(
        tracker, context.run_id, context.name, variant, one.registration, evaluation, context.logs
    )
    return result.model_copy(update={"reason": left_out})


def remove_unfinished_work(context: JobContext) -> None:
    """Remove this run's, or what a killed run of this model left behind; the job's lock says that it is dead."""
    shutil.rmtree(context.work, ignore_errors=True)
    remove_scratch(context.settings.variants)
    blobs.prune(context.settings)
