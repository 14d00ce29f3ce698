"""Convert and register one variant; measure all of them."""

from __future__ import annotations

from slmops.conversion.convert import convert
from slmops.core.errors import SlmopsError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Recipe, Registration, Variant
from slmops.evaluation import quality, speed
from slmops.foundry.register import register
from tasks.stage import stage

# No retries: Olive, the runtime and the measurements fail the same way twice. The timeouts are those of the child
# processes, which are killed whole; a task's own timeout would leave them running.


@stage("convert {recipe.name}")
def convert_variant(recipe: Recipe, checkpoint: Checkpoint, job: Job, name: str, settings: Settings) -> Variant:
    """Olive conversion at one precision."""
    return convert(recipe, checkpoint, job, name, settings)


@stage("register {variant.recipe.name}")
def register_variant(variant: Variant, name: str, job: Job, settings: Settings) -> Registration:
    """Foundry Local registration, listing and one answered prompt."""
    return register(variant, name, job, settings)


@stage()
def measure_speed(
    made: list[tuple[Variant, Registration]], name: str, job: Job, settings: Settings
) -> dict[str, speed.Speed | SlmopsError]:
    """Speed and memory of all variants, in interleaved rounds, each turn in a fresh process."""
    return speed.measure(made, name, job, settings)


@stage()
def score_checkpoint(checkpoint: Checkpoint, name: str, job: Job, settings: Settings) -> tuple[float, ...] | None:
    """The checkpoint's own distributions, to tell conversion from quantization error."""
    return quality.score_checkpoint(checkpoint, name, job, settings)


@stage("measure quality of {variant.recipe.name}")
def measure_quality(
    variant: Variant, registration: Registration, name: str, job: Job, settings: Settings
) -> quality.Quality:
    """Distributions, answers and edge cases of one variant, each in a fresh process."""
    return quality.measure(variant, registration, name, job, settings)
