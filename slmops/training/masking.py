"""Which tokens of a conversation are learned: those of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from slmops.checkpoints.chat_template import ChatMessage

IGNORED = -100
"""Label of a token that is not learned; torch's cross entropy ignores it."""

Render = Callable[[Sequence[ChatMessage], bool], str]
"""Turns messages into text; the flag adds the opening of an answer."""


def renderer(tokenizer: Any) -> Render:
    """The chat template of a transformers tokenizer, as a function."""
    return lambda said, opened: tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=opened)


def answer_spans(messages: Sequence[ChatMessage], render: Render) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation: its text, and start and end of each answer in characters.

    An answer starts behind the template's opening of the turn. It ends with the end of the turn, without the blanks
    behind the template's end marker. It is a ValueError if the template renders a turn differently once others follow.
    """
    text, spans = "", []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened, closed = render(messages[:place], True), render(messages[: place + 1], False)
        if not (opened.startswith(text) and closed.startswith(opened)):
            break
        text = closed
        spans.append((len(opened), len(closed.rstrip())))
    else:
        whole = render(messages, False)
        if whole.startswith(text):
            return whole, spans
    raise ValueError("the chat template renders a turn differently once others follow")


def labels(tokens: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The tokens that begin within a span, and :data:`IGNORED` in place of the others."""
    return [
        token if any(start <= at < end for start, end in spans) else IGNORED
        for token, (at, _) in zip(tokens, offsets, strict=True)
    ]
