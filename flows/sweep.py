"""A bounded search over recipes and their options, each trial a tracked variant; it ends in the front and its knee."""

import logging
import math
import shutil
import time

from prefect import flow, runtime

from flows.optimize import remove_unfinished_work
from flows.running import aborted_on_error, named, plainly, turn
from slmops import preflight
from slmops.conversion import recipe_files, recipes, store
from slmops.conversion.convert import together
from slmops.conversion.recipe_files import RecipeFile
from slmops.core import machine
from slmops.core.errors import ConversionError, EvaluationError, RecipeError
from slmops.core.files import digest_of_json, write_atomic
from slmops.core.job import JobContext
from slmops.core.settings import Settings
from slmops.core.values import Recipe
from slmops.evaluation import dataset
from slmops.local import stack
from slmops.processes.children import Child
from slmops.selection import sweep as results
from slmops.selection.search import Search
from slmops.selection.sweep import Sweep, Swept, Trial
from slmops.tracking.sweeps import SweepTracker
from tasks import sweep as steps
from tasks.prepare import check_environment, get_checkpoint, plan_recipes
from tasks.variant import convert_variant

log = logging.getLogger("slmops.sweep")


@flow(name="sweep", flow_run_name=named("sweep {request.label}"), persist_result=False)
@plainly
def sweep(request: Sweep) -> Swept:
    """Try recipes and their options on one checkpoint, and find the best trades of size for KL divergence.

    A sweep that was ended goes on when the same one is started again; trials that came to an end are not repeated.

    Raises:
        SlmopsError: What went wrong. A trial that cannot be made or measured is one of the results.
    """
    settings, started = Settings(), time.monotonic()
    log.info("this run in Prefect: %s", runtime.flow_run.ui_url)
    job = preflight.check_sweep(request, settings)
    check_environment(settings)
    tracker = SweepTracker(stack.tracking_uri(settings))
    checkpoint = get_checkpoint(job, settings, tracker.uri)
    context = JobContext(job, request.name or checkpoint.name, checkpoint, settings, tracker.uri)
    with turn(settings.locks / f"run-{context.name}.lock", f"the job of {context.name!r}"):
        remove_unfinished_work(context)
        context, planned = plan_recipes(context)
        files = {one.name: recipe_files.load(one.name, settings) for one in planned if one.name in job.precision}
        choices = {name: recipes.choices(name, file, checkpoint) for name, file in files.items()}
        digest = _digest(files, choices, context)
        search = Search(f"{context.name} {digest}", choices, settings)
        run_id = steps.open_sweep(tracker, context.name, request, checkpoint, digest, runtime.flow_run.id or "")
        with aborted_on_error(lambda _: tracker.abort_job(run_id)):
            if len(search.trials) < request.trials:
                end = started + 60 * (request.minutes or math.inf)
                with together(context.name, settings) as converter, Child() as scorer:
                    bench = _Bench(planned, files, context, converter, scorer)
                    while len(search.trials) < request.trials and time.monotonic() < end and (trial := search.ask()):
                        ended = bench.attempt(trial, search.trials)
                        log.info("trial %d %s", ended.number, ended.ended)
                        steps.track_trial(tracker, run_id, ended, context.logs)
                        search.tell(ended)
                        _remove_beaten(search.trials)
            result = _result(search.trials, run_id, request, files, context)
            steps.close_sweep(tracker, result)
        steps.show_front(result, tracker.run_url(run_id))
        remove_unfinished_work(context)
    return result


class _Bench:
    """Makes trials and compares them with the baseline."""

    def __init__(
        self,
        planned: list[Recipe],
        files: dict[str, RecipeFile],
        context: JobContext,
        converter: Child,
        scorer: Child,
    ) -> None:
        """Make the baseline, unless that is the checkpoint itself, and score it."""
        self._files, self._context, self._converter, self._scorer = files, context, converter, scorer
        variant = next((convert_variant(one, context, converter) for one in planned if one.baseline), None)
        self._baseline = steps.score_baseline(variant, context, scorer)
        self._baseline_mb = variant.model_mb if variant else context.checkpoint.size_mb

    def attempt(self, trial: Trial, earlier: list[Trial]) -> Trial:
        """Convert and measure a trial, on the whole text only if no earlier one is far better on its first tokens."""
        log.info("trial %d: %s, %s", trial.number, trial.recipe, trial.text)
        context = self._context
        try:
            file = self._files[trial.recipe].with_options(trial.options)
            recipe = recipes.of_file(trial.variant, file, context.checkpoint)
            variant = convert_variant(recipe, context, self._converter)
            found = {"size_mb": variant.model_mb, "size_ratio": variant.model_mb / self._baseline_mb}
            found["first_kl"] = steps.score_first(variant, context, self._scorer)
            if why := results.why_hopeless(earlier, found):
                shutil.rmtree(variant.path)
                return trial.model_copy(update={"outcome": "stopped", "detail": why, "metrics": found})
            found |= steps.measure_trial(variant, self._baseline, context, self._scorer)
            return trial.model_copy(update={"outcome": "measured", "metrics": found, "path": variant.path})
        except (ConversionError, EvaluationError, RecipeError) as error:
            return trial.model_copy(update={"outcome": "failed", "detail": str(error)})


def _remove_beaten(trials: list[Trial]) -> None:
    """Remove the variants that are no longer on the front: their figures are kept, and so many take much disk."""
    best = results.front(trials)
    for one in trials:
        if one.path is not None and one not in best:
            shutil.rmtree(one.path, ignore_errors=True)


def _result(
    trials: list[Trial], run_id: str, request: Sweep, files: dict[str, RecipeFile], context: JobContext
) -> Swept:
    best = results.front(trials)
    knee, saved = results.knee(best), None
    if request.save is not None and knee is not None:
        saved = recipe_files.place_of(request.save, context.settings)
        when = f"Found by a sweep of {context.name}: {knee.ended}."
        file = files[knee.recipe].with_options(knee.options).model_copy(update={"when": when})
        write_atomic(saved, file.model_dump_json(indent=2, exclude_defaults=True))
    return Swept(
        model=context.name,
        run_id=run_id,
        trials=tuple(one if one in best else one.model_copy(update={"path": None}) for one in trials),
        front=tuple(one.number for one in best),
        knee=knee.number if knee else None,
        saved=saved,
    )


def _digest(files: dict[str, RecipeFile], choices: dict[str, dict[str, list[object]]], context: JobContext) -> str:
    """What makes two searches the same one."""
    inputs = {
        **store.made_with(machine.versions()),
        "recipes": {name: [[*file.passes.items()], file.bits, file.genai] for name, file in files.items()},
        "choices": choices,
        "checkpoint": context.checkpoint.digest,
        "baseline": context.job.baseline,
        "text": dataset.perplexity_text(context.job.perplexity_text)[1],
    }
    return digest_of_json(inputs)[:16]
