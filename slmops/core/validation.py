"""What pydantic refuses, in our own words: its error types become ends of a sentence, such as "must be at least 16"."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from slmops.core.errors import UsageError
from slmops.core.files import reserved
from slmops.core.names import NAME_PATTERN, is_name

if TYPE_CHECKING:
    from pydantic import ValidationError

MATCHER_PATTERN = r"^.+\.py:[A-Za-z_][A-Za-z0-9_]*$"
ADDRESS_PATTERN = r"^https?://[^@\s]+$"  # a password in it would get into logs
POOL_PATTERN = r"^[^/%&<>\s]+$"

_FORMS = {
    NAME_PATTERN: "may only have letters, digits, - and _, up to 63, and must begin with a letter or a digit",
    MATCHER_PATTERN: "must be FILE.py:FUNCTION",
    ADDRESS_PATTERN: "must be an http:// or https:// address without user name and password",
    POOL_PATTERN: "must not be empty or have spaces or any of / % & < >",
}
_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not a known key",
    "invalid_key": "is not a known key",  # YAML has keys that are not text
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "json_invalid": "is not valid JSON: {error}",
    "value_error": "{error}",
}
KINDS = {
    "bool": "true or false",
    "datetime": "a date and time",
    "dict": "a table of keys and values",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model": "a table of keys and values",
    "path": "a path",
    "string": "text",
    "tuple": "a list",
}


def check_name(name: str) -> str:
    """A model's name, which may become part of a path; a UsageError if it cannot be one."""
    if not is_name(name):
        form = "must not be a name that Windows keeps for a device" if reserved(name) else _FORMS[NAME_PATTERN]
        raise UsageError(f"{name!r} is not a model's name: it {form}.", "See `slmops compare`.")
    return name


def predicate(problem: Any) -> str:
    """What one of ``ValidationError.errors()`` says, as the end of a sentence that begins with the value's name."""
    kind, context = problem["type"], problem.get("ctx", {})
    if context.get("min_length") == 1:
        return "must not be empty"
    if kind == "string_pattern_mismatch":
        return _FORMS.get(context["pattern"]) or f"must match {context['pattern']}"
    if kind in _WORDS:
        shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in context.items()}
        return _WORDS[kind].format(**shown)
    if (name := kind.partition("_")[0]) in KINDS:  # int_type, int_parsing, int_from_float and so on
        return f"must be {KINDS[name]}"
    said: str = problem["msg"]
    return said.replace("Input should", "must", 1)


def dotted(location: Sequence[int | str]) -> str:
    return ".".join(map(str, location))


def problems(
    error: "ValidationError", *, name: Callable[[Sequence[int | str]], str] = dotted, got: bool = False
) -> list[str]:
    """What pydantic found wrong, a sentence each; ``name`` says what the user calls a value, ``got`` quotes it."""
    found = []
    for one in error.errors(include_url=False):
        whole = one["type"] == "value_error"  # with the name of the value in it, unless it is of a field
        subject = name(one["loc"]) or ("" if whole else "it")
        secret = one.get("ctx", {}).get("pattern") == ADDRESS_PATTERN
        quoted = got and not secret and one["type"] not in ("missing", "extra_forbidden", "invalid_key")
        value = repr(one["input"])
        quote = f" (got {value if len(value) <= 80 else value[:77] + '...'})" if quoted else ""
        found.append(f"{subject} {predicate(one)}{quote}".strip())
    return found
