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
NO_CALLS = (
    "The chat template knows tools, but the variants cannot call any: Foundry Local needs one pair of tokens, such as "
    "<tool_call> and </tool_call>, which the tokenizer has, and between which the chat template writes calls."
)
_NO_THOUGHTS = (
    "Thoughts stay part of the answers: Foundry Local needs one pair of tokens around them, such as <think> and "
    "</think>, and only one of tokenizer and chat template has it."
)
_VALUE = "zqcalljx"  # letters only: no escaping changes them
_FUNCTION = {"name": "zqtool", "description": "A tool.", "parameters": {"type": "object", "properties": {}}}
_TOOLS = [{"type": "function", "function": _FUNCTION}]


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
    tools, thoughts = _pair(tokens, _CALL), _pair(tokens, _THOUGHT)
    knows_tools = "tools" in re.findall(r"\w+", template.text)
    thinks = any(word in template.text for word in (*_THINKS, *([thoughts.closing] if thoughts else [])))
    if tools is not None and not (knows_tools and _writes(template, tools)):
        tools = None
    no_calls = [NO_CALLS] if knows_tools and tools is None else []
    no_thoughts = [_NO_THOUGHTS] if thinks != (thoughts is not None) else []
    return Abilities(tools=tools, reasoning=thoughts if thinks else None, remarks=(*no_calls, *no_thoughts))


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
    for given in ({"x": _VALUE}, json.dumps({"x": _VALUE})):  # templates differ in which they take
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "zqtool", "arguments": given}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        with suppress(CheckpointError):
            text = chat_template.render(template, messages, add_generation_prompt=False, tools=_TOOLS)
            before, value, after = text.partition(_VALUE)
            if value:
                return before.rfind(pair.opening) > before.rfind(pair.closing) and pair.closing in after
    return False
