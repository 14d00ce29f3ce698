"""From a checkpoint's chat template to Foundry Local's PromptTemplate, proven equal by rendering.

A PromptTemplate has a string for each role, and one, ``prompt``, for the last question; ``{Content}`` stands for the
message. The strings are cut out of what the chat template renders, and then compared with it on whole conversations.
The chat template stays authoritative: whatever such strings cannot say is reported.

The runtime's tokenizer adds the BOS token. So a BOS that stands once, at the very beginning, is not part of a
PromptTemplate and is removed before comparing. One that comes again belongs to the messages and stays (SmolLM2's BOS is
``<|im_start|>``, with which each of its messages begins).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime

from pydantic import Field

from slmops.checkpoints.chat_template import ChatMessage, ChatTemplate, render
from slmops.core.errors import CheckpointError
from slmops.core.values import Frozen

PLACEHOLDER = "{Content}"
Shape = tuple[str, ...]  # the roles of a conversation
Renderings = dict[Shape, list[tuple[list[ChatMessage], str]]]

_TURNS: Shape = ("user", "assistant", "user", "assistant", "user")
_SHAPES: list[Shape] = [*(_TURNS[:n] for n in (1, 3, 5)), *(("system", *_TURNS[:n]) for n in (1, 3, 5))]
_MARKS = tuple(f"zq{letter}jx" for letter in "abcdef")  # letters only: trimming leaves them alone
_ODD = "one\n\ntwo\tthree {a} {{ b }} {% c %} <b>&amp;</b> \"q\" 'p' \\n %s ünï 東京 🙂 שלום {}"
_CONTENTS = (
    ("One text.", "Another?", "A third!", "Number four:", "five", "The sixth"),
    tuple(f"{number}{_ODD}" for number in range(6)),
)
# Contents that some templates change on purpose: the reason says so, but the strings are not at fault.
_SPECIAL_CONTENTS = {
    "contents with outer blanks": [f" \n{text}\n " for text in _CONTENTS[0]],
    "contents with <think> blocks": [f"<think>\nhm\n</think>\n\n{text}" for text in _CONTENTS[0]],
}
_KINDS: dict[str, Callable[[Shape], bool]] = {
    "all conversations": lambda _: True,
    "conversations without a system message": lambda shape: "system" not in shape,
    "conversations with a system message": lambda shape: "system" in shape,
    "conversations of several turns": lambda shape: "assistant" in shape,
    "conversations of several turns without a system message": lambda shape: shape in _SHAPES[1:3],
    "conversations with a system message or several turns": lambda shape: len(shape) > 1,
}


class Derived(Frozen):
    """A chat template as a PromptTemplate."""

    prompt_template: dict[str, str] | None = Field(
        description="String by role, without the roles that have no message of their own; None: none can be trusted."
    )
    exact: bool = Field(
        description="Equal for all conversations that the chat template accepts, apart from special contents (reason)."
    )
    reason: str | None = Field(description="What differs, is refused or is changed, and why; None: nothing.")


def fill(prompt_template: Mapping[str, str], messages: Sequence[ChatMessage]) -> str | None:
    """Render a conversation with a PromptTemplate: each message through the string of its role, the last question
    through ``prompt``. None if a role has no string.
    """
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    roles = ["prompt" if index == last else message["role"] for index, message in enumerate(messages)]
    if not prompt_template.keys() >= set(roles):
        return None
    pairs = zip(roles, messages, strict=True)
    return "".join(prompt_template[role].replace(PLACEHOLDER, message["content"]) for role, message in pairs)


def derive(template: ChatTemplate) -> Derived:
    """Derive the PromptTemplate and prove it.

    A chat template that refuses system messages (Gemma 2) is exact if all else is equal. One that folds them into a
    question (Mistral), or writes one of its own where there is none (SmolLM2), is not: its strings are right for the
    conversations that the reason does not name. If none is right, there are no strings.

    Raises:
        CheckpointError: The template is broken Jinja, or fails for a single question.
    """
    probe = _Probe(template, datetime.now())
    candidates = list(probe.candidates())
    if not candidates:
        return _derived(None, ["the chat template does not write the user's message once and unchanged"])
    wanted, refused = probe.render_shapes(*_CONTENTS)
    best = max(candidates, key=lambda strings: len(_equal(strings, wanted)))
    if best not in _Probe(template, datetime(2001, 2, 3, 4, 5, 6)).candidates():
        return _derived(None, ["the chat template writes the current date, which fixed strings cannot"])
    equal = _equal(best, wanted)
    causes: dict[str, tuple[str, list[Shape]]] = {}
    for shape in [shape for shape in wanted if shape not in equal]:
        cause, detail = _cause(best, wanted[shape])
        causes.setdefault(cause, (detail, []))[1].append(shape)
    parts = [f"{_kind(shapes, wanted)} {cause}{detail}" for cause, (detail, shapes) in causes.items()]
    if refused:
        why = "; ".join(dict.fromkeys(refused.values()))
        parts.append(f"the chat template refuses {_kind(refused, _SHAPES)} ({why})")
    for what, contents in _SPECIAL_CONTENTS.items():
        if not equal <= _equal(best, probe.render_shapes(contents)[0]):
            parts.append(f"the chat template changes {what}, PromptTemplate keeps them")
    return _derived(best if equal else None, parts, exact=equal == wanted.keys())


def _derived(strings: dict[str, str] | None, parts: Sequence[str], *, exact: bool = False) -> Derived:
    reason = "; ".join(parts)
    return Derived(prompt_template=strings, exact=exact, reason=f"{reason[0].upper()}{reason[1:]}." if reason else None)


class _Probe:
    """A chat template at one time, without its BOS."""

    def __init__(self, template: ChatTemplate, now: datetime) -> None:
        self._template, self._now, self._bos = template, now, ""
        bos = template.special_tokens.get("bos_token", "")
        texts = [self._render(_SHAPES[0], _MARKS)]
        with suppress(CheckpointError):
            texts.append(self._render(_SHAPES[1], _MARKS))
        if all(text.startswith(bos) and text.count(bos) == 1 for text in texts):
            self._bos = bos

    def _render(self, shape: Shape, contents: Sequence[str], add_generation_prompt: bool = True) -> str:
        messages = _conversation(shape, contents)
        return render(self._template, messages, add_generation_prompt, now=self._now).removeprefix(self._bos)

    def render_shapes(self, *contents: Sequence[str]) -> tuple[Renderings, dict[Shape, str]]:
        """Render each shape with each of the contents; also why the template refuses some of them."""
        renderings: Renderings = {}
        refused: dict[Shape, str] = {}
        for shape in _SHAPES:
            try:
                renderings[shape] = [(_conversation(shape, each), self._render(shape, each)) for each in contents]
            except CheckpointError as error:
                refused[shape] = str(error.__cause__)
        return renderings, refused

    def candidates(self) -> Iterator[dict[str, str]]:
        """Cut strings out of renderings: as if nothing stood before the first question, then as if something did."""
        if not (single := self._cut(("user",))):
            return
        before, after = single
        if not (turns := self._cut(("user", "assistant", "user"))):
            yield {"prompt": before + PLACEHOLDER + after}
            return
        _, to_answer, to_question, _ = turns
        question_end = self._end(("user",), to_answer)
        answer_end = self._end(("user", "assistant"), to_question)
        system = self._cut(("system", "user"))
        for start in dict.fromkeys((before, to_question.removeprefix(answer_end))):
            strings = {}
            if system and system[1].endswith(start):
                strings["system"] = system[0] + PLACEHOLDER + system[1].removesuffix(start)
            end = to_question.removesuffix(start) if to_question.endswith(start) else answer_end
            strings["user"] = start + PLACEHOLDER + question_end
            strings["assistant"] = to_answer.removeprefix(question_end) + PLACEHOLDER + end
            strings["prompt"] = start + PLACEHOLDER + after
            yield strings

    def _cut(self, shape: Shape, add_generation_prompt: bool = True) -> list[str] | None:
        """The text before, between and after the contents; None unless each stands there once and in order."""
        try:
            text = self._render(shape, _MARKS, add_generation_prompt)
        except CheckpointError:
            return None
        any_mark = "|".join(_MARKS)
        in_order = re.findall(any_mark, text) == list(_MARKS[: len(shape)])
        return re.split(any_mark, text) if in_order else None

    def _end(self, shape: Shape, following: str) -> str:
        """How the last message of ``shape`` ends, if ``following`` (the text up to the next one) begins with that."""
        tail = (self._cut(shape, add_generation_prompt=False) or [""])[-1]
        # Phi-3 writes EOS where no answer is to follow.
        ends = (tail, tail.removesuffix(self._template.special_tokens.get("eos_token", "")))
        return next((end for end in ends if following.startswith(end)), "")


def _conversation(shape: Shape, contents: Sequence[str]) -> list[ChatMessage]:
    return [{"role": role, "content": content} for role, content in zip(shape, contents, strict=False)]


def _equal(strings: Mapping[str, str], renderings: Renderings) -> set[Shape]:
    return {
        shape for shape, pairs in renderings.items() if all(fill(strings, messages) == text for messages, text in pairs)
    }


def _cause(strings: Mapping[str, str], pairs: Sequence[tuple[Sequence[ChatMessage], str]]) -> tuple[str, str]:
    filled = [(text, fill(strings, messages)) for messages, text in pairs]
    text, got = next((text, got) for text, got in filled if text != got)
    if got is None:
        return "cannot be said, because the chat template does not write each of their messages on its own", ""
    starts = {text.removesuffix(got) if got is not None and text.endswith(got) else None for text, got in filled}
    if len(starts) == 1 and (start := starts.pop()):
        return "differ, because the chat template starts them with ", json.dumps(start, ensure_ascii=False)
    at = next((at for at, pair in enumerate(zip(text, got, strict=False)) if len(set(pair)) > 1), len(got))
    theirs, ours = (json.dumps(each[max(at - 20, 0) : at + 30], ensure_ascii=False) for each in (text, got))
    return "differ: the chat template writes ", f"{theirs} where PromptTemplate writes {ours}"


def _kind(shapes: Collection[Shape], among: Collection[Shape]) -> str:
    for words, belongs in _KINDS.items():
        if set(shapes) == {shape for shape in among if belongs(shape)}:
            return words
    return f"conversations of {', '.join('-'.join(shape) for shape in shapes)}"
