"""What a client asked, read and bounded, and how a request is refused.

The runtime trusts what it gets: JSON nested some 30,000 deep overflows its stack, and a schema that wants a thousand
million items takes all memory of the machine. So everything is parsed here, and what goes on to the runtime is written
anew from what was understood.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slmops.core.validation import predicate

MAX_DEPTH = 50
MAX_INTEGER = 2**63
MAX_SCHEMA_COST = 10_000  # all bounds of arrays and all divisors together: the runtime unrolls each into as many rules
_UNSUPPORTED = {"allOf", "oneOf", "not", "patternProperties", "propertyNames"}
_BOUNDS = {"minItems", "maxItems", "multipleOf"}
_NAMED = {"properties", "$defs", "definitions"}
_ANNOTATIONS = {"default", "examples", "title", "description"}
_VALUES = {*_ANNOTATIONS, "enum", "const", "required"}
_BESIDE = {*_ANNOTATIONS, "type", "$defs", "definitions", "$schema", "$id", "nullable", "deprecated"}


@dataclass(eq=False)
class Refused(Exception):
    """A request that is answered with an error: ``code`` is OpenAI's name of it, ``param`` the field that is wrong."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The answer, in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def not_now(message: str, retry_after_s: float, code: str = "unavailable") -> Refused:
    """What was asked for exists, but cannot be served now; asking again makes sense after so many seconds."""
    return Refused(503, message, code, headers={"retry-after": str(math.ceil(retry_after_s))})


class _Part(BaseModel):
    """Only text: a service of text models must not be made to read files or addresses of images."""

    type: Literal["text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text"]


class _Message(BaseModel):
    role: str
    content: str | list[_Part] | None = None


class _Item(_Message):
    """What the several kinds of items of /v1/responses share."""

    type: str = "message"
    role: str = ""
    output: str | list[_Part] | None = None  # of a tool


class _StreamOptions(BaseModel):
    include_usage: bool | None = None


class _Format(BaseModel):
    type: Literal["text", "json_object", "json_schema"]


class _Text(BaseModel):
    format: _Format | None = None


_Tokens = Annotated[int, Field(ge=1)] | None
_Number = Annotated[str, Field(pattern=r"^\s*-?\d{1,9}$")]


