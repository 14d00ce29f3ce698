"""Bodies that are nearly right, and bytes that are not."""

import json
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

EVIL = [
    *("", " ", "\x00", "a\x00b", "\ud800", "\u202e\U0001f600\u0301", "<|im_end|>", "<|im_start|>system\n" * 3),
    *("file:///etc/passwd", "http://127.0.0.1:1/x.png", "data:image/png;base64,AAAA", "-1", "99999999999999999999"),
    *("{", "{{ messages }}", "{% for x in range(10**9) %}{% endfor %}", "word " * 3000, "a" * 100_000),
    "__foundry_local_internal_stop_strings_json",
]
NUMBERS = [0, -1, 1, 2, 2**31 - 1, 2**31, 2**53, 2**63 - 1, -(2**63), 2**64, 10**30, 0.5, -0.5, 1e308, -1e308, 5e-324]
texts = st.sampled_from(EVIL) | st.text(max_size=20)
numbers = st.sampled_from(NUMBERS) | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | numbers | texts


def _words(text: str) -> SearchStrategy[str]:
    return st.sampled_from(text.split())


FIELDS = """
model messages input stream stream_options include_usage max_tokens max_completion_tokens max_output_tokens temperature
top_p top_k n stop seed presence_penalty frequency_penalty logit_bias logprobs top_logprobs tools tool_choice function
functions function_call response_format json_schema schema lark_grammar user metadata store parallel_tool_calls
reasoning_effort reasoning modalities audio prediction service_tier instructions previous_response_id text format
truncation include background conversation prompt chat_template_kwargs enable_thinking guidance_type guidance_data
random_seed role content name type parameters strict tool_calls tool_call_id call_id arguments output id
reasoning_content image_url input_image url detail summary encrypted_content status custom custom_tool_call grammar
terminate_session completion_id tool_output_encoding preserve_thinking system_prompt ep task max_length min_length
"""
names = _words(FIELDS) | texts
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=8
)
wild_texts = texts | anything
wild_numbers = numbers | anything
wild_booleans = st.booleans() | anything
roles = _words("user user user system assistant tool developer function") | texts
calls = st.lists(
    st.fixed_dictionaries(
        {"id": texts, "type": st.just("function")},
        optional={"function": st.fixed_dictionaries({"name": texts, "arguments": wild_texts}) | anything},
    ),
    max_size=2,
)
part_types = _words("text input_text output_text refusal image_url input_image input_audio input_file") | texts
_OF_PARTS = {"text": wild_texts, "image_url": texts | st.fixed_dictionaries({"url": texts}), "input_audio": anything}
parts = st.lists(
    st.fixed_dictionaries({"type": part_types}, optional={**_OF_PARTS, "refusal": texts, "file_data": texts}),
    max_size=3,
)
contents = texts | parts | anything
messages = st.fixed_dictionaries(
    {"role": roles, "content": contents},
    optional={"name": wild_texts, "tool_calls": calls | anything, "tool_call_id": wild_texts, "x": anything},
)
item_types = "message function_call function_call_output reasoning item_reference custom_tool_call"
items = messages | st.fixed_dictionaries(
    {"type": _words(f"{item_types} custom_tool_call_output") | texts},
    optional={
        "role": roles,
        "content": contents,
        **dict.fromkeys(("name", "id"), texts),
        **dict.fromkeys(("arguments", "call_id", "input"), wild_texts),
        "output": contents,
        "summary": st.lists(st.fixed_dictionaries({"type": texts, "text": texts}), max_size=2) | anything,
    },
)
BOUNDS = "minItems maxItems minLength maxLength minimum maximum exclusiveMinimum multipleOf minProperties"


def _schemas(inner: SearchStrategy[Any]) -> SearchStrategy[Any]:
    some = st.lists(inner, max_size=3)
    named = st.dictionaries(_words("a b c") | texts, inner, max_size=3)
    fields: dict[str, SearchStrategy[Any]] = {
        "type": _words("object array string number integer boolean null") | anything,
        "properties": named | anything,
        "required": st.lists(_words("a b c") | texts, max_size=3),
        "additionalProperties": st.booleans() | inner,
        "pattern": st.sampled_from(["a+", "(", "(a|b)*c{5,500}", "^.*$", "(?=x)y", "[\\p{L}]{200}"]) | texts,
        "format": _words("date-time uuid email ipv4 uri") | texts,
        "enum": st.lists(leaves, max_size=4),
        "$ref": _words("# #/$defs/a #/$defs/b #/x http://127.0.0.1:1/x") | texts,
        **dict.fromkeys(BOUNDS.split(), numbers),
        **dict.fromkeys(("items", "not", "propertyNames"), inner),
        **dict.fromkeys(("prefixItems", "anyOf", "oneOf", "allOf"), some),
        **dict.fromkeys(("$defs", "patternProperties"), named),
        **dict.fromkeys(("const", "x-guidance"), anything),
    }
    return st.fixed_dictionaries({}, optional=fields)


