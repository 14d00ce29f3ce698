"""The tokens of conversations: those of the answers are learned. As a child process it counts and checks them."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slmops.checkpoints.chat_template import ChatMessage
from slmops.core.errors import DataError
from slmops.core.values import Frozen
from slmops.training.examples import shown

IGNORED = -100  # label of a token that is not learned; torch's cross entropy ignores it

Render = Callable[[Sequence[ChatMessage], bool], str]
"""Turns messages into text; the flag adds the opening of an answer."""


class TokensRequest(Frozen):
    """A checkpoint, and conversations: each a JSON object with ``messages``."""

    checkpoint: Path
    items: tuple[str, ...]


class TokensResult(Frozen):
    """Tokens of each conversation in order, and why some are refused, by their number from 0."""

    tokens: tuple[int, ...]
    refused: dict[int, str]


def handle(request: TokensRequest) -> TokensResult:
    """Render and count; a DataError if the checkpoint has no chat template."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # no tokenizer needs it, and it takes two seconds
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request.checkpoint, local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        missing = f"The checkpoint {request.checkpoint} has no chat template, which says how a conversation is written."
        raise DataError(missing, "Put the chat_template.jinja of the model that it was made from into its folder.")
    render = renderer(tokenizer)
    tokens: list[int] = []
    refused: dict[int, str] = {}
    for number, item in enumerate(request.items):
        messages, text = json.loads(item)["messages"], ""
        try:
            text, spans = answer_spans(messages, render)
            said = [message["content"].strip() for message in messages if message["role"] == "assistant"]
            if any(answer not in text[start:end] for answer, (start, end) in zip(said, spans, strict=True)):
                refused[number] = "the chat template leaves out an answer, or changes it"
        except Exception as error:  # a template may raise any error
            refused[number] = f"the chat template cannot be trained with: {shown(str(error))}"
        tokens.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return TokensResult(tokens=tuple(tokens), refused=refused)


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
