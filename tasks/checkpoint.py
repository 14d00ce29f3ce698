"""Get the checkpoint and decide how to convert it, before any work."""

from __future__ import annotations

import logging

from slmops.checkpoints import chat_template, source
from slmops.conversion import olive_config, recipes
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Recipe
from slmops.evaluation import dataset, matchers, quality
from slmops.foundry import prompt_template
from slmops.selection import policy
from slmops.selection.policy import Policy
from slmops.tracking.tracker import Tracker
from tasks.stage import stage

log = logging.getLogger("slmops.checkpoint")


@stage()
def get_checkpoint(job: Job, settings: Settings, tracker_uri: str) -> Checkpoint:
    """The checked checkpoint as a local folder."""
    return source.resolve(job, settings, download=Tracker(tracker_uri).download)


@stage()
def plan_job(job: Job, checkpoint: Checkpoint, name: str, settings: Settings) -> tuple[list[Recipe], Policy]:
    """The recipes of the job, each known to fit the checkpoint, and the policy of its choice.

    What else the job was given is looked at too: its evaluation set, matcher and text, the room on disk and in memory.
    """
    chosen_by = policy.load(job.policy)
    quality.load_questions(job, settings)
    if job.matcher is not None:
        matchers.load_function(job.matcher)  # fails here rather than after the conversions
    dataset.perplexity_text(job.perplexity_text)
    planned = recipes.for_job(job, checkpoint)
    source.check_room(checkpoint, [recipe.name for recipe in planned], settings, converts=not settings.pools)
    template = chat_template.load(checkpoint.path)
    if template is not None and (reason := prompt_template.derive(template).reason):
        log.info("PromptTemplate of inference_model.json: %s The Jinja template stays authoritative.", reason)
    if job.olive_config is not None:
        planned.append(olive_config.load(job.olive_config, checkpoint, name, settings))
    return planned, chosen_by