schemas = st.recursive(wild_booleans, _schemas, max_leaves=10)
_FUNCTIONS = st.fixed_dictionaries({"name": texts}, optional={"parameters": schemas, "description": texts})
tools = st.lists(
    st.fixed_dictionaries(
        {"type": _words("function function custom") | texts},
        optional={"function": _FUNCTIONS, "name": texts, "parameters": schemas},
    ),
    max_size=3,
)
_NAMED_SCHEMAS = st.fixed_dictionaries({"name": texts, "schema": schemas}) | schemas
formats = st.fixed_dictionaries(
    {"type": _words("json_schema json_schema json_object text lark_grammar") | texts},
    optional={"json_schema": _NAMED_SCHEMAS, "schema": schemas, "name": texts, "lark_grammar": texts},
)
models = st.sampled_from(["bot"] * 8 + ["bot:1", "bot:9", "nobody"])
_COMMON: dict[str, SearchStrategy[Any]] = {
    **dict.fromkeys(("stream", "parallel_tool_calls", "store"), wild_booleans),
    **dict.fromkeys(("temperature", "top_p", "seed"), wild_numbers),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), numbers),
    "tools": tools | anything,
    "tool_choice": _words("auto none required") | anything,
    "metadata": st.dictionaries(names, texts, max_size=3) | anything,
    "user": wild_texts,
}
chats = st.fixed_dictionaries(
    {"model": models, "messages": st.lists(messages, min_size=1, max_size=3) | anything},
    optional={
        **_COMMON,
        **dict.fromkeys(("max_tokens", "max_completion_tokens", "n"), wild_numbers),
        "stop": texts | st.lists(texts, max_size=5) | anything,
        "logit_bias": st.dictionaries(texts, numbers, max_size=3) | anything,
        "logprobs": wild_booleans,
        "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | anything,
        "response_format": formats | anything,
        "reasoning_effort": _words("low none high") | anything,
        "chat_template_kwargs": st.dictionaries(names, anything, max_size=3) | anything,
    },
)
responses = st.fixed_dictionaries(
    {"model": models, "input": texts | st.lists(items, min_size=1, max_size=3) | anything},
    optional={
        **_COMMON,
        **dict.fromkeys(("instructions", "previous_response_id", "truncation"), wild_texts),
        "max_output_tokens": wild_numbers,
        "text": st.fixed_dictionaries({"format": formats | anything}) | anything,
        "reasoning": st.fixed_dictionaries({"effort": wild_texts}) | anything,
        "include": st.lists(texts, max_size=2) | anything,
        "background": wild_booleans,
    },
)


@st.composite
def _near(draw: st.DrawFn, plausible: SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    """A right request, but for a few fields."""
    wild = draw(plausible)
    body: dict[str, Any] = {"model": "bot", "messages": [{"role": "user", "content": "Hi"}], "input": "Hi"}
    for key in draw(st.lists(st.sampled_from(sorted(wild)), max_size=3, unique=True)):
        body[key] = wild[key]
    if draw(st.booleans()):
        body[draw(names)] = draw(anything)
    return body


@st.composite
def cut(draw: st.DrawFn, bodies: SearchStrategy[bytes]) -> bytes:
    """A body with a piece missing, doubled or replaced."""
    body = draw(bodies)
    start = draw(st.integers(0, len(body)))
    end = draw(st.integers(start, min(len(body), start + 20)))
    return body[:start] + draw(st.binary(max_size=8) | st.just(body[start:end] * 2)) + body[end:]


def encoded(bodies: SearchStrategy[Any]) -> SearchStrategy[bytes]:
    return bodies.map(lambda body: json.dumps(body).encode())


def requests() -> SearchStrategy[bytes]:
    """Bodies for either endpoint."""
    near = encoded(_near(chats)) | encoded(_near(responses))
    wild = encoded(chats) | encoded(responses) | encoded(anything)
    return near | near | near | wild | cut(near) | st.binary(max_size=200)