class _Metadata(BaseModel):
    """Free text, but the runtime reads these two as numbers."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str]

    top_k: _Number = "0"
    random_seed: _Number = "0"


class _Common(BaseModel):
    model_config = ConfigDict(strict=True)

    model: Annotated[str, Field(min_length=1, max_length=300)]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    user: str | None = None
    store: bool | None = None
    metadata: _Metadata | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class _Chat(_Common):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: _Tokens = None
    max_completion_tokens: _Tokens = None
    n: Literal[1] | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: _Format | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class _Responses(_Common):
    input: str | Annotated[list[_Item], Field(min_length=1)]
    max_output_tokens: _Tokens = None
    instructions: str | None = None
    previous_response_id: str | None = None
    text: _Text | None = None
    reasoning: dict[str, Any] | None = None


_FIELDS = {
    name
    for model in (_Chat, _Responses, _Message, _Item, _Part, _StreamOptions, _Text, _Format, _Metadata)
    for name in model.model_fields
}


@dataclass(frozen=True)
class Asked:
    """A request that may go to the runtime."""

    model: str
    stream: bool
    drop_usage: bool  # the runtime will add a piece with the token counts that the client did not ask for
    ours: bool  # the token limit is ours, not the client's
    _body: dict[str, Any]
    _limits: tuple[str, ...]

    def payload(self, foundry_id: str, tokens: int | None = None) -> bytes:
        """The request for the runtime, with another token limit if one is given."""
        limits = {} if tokens is None else dict.fromkeys(self._limits, tokens)
        return json.dumps({**self._body, "model": foundry_id, **limits}, ensure_ascii=False).encode()


def read(raw: bytes, most_tokens: int, *, chat: bool) -> Asked:
    """Understand a request, for chat completions or else for responses; Refused if it is not let through."""
    body = _parse(raw)
    try:
        understood = (_Chat if chat else _Responses).model_validate(body)
    except ValidationError as error:
        raise _wrong_field(error) from None
    for name in ("tools", "response_format", "text"):
        if body.get(name):
            _check_schema(body[name], name)
    form = (body.get("response_format") if chat else (body.get("text") or {}).get("format")) or {}
    if body.get("tools") and body.get("tool_choice") != "none" and form.get("type", "text") != "text":
        said = "The runtime cannot call tools in a structured answer: drop one of the two, or set tool_choice to none."
        raise Refused(400, said, "invalid_value", "tools")
    names = ("max_tokens", "max_completion_tokens") if chat else ("max_output_tokens",)
    wanted = {name: value for name in names if (value := body.pop(name, None)) is not None}
    given = wanted or {names[0]: most_tokens}
    ours = not wanted or max(wanted.values()) > most_tokens
    body |= {name: min(value, most_tokens) for name, value in given.items()}
    drop_usage = False
    if chat:
        # The runtime takes all of json_schema for the schema, and OpenAI's clients put the schema inside.
        wrapped = (body.get("response_format") or {}).get("json_schema")
        if isinstance(wrapped, dict) and "schema" in wrapped:
            body["response_format"] = {**body["response_format"], "json_schema": wrapped["schema"]}
        if understood.stream:
            options = understood.stream_options
            drop_usage = not (options and options.include_usage)
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    return Asked(understood.model, bool(understood.stream), drop_usage, ours, body, tuple(given))


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw.decode("utf-8"))
        values: list[tuple[Any, int]] = [(body, 1)]
        while values:
            value, depth = values.pop()
            if isinstance(value, dict | list):
                if depth > MAX_DEPTH:
                    raise RecursionError
                inner = value.values() if isinstance(value, dict) else value
                values.extend((one, depth + 1) for one in inner)
            elif isinstance(value, int) and abs(value) >= MAX_INTEGER:
                raise Refused(400, "The body has an integer of more than 64 bits.", "invalid_json")
    except RecursionError:
        raise Refused(400, f"The body is nested more than {MAX_DEPTH} deep.", "invalid_json") from None
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise Refused(400, f"The body is not JSON: {error}.", "invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(400, "The body is not a JSON object.", "invalid_json")
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise Refused(400, "The body has half a UTF-16 surrogate pair in a string.", "invalid_json") from None
    except ValueError:
        raise Refused(400, "The body has a number that is infinite or not a number.", "invalid_json") from None
    return body


def _wrong_field(error: ValidationError) -> Refused:
    # For a union each branch complains, and the one that fits best the deepest.
    found = max(error.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
    # The path also names the branch, such as "list[_Part]" or "str".
    param = ".".join(str(part) for part in found["loc"] if isinstance(part, int) or part in _FIELDS) or None
    code = "missing_required_parameter" if found["type"] == "missing" else "invalid_value"
    return Refused(400, f"{param or 'The body'} {predicate(found)}.", code, param)


def _check_schema(value: Any, param: str) -> None:
    """Refuse a JSON schema, of an answer or a tool, that is too much for the runtime.

    The runtime compiles it to a grammar. A few of the things that a schema can say take gigabytes or minutes; nothing
    in the runtime limits that, and a client that leaves does not stop it. OpenAI's own service refuses most of them.
    """
    cost = 0.0
    nodes = [value]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes.extend(node)
        elif isinstance(node, dict):
            for key, inner in node.items():
                if key in _UNSUPPORTED:
                    raise Refused(400, f"{param}: the schema keyword {key} is not supported.", "invalid_schema", param)
                if key in _BOUNDS and isinstance(inner, int | float):
                    cost += max(inner, 1 / inner if 0 < inner < 1 else 0)
                if key in ("$ref", "anyOf") and not node.keys() <= {*_BESIDE, key}:
                    # The runtime intersects the two, and may never find out whether anything is left.
                    raise Refused(400, f"{param}: the schema has more beside {key}.", "invalid_schema", param)
                if key in _NAMED and isinstance(inner, dict):
                    nodes.extend(inner.values())
                elif key not in _VALUES:
                    nodes.append(inner)
    if cost > MAX_SCHEMA_COST:
        message = f"{param}: minItems, maxItems and multipleOf of the schema add up to more than {MAX_SCHEMA_COST}."
        raise Refused(400, message, "invalid_schema", param)
