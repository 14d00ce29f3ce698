"""From a checkpoint's Jinja chat template to Foundry Local's PromptTemplate, proven equal by rendering.

A PromptTemplate has a string for each role and one, ``prompt``, for the last question, each with ``{Content}``. It is
cut out of what the chat template renders and then compared with it on whole conversations. The chat template stays
authoritative: what such strings cannot say is reported.

A BOS token that stands once, at the very beginning, is no part of a PromptTemplate, since the runtime's tokenizer adds
it: one leading BOS is taken off before comparing. One that comes back further on belongs to the messages and stays
(SmolLM2's BOS is ``<|im_start|>``, with which each of its messages begins).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from pydantic import Field

from slmops.core.errors import CheckpointError
from slmops.core.values import Frozen

PLACEHOLDER = "{Content}"
ChatMessage = Mapping[str, str]
Shape = tuple[str, ...]  # the roles of a conversation
Renderings = dict[Shape, list[tuple[list[ChatMessage], str]]]

_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TURNS: Shape = ("user", "assistant", "user", "assistant", "user")
_SHAPES: list[Shape] = [*(_TURNS[:n] for n in (1, 3, 5)), *(("system", *_TURNS[:n]) for n in (1, 3, 5))]
_MARKS = tuple(f"zq{letter}jx" for letter in "abcdef")  # letters only: trimming leaves them alone
_ODD = "one\n\ntwo\tthree {a} {{ b }} {% c %} <b>&amp;</b> \"q\" 'p' \\n %s ünï 東京 🙂 שלום {}"
_CONTENTS = (
    ("One text.", "Another?", "A third!", "Number four:", "five", "The sixth"),
    tuple(f"{number}{_ODD}" for number in range(6)),
)
# Contents that some templates change on purpose: said in the reason, but no fault of the strings.
_SPECIAL_CONTENTS = {
    "contents with outer blanks": [f" \n{text}\n " for text in _CONTENTS[0]],
    "contents with <think> blocks": [f"<think>\nhm\n</think>\n\n{text}" for text in _CONTENTS[0]],
}
_ANOTHER_DAY = datetime(2001, 2, 3, 4, 5, 6)  # what differs from today's rendering was made from the clock
_KINDS: dict[str, Callable[[Shape], bool]] = {
    "all conversations": lambda _: True,
    "conversations without a system message": lambda shape: "system" not in shape,
    "conversations with a system message": lambda shape: "system" in shape,
    "conversations of several turns": lambda shape: "assistant" in shape,
    "conversations of several turns without a system message": lambda shape: shape in _SHAPES[1:3],
    "conversations with a system message or several turns": lambda shape: len(shape) > 1,
}


class ChatTemplate(Frozen):
    """A tokenizer's chat template and the special tokens that it may write."""

    path: Path = Field(description="The file that it came from.")
    text: str = Field(description="Jinja source.")
    special_tokens: dict[str, str] = Field({}, description="As {'bos_token': '<s>', 'eos_token': '</s>'}.")


