"""The fixed prompts of the speed measurement: the same task behind contexts of several lengths."""

from __future__ import annotations

TASK = "Count from one to fifty in words, one number a line."
_CONTEXT = (
    "The harbour master writes down each ship that comes in: its name, its flag, its cargo and the hour. "
    "On quiet days the book has one line, on others it has forty, and in the evening the pages go to the archive. "
)
# Sentences of context before the task; about 40 tokens a repetition.
_REPETITIONS = (0, 3, 12)


def speed_prompts() -> tuple[str, ...]:
    """About 40, 160 and 520 tokens with the chat template of the demo model."""
    return tuple((_CONTEXT * times + "\n\n" + TASK).strip() for times in _REPETITIONS)
