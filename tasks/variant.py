"""Convert, register and measure one variant."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from slmops.conversion.convert import convert
from slmops.evaluation.evaluate import evaluate
from slmops.foundry.register import register
from slmops.job import Job
from slmops.models import Checkpoint, Evaluation, Recipe, Registration, Variant
from slmops.settings import Settings

# No retries: Olive, the runtime and the measurements fail the same way twice. The timeouts are those of the child
# processes, which are killed whole; a task's own timeout would leave them running.


@task(name="convert", task_run_name="convert {recipe.name}", cache_policy=NO_CACHE)
def convert_variant(recipe: Recipe, checkpoint: Checkpoint, job: Job, name: str, settings: Settings) -> Variant:
    """Olive conversion at one precision."""
    return convert(recipe, checkpoint, job, name, settings)


@task(name="register", task_run_name="register {variant.recipe.name}", cache_policy=NO_CACHE)
def register_variant(variant: Variant, name: str, job: Job, settings: Settings) -> Registration:
    """Foundry Local registration, listing and one answered prompt."""
    return register(variant, name, job, settings)


@task(name="evaluate", task_run_name="evaluate {variant.recipe.name}", cache_policy=NO_CACHE)
def evaluate_variant(
    variant: Variant, registration: Registration, name: str, job: Job, settings: Settings
) -> Evaluation:
    """Speed, memory and quality, each in a fresh process."""
    return evaluate(variant, registration, name, job, settings)
