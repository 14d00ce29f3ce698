"""The variants of a job made and measured in this process, one after the other."""

from flows.running import ProgressBar
from slmops.cluster.parts import Measured, Outcomes
from slmops.core import machine
from slmops.core.context import JobContext
from slmops.core.errors import SlmopsError
from slmops.core.values import Recipe, Registration, Variant
from tasks.variant import convert_variant, measure_quality, measure_speed, register_variant, score_checkpoint


def make_here(recipes: list[Recipe], context: JobContext, progress: ProgressBar) -> Outcomes:
    """Convert all, then measure them side by side; yield each recipe's outcome as it comes."""
    made: dict[str, tuple[Variant, Registration]] = {}
    for recipe in recipes:
        try:
            variant = convert_variant(recipe, context)
            made[recipe.name] = (variant, register_variant(variant, context))
        except SlmopsError as error:
            progress.step(2)  # one that is not made is not measured
            yield recipe.name, error
        else:
            progress.step()
    if not made:
        return
    speeds = measure_speed(list(made.values()), context)
    scored = score_checkpoint(context)
    hardware = machine.hardware()
    for variant, registration in made.values():
        outcome: Measured | SlmopsError
        speed = speeds[variant.name]
        try:
            if isinstance(speed, SlmopsError):
                raise speed
            outcome = Measured(
                variant=variant,
                registration=registration,
                speed=speed,
                quality=measure_quality(variant, registration, context),
                scored=scored,
                hardware=hardware,
            )
        except SlmopsError as error:
            outcome = error
        progress.step()
        yield variant.name, outcome
