"""Child process: how long conversations are for a checkpoint, and whether its chat template can be trained with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from slmops.core.errors import DataError
from slmops.core.values import Frozen
from slmops.processes import child
from slmops.training.examples import shown
from slmops.training.masking import Message, answers

BATCH = 1000


class Request(Frozen):
    """A checkpoint, and conversations: a JSON object with ``messages`` a line."""

    checkpoint: Path
    items: Path


class Result(Frozen):
    """What was found of each conversation, in order."""

    tokens: tuple[int, ...]
    refused: dict[int, str]


def handle(request: Request) -> Result:
    """Render and count.

    Raises:
        DataError: The checkpoint has no chat template.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request.checkpoint, local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise DataError(
            f"The checkpoint {request.checkpoint} has no chat template, so nothing says how a conversation is written.",
            "Put the chat_template.jinja of the model that it was made from into its folder.",
        )

    def render(messages: Sequence[Message], opened: bool) -> str:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opened)
        return text

    texts: list[str] = []
    refused: dict[int, str] = {}
    with request.items.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            messages = json.loads(line)["messages"]
            text = ""
            try:
                text, spans = answers(messages, render)
                said = [message["content"].strip() for message in messages if message["role"] == "assistant"]
                if any(answer not in text[start:end] for answer, (start, end) in zip(said, spans, strict=True)):
                    refused[number] = "the chat template leaves out an answer, or changes it"
            except Exception as error:  # a template raises what it likes
                refused[number] = f"the chat template cannot be trained with: {shown(str(error))}"
            texts.append(text)
    tokens: list[int] = []
    for first in range(0, len(texts), BATCH):
        encoded = tokenizer(texts[first : first + BATCH], add_special_tokens=False)["input_ids"]
        tokens.extend(len(one) for one in encoded)
    return Result(tokens=tuple(tokens), refused=refused)


if __name__ == "__main__":
    child.main(Request, handle)
