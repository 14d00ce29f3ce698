"""Chat templates and tokenizers in the words that Foundry Local's runtime reads as transformers does.

transformers renders with ``trim_blocks`` and ``lstrip_blocks``, the runtime without. To the runtime ``tools`` and
``documents`` are undefined, ``'x' in text`` is always false, ``'\\u00e9'`` is no escape, and ``replace`` and ``first``
are unknown. So the blanks that count are written out here, and the rest is said otherwise. Whether that is enough
has to be found out by rendering, and by reading texts.
"""

import json
from typing import Any

from jinja2 import Environment

from slmops.checkpoints.chat_template import ChatTemplate

_LEXER = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701 - it only reads
_ENDS = {"variable_begin": ("{{", "}}"), "block_begin": ("{%", "%}")}
_BEFORE = {"", "if", "elif", "and", "or", "not", "else", "=", "(", "[", ",", ":"}
_AFTER = {"and", "or", "else", "if", ")", "]", "}", ",", ":"}
_KEYWORDS = {"if", "elif", "else", "and", "or", "not", "in", "is", "for", "set"}
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_TOOLS_AS_GIVEN = "{# tools|tojson #}"
"""The runtime reshapes tools for templates in which this text is nowhere."""
_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_BLANKS = {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "pre_tokenizer": _SPLIT}
"""Blanks as Gemma's tokenizer has them, which the runtime reads right."""

Token = tuple[str, str]  # Jinja's kind of token, and its text


def rewrite_template(template: ChatTemplate) -> str:
    """The same template, as far as we know, for both."""
    parts, inner, ends = [], list[Token](), ("", "")
    defined = {"tools": "none", "documents": "none"}
    defined |= {name: _quoted(token) for name, token in template.special_tokens.items()}
    for _, kind, value in _LEXER.lex(template.text):
        if kind == "data":
            plain = value == value.strip() and not any(mark in value for mark in ("{{", "{%", "{#"))
            parts.append(value if plain else f"{{{{ {_quoted(value)} }}}}")
        elif kind in _ENDS:
            inner, ends = [], _ENDS[kind]
        elif kind in ("variable_end", "block_end"):
            parts.append(f"{ends[0]} {_expression(inner).strip()} {ends[1]}")
        elif not kind.startswith(("comment", "raw")):
            inner.append((kind, _quoted(_unquoted(value)) if kind == "string" else value))
    used = names(template.text)
    sets = [
        f"{{% if {name} is not defined %}}{{% set {name} = {value} %}}{{% endif %}}"
        for name, value in defined.items()
        if name in used
    ]
    return (_TOOLS_AS_GIVEN if "tools" in used else "") + "".join([*sets, *parts])


def names(text: str) -> set[str]:
    """All names in a template's tags."""
    return {value for _, kind, value in _LEXER.lex(text) if kind == "name"}


def constants(text: str) -> list[str]:
    """All texts that a template compares with, looks for or writes, each once."""
    strings = [_unquoted(value) for _, kind, value in _LEXER.lex(text) if kind == "string"]
    return list(dict.fromkeys(string for string in strings if string))


def _quoted(text: str) -> str:
    for character, escape in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escape)
    return f"'{text}'"


