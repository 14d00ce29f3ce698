"""From a checkpoint's chat template to Foundry Local's PromptTemplate, proven equal by rendering.

A PromptTemplate has a string for each role, and one, ``prompt``, for the last question; ``{Content}`` stands for the
message. The strings are cut out of what the chat template renders, and then compared with it on whole conversations.
The chat template stays authoritative.

A BOS that stands once, at the very beginning, is taken for the tokenizer's and removed before comparing. One that comes
again belongs to the messages and stays (SmolLM2's BOS is ``<|im_start|>``, with which each of its messages begins).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime

from slmops.checkpoints.chat_template import ChatMessage, ChatTemplate, render
from slmops.core.errors import CheckpointError

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


def derive(template: ChatTemplate) -> dict[str, str] | None:
    """The string of each role that has messages of its own; None if they are right for no conversation, or for one day.

    They cannot be right for all if the template folds system messages into a question (Mistral), or writes one of its
    own where there is none (SmolLM2). It is a CheckpointError if it is broken Jinja, or fails for a single question.
    """
    probe = _Probe(template, datetime.now())
    wanted = probe.render_shapes()
    best = max(probe.candidates(), key=lambda strings: _equal(strings, wanted), default=None)
    if best is None or best not in _Probe(template, datetime(2001, 2, 3, 4, 5, 6)).candidates():
        return None
    return best if _equal(best, wanted) else None


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

    def render_shapes(self) -> Renderings:
        """Conversations of each shape that the template accepts."""
        renderings: Renderings = {}
        for shape in _SHAPES:
            with suppress(CheckpointError):
                renderings[shape] = [(_conversation(shape, each), self._render(shape, each)) for each in _CONTENTS]
        return renderings

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


def _equal(strings: Mapping[str, str], renderings: Renderings) -> int:
    """For how many shapes the strings are right."""
    return sum(all(fill(strings, messages) == text for messages, text in pairs) for pairs in renderings.values())
