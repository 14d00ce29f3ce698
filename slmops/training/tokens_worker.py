"""Child process: count the tokens of conversations, and check that the chat template can be trained with."""

from __future__ import annotations

import json
from pathlib import Path

from slmops.core.errors import DataError
from slmops.core.values import Frozen
from slmops.processes import child
from slmops.training.examples import shown
from slmops.training.masking import answer_spans, renderer


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
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request.checkpoint, local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise DataError(
            f"The checkpoint {request.checkpoint} has no chat template, which says how a conversation is written.",
            "Put the chat_template.jinja of the model that it was made from into its folder.",
        )
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


if __name__ == "__main__":
    child.main(TokensRequest, handle)
