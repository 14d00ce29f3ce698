"""Convert and register one variant; measure all of them.

The timeouts are those of the child processes, which are killed whole; a task's own timeout would leave them running.
"""

from slmops.conversion.convert import convert
from slmops.core.errors import SlmopsError
from slmops.core.job import JobContext
from slmops.core.values import Recipe, Registration, Variant
from slmops.evaluation import quality, speed
from slmops.foundry.register import register
from tasks.stage import stage


@stage("convert {recipe.name}")
def convert_variant(recipe: Recipe, context: JobContext) -> Variant:
    return convert(recipe, context.checkpoint, context.job, context.name, context.settings)


@stage("register {variant.recipe.name}")
def register_variant(variant: Variant, context: JobContext) -> Registration:
    """Foundry Local registration, listing and one answered prompt."""
    return register(variant, context.name, context.job, context.settings)


@stage()
def measure_speed(
    made: list[tuple[Variant, Registration]], context: JobContext
) -> dict[str, speed.Speed | SlmopsError]:
    """Speed and memory of all variants, in interleaved rounds, each turn in a fresh process."""
    return speed.measure(made, context.name, context.job, context.settings)


@stage()
def score_checkpoint(context: JobContext) -> quality.Quality | None:
    """The checkpoint's own distributions, to tell conversion from quantization error, and answers as the baseline."""
    return quality.score_checkpoint(context.checkpoint, context.name, context.job, context.settings)


@stage("measure quality of {variant.recipe.name}")
def measure_quality(variant: Variant, registration: Registration, context: JobContext) -> quality.Quality:
    """Distributions, answers and edge cases of one variant, each in a fresh process."""
    return quality.measure(variant, registration, context.name, context.job, context.settings)