def _unquoted(literal: str) -> str:
    return literal[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")  # as Jinja does


def _expression(tokens: list[Token]) -> str:
    """What stands in a tag, in words that both have: ``'x' in y`` of a text, ``.replace``, ``|replace``, ``|first``."""
    text, at, before = "", 0, ""
    while at < len(tokens):
        value, end = _operand(tokens, at)
        if tokens[at][0] == "string" and value == tokens[at][1] != "''" and before in _BEFORE:
            value, end = _membership(tokens, at, end)
        text += value
        if tokens[at][0] != "whitespace":
            before = tokens[end - 1][1]
        at = end
    return text


def _membership(tokens: list[Token], at: int, end: int) -> tuple[str, int]:
    """``'x' in y`` or ``'x' not in y`` from a place on, and where it ends; the constant alone if there is none."""
    word, first = tokens[at][1], _solid(tokens, end)
    negated = tokens[first : first + 1] == [("name", "not")]
    if negated:
        first = _solid(tokens, first + 1)
    if tokens[first : first + 1] == [("name", "in")] and (first := _solid(tokens, first + 1)) < len(tokens):
        text, last = _operand(tokens, first)
        following = _solid(tokens, last)
        of_text = tokens[first][0] == "name" or tokens[first][1] == "("
        if of_text and (following == len(tokens) or tokens[following][1] in _AFTER):
            test, count = ("not in", "== 1") if negated else ("in", "> 1")
            is_there = f"({text}).split({word})|length {count}"
            return f"({word} {test} {text} if {text} is not string else {is_there})", last
    return word, end


def _operand(tokens: list[Token], at: int) -> tuple[str, int]:
    """A constant, name or bracket with its attributes, items, calls and filters, and where it ends; or one token."""
    kind, value = tokens[at]
    if value in _CLOSING:
        text, end = _bracket(tokens, at)
    elif kind in ("name", "string") and value not in _KEYWORDS:
        text, end = value, at + 1
    else:
        return value, at + 1
    while (mark := _solid(tokens, end)) < len(tokens):
        sign, name = tokens[mark][1], _solid(tokens, mark + 1)
        if sign in (".", "|") and name < len(tokens):
            called, end = tokens[name][1], name + 1
            if called == "replace" and (given := _two_constants(tokens, end)):
                text, end = f"(({text}).split({given[0]})|join({given[1]}))", _closed(tokens, end)
            else:
                text = f"({text})[0]" if (sign, called) == ("|", "first") else text + sign + called
        elif sign in ("(", "[") and mark == end:
            inner, end = _bracket(tokens, mark)
            text += inner
        else:
            break
    return text, end


def _two_constants(tokens: list[Token], at: int) -> list[str]:
    """Both constants of a call, the first not empty; nothing if it is another call."""
    given = [token for token in tokens[at : _closed(tokens, at)] if token[0] != "whitespace"]
    fits = [kind for kind, _ in given] == ["operator", "string", "operator", "string", "operator"]
    return [given[1][1], given[3][1]] if fits and given[1][1] != "''" else []


def _bracket(tokens: list[Token], at: int) -> tuple[str, int]:
    end = _closed(tokens, at)
    return tokens[at][1] + _expression(tokens[at + 1 : end - 1]) + tokens[end - 1][1], end


def _closed(tokens: list[Token], at: int) -> int:
    """Where the bracket that begins here ends; behind ``at`` if none does or it never ends."""
    depth = 0
    for end in range(at, len(tokens)):
        depth += (tokens[end][1] in _CLOSING) - (tokens[end][1] in _CLOSING.values())
        if depth == 0:
            return end + 1
    return at + 1


def _solid(tokens: list[Token], at: int) -> int:
    while at < len(tokens) and tokens[at][0] == "whitespace":
        at += 1
    return at


def rewrite_tokenizer(tokenizer: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, as transformers saves them, for the runtime; nothing if they fit it.

    The runtime writes an added token as it stands, such as Gemma's runs of "▁". The vocabulary has the same, which are
    read and written right. Mistral's puts a blank before a text that does not begin with a special token. The runtime
    puts one behind each special token too, and as conversations begin with one, they need none.
    """
    new, said = dict(tokenizer), dict(config)
    vocabulary, added = (tokenizer.get("model") or {}).get("vocab"), tokenizer.get("added_tokens") or []
    runs = {token["content"]: token["id"] for token in added if set(token["content"]) == {"▁"}}
    if runs and isinstance(vocabulary, dict) and all(vocabulary.get(run) == runs[run] for run in runs):
        new["added_tokens"] = [token for token in added if token["content"] not in runs]
    before = tokenizer.get("pre_tokenizer") or {}
    if (before.get("type"), before.get("prepend_scheme"), before.get("split")) == ("Metaspace", "first", False):
        new |= _BLANKS
        said["tokenizer_class"] = "PreTrainedTokenizerFast"  # its own class would make the same blanks anew
    files = {"tokenizer.json": new, "tokenizer_config.json": said} if new != tokenizer else {}
    return {name: json.dumps(content, ensure_ascii=False) for name, content in files.items()}