def load(folder: Path) -> ChatTemplate | None:
    """Read the chat template of a checkpoint: ``chat_template.jinja``, else the ``chat_template`` of
    ``tokenizer_config.json`` or ``chat_template.json``, a string or several with names, of which "default" counts.

    Returns:
        None if there is no chat template.

    Raises:
        CheckpointError: A file cannot be read.
    """
    config, token_map = (_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    path = folder / "chat_template.jinja"
    text = _read(path)
    for name in ("tokenizer_config.json", "chat_template.json"):
        if text is None:
            path = folder / name
            text = _default(_json(path).get("chat_template"))
    if text is None:
        return None
    tokens = {name: config.get(name) or token_map.get(name) for name in _TOKENS}
    plain = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    special_tokens = {name: token for name, token in plain.items() if token and isinstance(token, str)}
    return ChatTemplate(path=path, text=text, special_tokens=special_tokens)


def render(
    template: ChatTemplate,
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool = True,
    *,
    now: datetime | None = None,
) -> str:
    """Render a conversation as transformers does, in a sandbox.

    Args:
        template: The chat template.
        messages: Each with ``role`` and ``content``.
        add_generation_prompt: End with the beginning of an answer.
        now: What a template that writes the date takes for it; the clock by default.

    Raises:
        CheckpointError: The template is broken, tries what the sandbox forbids, or refuses these messages.
    """
    try:
        return _compile(template.text).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda form: (now or datetime.now()).strftime(form),
            **template.special_tokens,
        )
    except Exception as error:  # a template is a program of somebody else's: it can raise anything
        line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise CheckpointError(
            f"{template.path}: the chat template fails{line}: {error}",
            "Correct it, or name another one with --chat-template.",
        ) from error


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path) or "{}")
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _default(templates: object) -> str | None:
    if isinstance(templates, list):
        templates = {each.get("name"): each.get("template") for each in templates if isinstance(each, dict)}
    if isinstance(templates, dict):
        templates = templates.get("default")
    return templates if isinstance(templates, str) else None


class _Generation(Extension):
    """``{% generation %}``, with which training frameworks find the answers; here it only has to be accepted."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """A namespace that cannot be given the names through which Python's internals are reached."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace takes no name like {name!r}")
        super().__setitem__(name, value)


class _Dict:
    """What ``dict`` can do for a template, without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    namespace = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        namespace[name] = value
    return namespace


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes HTML characters, which a prompt must keep.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


@lru_cache(maxsize=8)
def _compile(text: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, dict=_Dict(), namespace=_namespace)
    return environment.from_string(text)


class Derived(Frozen):
    """What a chat template is as a PromptTemplate."""

    prompt_template: dict[str, str] | None = Field(
        description="String by role, less the roles that have no message of their own; None: none can be trusted."
    )
    exact: bool = Field(
        description="Equal for all conversations that the chat template accepts, but for special contents (reason)."
    )
    reason: str | None = Field(description="What differs, is refused or changed, and why; None: nothing.")


def fill(prompt_template: Mapping[str, str], messages: Sequence[ChatMessage]) -> str | None:
    """Render a conversation with a PromptTemplate: each message through its role's string, the last question
    through ``prompt``. None if a role has no string.
    """
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    roles = ["prompt" if index == last else message["role"] for index, message in enumerate(messages)]
    if not prompt_template.keys() >= set(roles):
        return None
    pairs = zip(roles, messages, strict=True)
    return "".join(prompt_template[role].replace(PLACEHOLDER, message["content"]) for role, message in pairs)


def derive(template: ChatTemplate) -> Derived:
    """Derive the PromptTemplate and prove it on conversations of one to three questions, with and without a system
    message, with plain and with odd characters.

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
    if best not in _Probe(template, _ANOTHER_DAY).candidates():
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


class _Probe:
    """A chat template on one day, without its BOS."""

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
        """Render each shape with each of the contents; also what the template says of the shapes it refuses."""
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
        """What closes the last message of ``shape``: a beginning of what stands before a following one."""
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
        return "differ, because the chat template starts them with ", _quoted(start)
    at = next((at for at, pair in enumerate(zip(text, got, strict=False)) if len(set(pair)) > 1), len(got))
    theirs, ours = (_quoted(each[max(at - 20, 0) : at + 30]) for each in (text, got))
    return "differ: the chat template writes ", f"{theirs} where PromptTemplate writes {ours}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _kind(shapes: Collection[Shape], among: Collection[Shape]) -> str:
    for words, belongs in _KINDS.items():
        if set(shapes) == {shape for shape in among if belongs(shape)}:
            return words
    return f"conversations of {', '.join('-'.join(shape) for shape in shapes)}"


def _derived(strings: dict[str, str] | None, parts: Sequence[str], *, exact: bool = False) -> Derived:
    reason = "; ".join(parts)
    return Derived(prompt_template=strings, exact=exact, reason=f"{reason[0].upper()}{reason[1:]}." if reason else None)
