"""Before any work: is everything there, what is the checkpoint, and how is it to be converted?"""

import logging
from dataclasses import replace
from functools import partial

from slmops.checkpoints import abilities, generation, room, source
from slmops.conversion import olive_config, recipes
from slmops.core.errors import UsageError
from slmops.core.job import Job, JobContext
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Recipe
from slmops.evaluation import dataset, gguf_worker
from slmops.foundry import agreement
from slmops.local import doctor
from slmops.tracking.tracker import Tracker
from tasks.stage import stage

log = logging.getLogger("slmops.checkpoint")

check_everything = stage("check everything")(doctor.check)
install_tested_packages = stage("install tested packages")(doctor.fix)
build_onnxruntime_genai = stage("build onnxruntime genai")(doctor.build_genai)


@stage()
def check_environment(settings: Settings) -> None:
    """All checks of ``slmops doctor`` that take no time; it is a PrerequisiteError if one fails."""
    doctor.require(doctor.check(settings, imports=False))


@stage()
def get_checkpoint(job: Job, settings: Settings, tracking_uri: str) -> Checkpoint:
    """The checked checkpoint as a local folder, with a chat template that Foundry Local renders rightly."""
    agree = partial(agreement.agree, job=job, settings=settings)
    return source.resolve(job, settings, download=Tracker(tracking_uri).download, agree=agree)


@stage()
def plan_recipes(context: JobContext) -> tuple[JobContext, list[Recipe]]:
    """The job with its baseline, and its recipes, each known to fit the checkpoint, the disk and the memory."""
    checkpoint, settings = context.checkpoint, context.settings
    if context.job.peer:
        gguf_worker.check(checkpoint.path)
    able = abilities.derive(checkpoint.path)
    asked = dataset.load(context.job.evaluation_set, matcher=context.job.matcher, judge=settings.judge_configured)
    if able.tools is None and any(item.tools for item in asked.items):
        problem = "The evaluation set has items with tools, which the variants of this checkpoint cannot call."
        unknown = "Its chat template knows no tools."
        raise UsageError(problem, abilities.NO_CALLS if abilities.NO_CALLS in able.remarks else unknown)
    job = room.with_baseline(context.job, checkpoint, settings)
    planned = recipes.for_job(job, checkpoint, settings)
    needed = room.check(planned, checkpoint, job, settings, converts=not settings.pools)
    for file, recipe in recipes.own(planned, settings):
        olive_config.check(file, recipe.config, checkpoint, context.name, settings)
    for remark in (*generation.remarks(checkpoint.path), *able.remarks):
        log.warning("%s", remark)
    if job.olive_config is not None:
        planned.append(olive_config.load(job.olive_config, checkpoint, context.name, settings))
    return replace(context, job=job, room=needed), planned
