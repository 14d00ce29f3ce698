"""What the proxy lets through to the runtime, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slmops.serving.limits import Limits
from tests.upstream import (
    CHAT,
    FOUNDRY_ID,
    GOOD,
    GOOD_RESPONSE,
    RESPONSES,
    Connection,
    Stand,
    answer,
    chat,
    event,
    response,
    says,
    stand,
    told,
)

pytestmark = pytest.mark.anyio


def schema(inner: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": inner}})


def raw(field: str) -> bytes:
    return json.dumps(GOOD).encode()[:-1] + b", " + field.encode() + b"}"


DEEP = {"type": "object"}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP}}

# What is sent, and what the client is told.
BAD: dict[str, tuple[Any, str, str | None]] = {
    "nothing": (b"", "invalid_json", None),
    "half": (b'{"model": "bot"', "invalid_json", None),
    "list": (b"[]", "invalid_json", None),
    "null": (b"null", "invalid_json", None),
    "latin-1": ('{"model": "b\u00f6t"}'.encode("latin-1"), "invalid_json", None),
    "utf-16": (json.dumps(GOOD).encode("utf-16"), "invalid_json", None),
    "byte order mark": (json.dumps(GOOD).encode("utf-8-sig"), "invalid_json", None),
    "100,000 lists": (raw('"x": ' + "[" * 100_000 + "]" * 100_000), "invalid_json", None),
    "100,000 lists that do not end": (b"[" * 100_000, "invalid_json", None),
    "60 objects": (chat(x=DEEP), "invalid_json", None),
    "NaN": (raw('"temperature": NaN'), "invalid_json", None),
    "infinity": (raw('"x": -Infinity'), "invalid_json", None),
    "1e400": (raw('"x": [1e400]'), "invalid_json", None),
    "10 ** 30": (raw(f'"x": {10**30}'), "invalid_json", None),
    "5,000 digits": (raw('"x": ' + "1" * 5000), "invalid_json", None),
    "half a pair": (raw('"x": "\\ud800"'), "invalid_json", None),
    "half a pair in a name": (raw('"\\udc00": 1'), "invalid_json", None),
    "no model": ({"messages": GOOD["messages"]}, "missing_required_parameter", "model"),
    "model null": (chat(model=None), "invalid_value", "model"),
    "model a number": (chat(model=1), "invalid_value", "model"),
    "model empty": (chat(model=""), "invalid_value", "model"),
    "model long": (chat(model="m" * 1000), "invalid_value", "model"),
    "no messages": ({"model": "bot"}, "missing_required_parameter", "messages"),
    "messages empty": (chat(messages=[]), "invalid_value", "messages"),
    "messages text": (chat(messages="Hi"), "invalid_value", "messages"),
    "messages null": (chat(messages=[None]), "invalid_value", "messages.0"),
    "no role": (chat(messages=[{"content": "x"}]), "missing_required_parameter", "messages.0.role"),
    "role a number": (says("x", 1), "invalid_value", "messages.0.role"),
    "content a number": (says(1), "invalid_value", "messages.0.content"),
    "content an object": (says({}), "invalid_value", "messages.0.content"),
    "part a text": (says(["x"]), "invalid_value", "messages.0.content.0"),
    "image": (
        says([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        "invalid_value",
        "messages.0.content.0.type",
    ),
    "max_tokens 0": (chat(max_tokens=0), "invalid_value", "max_tokens"),
    "max_tokens -1": (chat(max_tokens=-1), "invalid_value", "max_tokens"),
    "max_tokens true": (chat(max_tokens=True), "invalid_value", "max_tokens"),
    "max_tokens text": (chat(max_tokens="5"), "invalid_value", "max_tokens"),
    "max_completion_tokens 0": (chat(max_completion_tokens=0), "invalid_value", "max_completion_tokens"),
    "temperature text": (chat(temperature="1"), "invalid_value", "temperature"),
    "n 2": (chat(n=2), "invalid_value", "n"),
    "stop a number": (chat(stop=1), "invalid_value", "stop"),
    "stop of numbers": (chat(stop=[1]), "invalid_value", "stop.0"),
    "logit_bias a list": (chat(logit_bias=[1]), "invalid_value", "logit_bias"),
    "stream a number": (chat(stream=1), "invalid_value", "stream"),
    "stream_options text": (chat(stream_options="x"), "invalid_value", "stream_options"),
    "include_usage text": (
        chat(stream_options={"include_usage": "x"}),
        "invalid_value",
        "stream_options.include_usage",
    ),
    "tools an object": (chat(tools={}), "invalid_value", "tools"),
    "tools of null": (chat(tools=[None]), "invalid_value", "tools.0"),
    "metadata of numbers": (chat(metadata={"a": 1}), "invalid_value", "metadata"),
    "metadata that the runtime counts with": (chat(metadata={"top_k": "x"}), "invalid_value", "metadata.top_k"),
    "grammar": (
        chat(response_format={"type": "lark_grammar", "lark_grammar": "start: %json {}"}),
        "invalid_value",
        "response_format.type",
    ),
    "a thousand million items": (schema({"type": "array", "minItems": 10**9}), "invalid_schema", "response_format"),
    "many arrays": (
        schema({"properties": {f"p{i}": {"type": "array", "maxItems": 999} for i in range(20)}}),
        "invalid_schema",
        "response_format",
    ),
    "a large divisor": (schema({"items": [{"multipleOf": 1_000_003}]}), "invalid_schema", "response_format"),
    "a small divisor": (schema({"multipleOf": 1e-9}), "invalid_schema", "response_format"),
    "intersections": (schema({"allOf": [{"pattern": "a"}] * 50}), "invalid_schema", "response_format"),
    "hidden intersections": (
        schema({"$ref": "#/$defs/a", "pattern": "b", "$defs": {"a": {"pattern": "a"}}}),
        "invalid_schema",
        "response_format",
    ),
    "items in a tool": (
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"minItems": 10**9}}}]),
        "invalid_schema",
        "tools",
    ),
}
BAD_RESPONSES: dict[str, tuple[Any, str, str | None]] = {
    "no input": ({"model": "bot"}, "missing_required_parameter", "input"),
    "input null": (response(input=None), "invalid_value", "input"),
    "input a number": (response(input=1), "invalid_value", "input"),
    "input empty": (response(input=[]), "invalid_value", "input"),
    "role null": (response(input=[{"role": None, "content": "x"}]), "invalid_value", "input.0.role"),
    "file": (
        response(input=[{"role": "user", "content": [{"type": "input_file", "file_data": "AAAA"}]}]),
        "invalid_value",
        "input.0.content.0.type",
    ),
    "max_output_tokens 0": (response(max_output_tokens=0), "invalid_value", "max_output_tokens"),
    "instructions a list": (response(instructions=["x"]), "invalid_value", "instructions"),
    "format": (response(text={"format": {"type": "lark_grammar"}}), "invalid_value", "text.format.type"),
    "items": (
        response(text={"format": {"type": "json_schema", "name": "x", "schema": {"minItems": 10**9}}}),
        "invalid_schema",
        "text",
    ),
}


async def test_what_is_no_request_is_told_so_and_does_not_reach_the_runtime(one: Stand) -> None:
    for path, bads in ((CHAT, BAD), (RESPONSES, BAD_RESPONSES)):
        for name, (body, code, param) in bads.items():
            refused = await one.ask(body, path)
            assert told(refused) == (400, code), name
            assert refused.json()["error"]["param"] == param, name
    assert one.upstream.received == []
    assert one.fleet.leases == 0
    assert (await one.ask()).status_code == 200


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        (chat(), CHAT),
        (says(None), CHAT),
        (says([{"type": "text", "text": "Hi"}]), CHAT),
        (chat(max_tokens=None, stop=None, tools=None, temperature=1, top_p=0.5, logit_bias={"5": 1}), CHAT),
        (chat(stop=["a"], tools=[], user="u", metadata={"a": "b", "top_k": "5"}, seed=1, store=True, zzz=[1]), CHAT),
        (schema({"properties": {"allOf": {"anyOf": [{"type": "string"}, {"type": "null"}], "title": "T"}}}), CHAT),
        (schema({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"minItems": 5, "enum": [{"allOf": 1}]}}}), CHAT),
        (response(), RESPONSES),
        (response(input=[{"type": "function_call_output", "call_id": "a", "output": "x"}]), RESPONSES),
        (response(instructions="Be brief.", text={"format": {"type": "text"}}, previous_response_id="r"), RESPONSES),
    ],
)
async def test_a_request_goes_on_with_all_that_it_has(one: Stand, asked: dict[str, Any], path: str) -> None:
    answered = await one.ask(asked, path)
    assert answered.status_code == 200
    assert answered.headers["x-slmops-version"] == "3"
    assert answered.json()["model"] == FOUNDRY_ID
    [received] = one.upstream.received
    assert received.pop("model") == FOUNDRY_ID
    changed = {"model", "max_tokens", "max_output_tokens", "response_format"}
    for key, value in asked.items():
        if key not in changed:
            assert received[key] == value


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
        (RESPONSES, {"max_output_tokens": 20}, {"max_output_tokens": 20}),
        (RESPONSES, {"max_output_tokens": 10**12}, {"max_output_tokens": 50}),
    ],
)
async def test_answers_are_limited(path: str, given: dict[str, Any], sent: dict[str, Any]) -> None:
    async with stand(Limits(max_output_tokens=50)) as one:
        body = {**(GOOD if path == CHAT else GOOD_RESPONSE), **given}
        assert (await one.ask(body, path)).status_code == 200
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
    async def script(connection: Connection) -> None:
        wanted = connection.body.get("max_tokens") or connection.body["max_output_tokens"]
        if 80 + wanted <= 100:
            await answer(connection)
        elif not stream:
            await connection.whole(budget(80, wanted), 400)
        else:
            await connection.head()
            if path == RESPONSES:
                for kind in ("created", "in_progress"):
                    await connection.piece(f"event: response.{kind}\n".encode() + event({"response": {}}))
                failed = {"response": {"error": {**budget(80, wanted)["error"], "code": "invalid_request_error"}}}
                await connection.piece(b"event: response.failed\n" + event(failed))
            else:
                await connection.event(budget(80, wanted))
            await connection.end()

    async with stand(Limits(max_output_tokens=50), script=script) as one:
        good, name = (GOOD, "max_tokens") if path == CHAT else (GOOD_RESPONSE, "max_output_tokens")
        assert (await one.ask({**good, "stream": stream}, path)).status_code == 200
        assert (await one.ask({**good, "stream": stream, name: 10**6}, path)).status_code == 200
        assert [received[name] for received in one.upstream.received] == [50, 20, 50, 20]
        refused = await one.ask({**good, "stream": stream, name: 30}, path)
        assert told(refused) == (400, "context_length_exceeded")
        assert "80 tokens of conversation and up to 30 of answer" in refused.json()["error"]["message"]


async def test_schemas_are_where_the_runtime_looks_for_them(one: Stand) -> None:
    await one.ask(schema({"type": "object"}))
    assert one.upstream.received[0]["response_format"] == {"type": "json_schema", "json_schema": {"type": "object"}}
