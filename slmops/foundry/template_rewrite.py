"""A chat template in the words that Foundry Local's Jinja reads as transformers' does.

transformers renders with ``trim_blocks`` and ``lstrip_blocks``, the runtime without. To the runtime ``tools`` and
``documents`` are not defined, ``'x' in text`` is always false, and ``'\\u00e9'`` is no escape. So the blanks that count
are written out here, and the rest is said otherwise. Whether that is enough is for others to find out, by rendering.
"""

from __future__ import annotations

from jinja2 import Environment

from slmops.checkpoints.chat_template import ChatTemplate

_LEXER = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701 - it only reads
_ENDS = {"variable_begin": ("{{", "}}"), "block_begin": ("{%", "%}")}
_BEFORE = {"if", "elif", "and", "or", "not", "else", "=", "(", "[", ",", ":"}
_AFTER = {"and", "or", "else", "if", ")", "]", "}", ",", ":"}
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_TOOLS_AS_GIVEN = "{# tools|tojson #}"
"""The runtime reshapes tools for templates in which this text is nowhere."""

Token = tuple[str, str]  # Jinja's kind of token, and its text


def rewrite(template: ChatTemplate) -> str:
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
    body = "".join(parts)
    used = names(template.text)
    sets = [
        f"{{% if {name} is not defined %}}{{% set {name} = {value} %}}{{% endif %}}"
        for name, value in defined.items()
        if name in used
    ]
    return (_TOOLS_AS_GIVEN if "tools" in used else "") + "".join(sets) + body


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
    """What stands in a tag, with ``'x' in y`` said so that it is true of a text, too."""
    places = [place for place, (kind, _) in enumerate(tokens) if kind != "whitespace"]
    said = [tokens[place][1] for place in places]
    for at, word in enumerate(said):
        negated = said[at + 1 : at + 3] == ["not", "in"]
        first = at + 3 if negated else at + 2
        if not (
            tokens[places[at]][0] == "string"
            and word != "''"
            and (at == 0 or said[at - 1] in _BEFORE)
            and (negated or said[at + 1 : at + 2] == ["in"])
        ):
            continue
        end = _operand_end(said, first)
        if end > first and (end == len(said) or said[end] in _AFTER):
            text = "".join(value for _, value in tokens[places[first] : places[end - 1] + 1])
            test, count = ("not in", "== 1") if negated else ("in", "> 1")
            new = f"({word} {test} {text} if {text} is not string else ({text}).split({word})|length {count})"
            rest = tokens[places[end - 1] + 1 :]
            return "".join(value for _, value in tokens[: places[at]]) + new + _expression(rest)
    return "".join(value for _, value in tokens)


def _operand_end(said: list[str], at: int) -> int:
    """Where a name or a parenthesis with its attributes, items, calls and filters ends; ``at`` if it is none."""
    if at >= len(said) or not (said[at].isidentifier() or said[at] == "("):
        return at
    end = _closed(said, at) if said[at] == "(" else at + 1
    while end < len(said):
        if said[end] in (".", "|"):
            end += 2
        elif said[end] in ("(", "["):
            end = _closed(said, end)
        else:
            break
    return end


def _closed(said: list[str], at: int) -> int:
    depth = 0
    for end in range(at, len(said)):
        depth += (said[end] in _CLOSING) - (said[end] in _CLOSING.values())
        if depth == 0:
            return end + 1
    return at
