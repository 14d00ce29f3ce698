"""What the proxy lets through to the runtime, and what it refuses."""

import json
from typing import Any

import pytest

from slmops.serving.limits import Serve
from tests import upstream
from tests.upstream import CHAT, FOUNDRY_ID, GOOD, RESPONSES, Stand, answer, chat, event, response, says, stand, told

pytestmark = pytest.mark.anyio


def schema(inner: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": inner}})


def raw(field: str) -> bytes:
    return json.dumps(GOOD).encode()[:-1] + b", " + field.encode() + b"}"


DEEP = {"type": "object"}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP}}

NO_JSON: list[bytes | dict[str, Any]] = [
    *(b"", b'{"model": "bot"', b"[]", b"null"),
    '{"model": "b\u00f6t"}'.encode("latin-1"),
    json.dumps(GOOD).encode("utf-16"),
    json.dumps(GOOD).encode("utf-8-sig"),
    raw('"x": ' + "[" * 100_000 + "]" * 100_000),
    b"[" * 100_000,
    chat(x=DEEP),
    *map(raw, ('"temperature": NaN', '"x": -Infinity', '"x": [1e400]', '"x": "\\ud800"', '"\\udc00": 1')),
    *map(raw, (f'"x": {10**30}', '"x": ' + "1" * 5000)),
]
# The field that is wrong, and requests where it is.
WRONG: dict[str, list[dict[str, Any]]] = {
    "messages": [chat(messages=wrong) for wrong in ([], "Hi")],
    "messages.0": [chat(messages=[None])],
    "messages.0.role": [says("x", 1)],
    "messages.0.content": [says(1), says({})],
    "messages.0.content.0": [says(["x"])],
    "messages.0.content.0.type": [says([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])],
    "stop.0": [chat(stop=[1])],
    "stream_options.include_usage": [chat(stream_options={"include_usage": "x"})],
    "tools.0": [chat(tools=[None])],
    "metadata": [chat(metadata={"a": 1})],
    "metadata.top_k": [chat(metadata={"top_k": "x"})],  # the runtime counts with it
    "response_format.type": [chat(response_format={"type": "lark_grammar", "lark_grammar": "start: %json {}"})],
} | {
    field: [chat(**{field: wrong}) for wrong in values]
    for field, values in {
        "model": (None, 1, "", "m" * 1000),
        "max_tokens": (0, -1, True, "5"),
        "max_completion_tokens": (0,),
        "temperature": ("1",),
        "n": (2,),
        "stop": (1,),
        "logit_bias": ([1],),
        "stream": (1,),
        "stream_options": ("x",),
        "tools": ({},),
    }.items()
}
# Schemas that take the runtime all memory, or minutes.
COSTLY: list[dict[str, Any]] = [
    {"type": "array", "minItems": 10**9, "items": {"type": "string"}},
    {"type": "array", "maxItems": 10**9},
    {"properties": {f"p{i}": {"type": "array", "maxItems": 999} for i in range(20)}},
    {"items": [{"multipleOf": 1_000_003}]},
    {"multipleOf": 1e-9},
    {"allOf": [{"pattern": "a"}] * 50},
    {"$ref": "#/$defs/a", "pattern": "b", "$defs": {"a": {"pattern": "a"}}},
]
FILE = {"role": "user", "content": [{"type": "input_file", "file_data": "AAAA"}]}
BAD: list[tuple[Any, str, str | None]] = [
    *((body, "invalid_json", None) for body in NO_JSON),
    ({"messages": GOOD["messages"]}, "missing_required_parameter", "model"),
    ({"model": "bot"}, "missing_required_parameter", "messages"),
    (chat(messages=[{"content": "x"}]), "missing_required_parameter", "messages.0.role"),
    *((body, "invalid_value", field) for field, bodies in WRONG.items() for body in bodies),
    *((schema(costly), "invalid_schema", "response_format") for costly in COSTLY),
    (chat(tools=[{"function": {"name": "f", "parameters": COSTLY[0]}, "type": "function"}]), "invalid_schema", "tools"),
]
BAD_RESPONSES: list[tuple[Any, str, str | None]] = [
    ({"model": "bot"}, "missing_required_parameter", "input"),
    *((response(input=wrong), "invalid_value", "input") for wrong in (None, 1, [])),
    (response(input=[{"role": None, "content": "x"}]), "invalid_value", "input.0.role"),
    (response(input=[FILE]), "invalid_value", "input.0.content.0.type"),
    (response(max_output_tokens=0), "invalid_value", "max_output_tokens"),
    (response(instructions=["x"]), "invalid_value", "instructions"),
    (response(text={"format": {"type": "lark_grammar"}}), "invalid_value", "text.format.type"),
    (response(text={"format": {"type": "json_schema", "schema": COSTLY[0]}}), "invalid_schema", "text"),
]


