"""What a checkpoint can do besides answering: call tools, and think before it answers.

Foundry Local's runtime finds a tool call, or a thought, between two tokens, and has to be told which. They are a pair
of the tokenizer's added tokens, known by their names, and the chat template must not contradict. What stays uncertain
is not claimed, and there is a remark about it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from slmops.checkpoints import chat_template
from slmops.checkpoints.chat_template import ChatTemplate
from slmops.checkpoints.generation import added_tokens
from slmops.core.errors import CheckpointError
from slmops.core.values import Frozen

_CALL, _THOUGHT = re.compile("tool.?call", re.IGNORECASE), re.compile("think|reasoning", re.IGNORECASE)
_THINKS = ("</think>", "reasoning_content", "enable_thinking")  # what only a template that knows of thoughts says
_VALUE = "zqcalljx"  # letters only: no escaping changes them
_TOOL = {"name": "zqtool", "description": "A tool.", "parameters": {"type": "object", "properties": {}}}


class Pair(Frozen):
    """The tokens that stand before and after something."""

    opening: str
    closing: str
    ids: tuple[int, int]


class Abilities(Frozen):
    """None: it cannot, or nobody can tell."""

    tools: Pair | None = None
    reasoning: Pair | None = None
    remarks: tuple[str, ...] = ()


def derive(folder: Path) -> Abilities:
    """What the chat template and the tokenizer of a checkpoint say; a CheckpointError if they cannot be read."""
    if (template := chat_template.load(folder)) is None:
        return Abilities()
    tokens = added_tokens(folder)
    names = set(re.findall(r"\w+", template.text))
    tools, thoughts, remarks = _pair(tokens, _CALL), _pair(tokens, _THOUGHT), []
    if "tools" not in names:
        tools = None
    elif tools is None:
        remarks.append(
            "The chat template knows tools, but the tokenizer does not have one pair of tokens that open and close a "
            "tool call, which Foundry Local needs: the variants cannot call tools."
        )
    elif not _writes(template, tools):
        remarks.append(
            f"The chat template does not write a tool call between {tools.opening} and {tools.closing}: the variants "
            "cannot call tools."
        )
        tools = None
    thinks = any(word in template.text for word in (*_THINKS, *([thoughts.closing] if thoughts else [])))
    if thinks and thoughts is None:
        remarks.append(
            "The chat template knows thoughts, but the tokenizer does not have one pair of tokens that open and close "
            "them: they stay part of the answers."
        )
    elif thoughts is not None and not thinks:
        remarks.append(
            f"The tokenizer has {thoughts.opening} and {thoughts.closing}, but the chat template does not know them: "
            "thoughts would stay part of the answers."
        )
    return Abilities(tools=tools, reasoning=thoughts if thinks else None, remarks=tuple(remarks))


def _pair(tokens: Mapping[str, int], named: re.Pattern[str]) -> Pair | None:
    """The only pair of tokens with such a name."""
    found = [
        Pair(opening=one, closing=other, ids=(tokens[one], tokens[other]))
        for one in tokens
        if named.search(one)
        for other in _closings(one)
        if other in tokens
    ]
    return found[0] if len(found) == 1 else None


def _closings(opening: str) -> Iterator[str]:
    """``</x>`` and ``[/x]``; ``<|/x|>``; ``<|x_end|>`` for ``<|x_begin|>`` and ``<|x_start|>``."""
    yield f"{opening[0]}/{opening[1:]}"
    if opening.startswith("<|"):
        yield f"<|/{opening[2:]}"
    if (ended := re.sub("begin|start", "end", opening)) != opening:
        yield ended


def _writes(template: ChatTemplate, pair: Pair) -> bool:
    """Whether a call that the template writes stands between the two; it need not write calls at all."""
    if "tool_calls" not in template.text:
        return True
    tools = [{"type": "function", "function": _TOOL}]
    arguments = {"x": _VALUE}
    for given in (arguments, json.dumps(arguments)):  # templates differ in which they take
        call = {"type": "function", "id": "abcdefghi", "function": {"name": _TOOL["name"], "arguments": given}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        with suppress(CheckpointError):
            text = chat_template.render(template, messages, add_generation_prompt=False, tools=tools)
            before, value, after = text.partition(_VALUE)
            if value:
                return before.rfind(pair.opening) > before.rfind(pair.closing) and pair.closing in after
    return False
