"""A checkpoint's Jinja chat template: found, read and rendered as transformers does, without loading transformers."""

import json
from collections.abc import Mapping, Sequence
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

from slmops.checkpoints.reading import read_if_there, read_text
from slmops.core.errors import CheckpointError
from slmops.core.values import Frozen

ChatMessage = Mapping[str, Any]  # with role and content

_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate(Frozen):
    """A tokenizer's chat template and the special tokens that it may write."""

    path: Path = Field(description="The file that it came from.")
    text: str = Field(description="Jinja source.")
    special_tokens: dict[str, str] = Field({}, description="Such as {'bos_token': '<s>', 'eos_token': '</s>'}.")


def load(folder: Path, where: str | None = None) -> ChatTemplate | None:
    """Read the chat template of a checkpoint, if it has one.

    It is ``chat_template.jinja``, else the ``chat_template`` of ``tokenizer_config.json`` or ``chat_template.json``: a
    string, or several with names, of which "default" counts. If a file cannot be read, a CheckpointError calls the
    folder ``where``, by default its path.
    """
    config = read_if_there(folder, "tokenizer_config.json", where)
    tokens = read_if_there(folder, "special_tokens_map.json", where)
    path = folder / "chat_template.jinja"
    text = read_text(path, f"{where or folder}/{path.name}") if path.is_file() else None
    for name in ("tokenizer_config.json", "chat_template.json"):
        if text is None:
            path, text = folder / name, _default(read_if_there(folder, name, where).get("chat_template"))
    if text is None:
        return None
    named = {name: config.get(name) or tokens.get(name) for name in _TOKENS}
    plain = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    special_tokens = {name: token for name, token in plain.items() if token and isinstance(token, str)}
    return ChatTemplate(path=path, text=text, special_tokens=special_tokens)


def _default(templates: object) -> str | None:
    if isinstance(templates, list):
        templates = {each.get("name"): each.get("template") for each in templates if isinstance(each, dict)}
    if isinstance(templates, dict):
        templates = templates.get("default")
    return templates if isinstance(templates, str) and templates.strip() else None


def render(
    template: ChatTemplate,
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool = True,
    *,
    tools: Sequence[Any] | None = None,
    now: datetime | None = None,
) -> str:
    """Render a conversation in a sandbox; templates may write the date of ``now``, by default today's.

    A CheckpointError if the template is broken, tries what the sandbox forbids, or refuses these messages.
    """
    try:
        return _compile(template.text).render(
            messages=[dict(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda form: (now or datetime.now()).strftime(form),
            **template.special_tokens,
        )
    except Exception as error:  # a template is somebody else's program: it can raise anything
        line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise CheckpointError(
            f"{template.path}: the chat template fails{line}: {error}",
            "Correct it, or name another one with --chat-template.",
        ) from error


@lru_cache(maxsize=8)
def _compile(text: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, dict=_Dict(), namespace=_namespace)
    return environment.from_string(text)


class _Generation(Extension):
    """``{% generation %}``, by which training frameworks find the answers; rendering only has to accept it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """A namespace that refuses the names through which Python's internals are reached."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace takes no name like {name!r}")
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    namespace = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        namespace[name] = value
    return namespace


class _Dict:
    """What a template may do with ``dict``, without the type itself."""

    fromkeys = staticmethod(dict.fromkeys)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters, which a prompt must keep.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