async def test_what_is_not_a_request_is_told_so_and_does_not_reach_the_runtime(one: Stand) -> None:
    for path, bads in ((CHAT, BAD), (RESPONSES, BAD_RESPONSES)):
        for body, code, param in bads:
            refused = await one.ask(body, path)
            assert (told(refused), refused.json()["error"]["param"]) == ((400, code), param), str(body)[:200]
    assert (one.upstream.received, one.fleet.backend.in_flight) == ([], 0)
    assert (await one.ask()).status_code == 200


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        (says(None), CHAT),
        (says([{"type": "text", "text": "Hi"}]), CHAT),
        (chat(max_tokens=None, stop=None, tools=None, temperature=1, top_p=0.5, logit_bias={"5": 1}), CHAT),
        (chat(stop=["a"], tools=[], user="u", metadata={"a": "b", "top_k": "5"}, seed=1, store=True, zzz=[1]), CHAT),
        (schema({"properties": {"allOf": {"anyOf": [{"type": "string"}, {"type": "null"}], "title": "T"}}}), CHAT),
        (schema({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"minItems": 5, "enum": [{"allOf": 1}]}}}), CHAT),
        (response(input=[{"type": "function_call_output", "call_id": "a", "output": "x"}]), RESPONSES),
        (response(instructions="Be brief.", text={"format": {"type": "text"}}, previous_response_id="r"), RESPONSES),
    ],
)
async def test_a_request_goes_on_with_all_that_it_has(one: Stand, asked: dict[str, Any], path: str) -> None:
    answered = await one.ask(asked, path)
    assert (answered.status_code, answered.headers["x-slmops-version"]) == (200, "3")
    assert answered.json()["model"] == FOUNDRY_ID
    [received] = one.upstream.received
    assert received.pop("model") == FOUNDRY_ID
    form = asked.get("response_format")
    placed = {"response_format": {**form, "json_schema": form["json_schema"]["schema"]}} if form else {}
    for key, value in {**asked, **placed}.items():
        assert key in ("model", "max_tokens") or received[key] == value


@pytest.mark.parametrize(
    ("path", "given", "sent"),
    [
        (CHAT, {}, {"max_tokens": 50}),
        (CHAT, {"max_tokens": None}, {"max_tokens": 50}),
        (CHAT, {"max_tokens": 20}, {"max_tokens": 20}),
        (CHAT, {"max_tokens": 51}, {"max_tokens": 50}),
        (CHAT, {"max_completion_tokens": 10**12}, {"max_completion_tokens": 50}),
        (CHAT, {"max_tokens": 10**12, "max_completion_tokens": 20}, {"max_tokens": 50, "max_completion_tokens": 20}),
        (RESPONSES, {}, {"max_output_tokens": 50}),
        (RESPONSES, {"max_output_tokens": 10**12}, {"max_output_tokens": 50}),
    ],
)
async def test_answers_are_limited(path: str, given: dict[str, Any], sent: dict[str, Any]) -> None:
    async with stand(Serve(max_output_tokens=50)) as one:
        assert (await one.ask((chat if path == CHAT else response)(**given), path)).status_code == 200
        assert {key: value for key, value in one.upstream.received[0].items() if "token" in key} == sent


def budget(prompt: int, wanted: int) -> dict[str, Any]:
    message = (
        "Invalid request: search_options.cc:108 int fl::Validate(int64_t, int, int) request requires "
        f"{prompt + wanted} total tokens ({prompt} input + {wanted} output), which exceeds the model's maximum context "
        "length of 100 tokens"
    )
    return {"error": {"message": message, "code": None, "param": None, "type": "invalid_request_error"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
async def test_a_limit_of_ours_shrinks_to_the_room_that_is_left_but_not_the_clients(path: str, stream: bool) -> None:
    async def script(connection: upstream.Connection) -> None:
        wanted = connection.body.get("max_tokens") or connection.body["max_output_tokens"]
        if 80 + wanted <= 100:
            await answer(connection)
        elif not stream:
            await upstream.replies(budget(80, wanted), 400)(connection)
        else:
            if path == RESPONSES:
                for kind in ("created", "in_progress"):
                    await connection.piece(f"event: response.{kind}\n".encode() + event({"response": {}}))
                failed = {"response": {"error": {**budget(80, wanted)["error"], "code": "invalid_request_error"}}}
                await connection.piece(b"event: response.failed\n" + event(failed))
            else:
                await connection.event(budget(80, wanted))

    async with stand(Serve(max_output_tokens=50), script=script) as one:
        good, name = (chat, "max_tokens") if path == CHAT else (response, "max_output_tokens")
        for limit in ({}, {name: 10**6}):
            assert (await one.ask(good(stream=stream, **limit), path)).status_code == 200
        assert [received[name] for received in one.upstream.received] == [50, 20, 50, 20]
        refused = await one.ask(good(stream=stream, **{name: 30}), path)
        assert told(refused) == (400, "context_length_exceeded")
        assert "80 tokens of conversation and up to 30 of answer" in refused.json()["error"]["message"]
