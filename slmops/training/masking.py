"""Which tokens of a conversation are learnt: those of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

IGNORED = -100
Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether an answer is to follow, to text."""


def answers(messages: Sequence[Message], render: Render) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where in it the answers lie: from the first character behind the template's
    opening of the turn to the end of the turn, blanks behind its marker left out.

    Raises:
        ValueError: Where that is cannot be told, as the template renders a turn differently once others follow.
    """
    text, spans = "", []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened, closed = render(messages[:place], True), render(messages[: place + 1], False)
        if not (opened.startswith(text) and closed.startswith(opened)):
            raise ValueError("the chat template renders a turn differently once others follow")
        text = closed
        spans.append((len(opened), len(closed.rstrip())))
    whole = render(messages, False)
    if not whole.startswith(text):
        raise ValueError("the chat template renders a turn differently once others follow")
    return whole, spans


def labels(tokens: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The tokens that begin within a span, and :data:`IGNORED` for all others."""
    return [
        token if any(start <= at < end for start, end in spans) else IGNORED
        for token, (at, _) in zip(tokens, offsets, strict=True)
    ]
