"""The proxy before a scripted runtime: what it lets through, what it answers, what it counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from slmops.serving import proxy, relay
from slmops.serving.fleet import Unavailable, UnknownModel
from slmops.serving.limits import Limits
from tests.upstream import (
    CHAT,
    FOUNDRY_ID,
    GOOD,
    GOOD_RESPONSE,
    RESPONSES,
    USAGE,
    Connection,
    Stand,
    answer,
    chunk,
    event,
    stand,
)

Test = Callable[[Stand], Awaitable[None]]


def run(test: Test, limits: Limits | None = None, **options: Any) -> None:
    async def standing() -> None:
        async with asyncio.timeout(20), stand(limits, **options) as one:
            await test(one)

    asyncio.run(standing())


def told(response: httpx.Response) -> tuple[int, str | None]:
    """Status and code of an error in OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("server_error" if response.status_code >= 500 else "invalid_request_error")
    return response.status_code, error["code"]


def chat(**fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields}


def response(**fields: Any) -> dict[str, Any]:
    return {**GOOD_RESPONSE, **fields}


def says(content: Any, role: Any = "user") -> dict[str, Any]:
    return chat(messages=[{"role": role, "content": content}])


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


def test_what_is_no_request_is_told_so_and_does_not_reach_the_runtime() -> None:
    async def test(one: Stand) -> None:
        for path, bads in ((CHAT, BAD), (RESPONSES, BAD_RESPONSES)):
            for name, (body, code, param) in bads.items():
                refused = await one.ask(body, path)
                assert told(refused) == (400, code), name
                assert refused.json()["error"]["param"] == param, name
        assert one.upstream.received == []
        assert one.fleet.leases == 0
        assert (await one.ask()).status_code == 200

    run(test)


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
def test_a_request_goes_on_with_all_that_it_has(asked: dict[str, Any], path: str) -> None:
    async def test(one: Stand) -> None:
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

    run(test)


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
def test_answers_are_limited(path: str, given: dict[str, Any], sent: dict[str, Any]) -> None:
    async def test(one: Stand) -> None:
        body = {**(GOOD if path == CHAT else GOOD_RESPONSE), **given}
        assert (await one.ask(body, path)).status_code == 200
        assert {key: value for key, value in one.upstream.received[0].items() if "token" in key} == sent

    run(test, Limits(max_output_tokens=50))


def budget(prompt: int, wanted: int) -> dict[str, Any]:
    message = (
        "Invalid request: search_options.cc:108 int fl::Validate(int64_t, int, int) request requires "
        f"{prompt + wanted} total tokens ({prompt} input + {wanted} output), which exceeds the model's maximum context "
        "length of 100 tokens"
    )
    return {"error": {"message": message, "code": None, "param": None, "type": "invalid_request_error"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_limit_of_ours_shrinks_to_the_room_that_is_left_but_not_the_clients(path: str, stream: bool) -> None:
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

    async def test(one: Stand) -> None:
        good, name = (GOOD, "max_tokens") if path == CHAT else (GOOD_RESPONSE, "max_output_tokens")
        assert (await one.ask({**good, "stream": stream}, path)).status_code == 200
        assert (await one.ask({**good, "stream": stream, name: 10**6}, path)).status_code == 200
        assert [received[name] for received in one.upstream.received] == [50, 20, 50, 20]
        refused = await one.ask({**good, "stream": stream, name: 30}, path)
        assert told(refused) == (400, "context_length_exceeded")
        assert "80 tokens of conversation and up to 30 of answer" in refused.json()["error"]["message"]

    run(test, Limits(max_output_tokens=50), script=script)


def test_schemas_are_where_the_runtime_looks_for_them() -> None:
    async def test(one: Stand) -> None:
        await one.ask(schema({"type": "object"}))
        assert one.upstream.received[0]["response_format"] == {"type": "json_schema", "json_schema": {"type": "object"}}

    run(test)


# --- streams


@pytest.mark.parametrize("wanted", [False, True])
def test_a_stream_passes_as_it_is_and_its_tokens_are_counted(wanted: bool) -> None:
    async def test(one: Stand) -> None:
        options = {"stream_options": {"include_usage": True}} if wanted else {}
        answered = await one.ask(chat(stream=True, **options))
        assert answered.headers["content-type"].startswith("text/event-stream")
        assert answered.headers["x-slmops-version"] == "3"
        events = [event(chunk(letter)) for letter in "abc"]
        usage = [event(chunk(None, usage=USAGE))] if wanted else []
        assert answered.content == b": keep-alive\n\n" + b"".join(events + usage) + b"data: [DONE]\n\n"
        assert one.upstream.received[0]["stream_options"] == {"include_usage": True}
        assert await one.metric("slmops_prompt_tokens_total") == 7
        assert await one.metric("slmops_completion_tokens_total") == 3
        assert await one.metric("slmops_first_token_seconds_count") == 1

    run(test)


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_events_are_found_however_the_stream_is_cut(size: int) -> None:
    events = event(chunk("a")) + event(chunk("b")) + event(chunk(None, usage=USAGE)) + b"data: [DONE]\n\n"

    async def script(connection: Connection) -> None:
        await connection.head()
        for start in range(0, len(events), size):
            await connection.piece(events[start : start + size])
            await asyncio.sleep(0)
        await connection.end()

    async def test(one: Stand) -> None:
        answered = await one.ask(chat(stream=True))
        assert answered.content == event(chunk("a")) + event(chunk("b")) + b"data: [DONE]\n\n"
        assert await one.metric("slmops_completion_tokens_total") == 3

    run(test, script=script)


def test_an_answer_that_speaks_of_events_is_none() -> None:
    text = 'data: {"error": 1}\n\nevent: response.failed\n\n"usage":{} "choices":[] "delta"'

    async def script(connection: Connection) -> None:
        await connection.head()
        await connection.event(chunk(text))
        await connection.end()

    async def test(one: Stand) -> None:
        answered = await one.ask(chat(stream=True))
        assert answered.content == event(chunk(text))
        assert await one.metric(f'slmops_requests_total{{endpoint="{CHAT}",status="200",version="3"}}') == 1

    run(test, script=script)


def test_tokens_of_responses_are_counted() -> None:
    usage = {"input_tokens": 5, "output_tokens": 4}

    async def script(connection: Connection) -> None:
        if not connection.body.get("stream"):
            await connection.whole({"usage": usage})
            return
        await connection.head()
        zero = {"input_tokens": 0, "output_tokens": 0}
        await connection.piece(b"event: response.created\n" + event({"response": {"usage": zero}}))
        await connection.piece(b"event: response.output_text.delta\n" + event({"delta": "a"}))
        await connection.piece(b"event: response.completed\n" + event({"response": {"usage": usage}}))
        await connection.end()

    async def test(one: Stand) -> None:
        assert (await one.ask(GOOD_RESPONSE, RESPONSES)).json() == {"usage": usage}
        streamed = await one.ask({**GOOD_RESPONSE, "stream": True}, RESPONSES)
        assert streamed.text.count("event: ") == 3
        assert "stream_options" not in one.upstream.received[1]
        assert await one.metric("slmops_prompt_tokens_total") == 10
        assert await one.metric("slmops_completion_tokens_total") == 8

    run(test, script=script)


# --- when the runtime fails

SIGNED = "Inference failed: a.cc:1 X<fl::Y> fl::{anonymous}::F(std::function<void(int)> f, int)::<lambda(int)> "


@pytest.mark.parametrize(
    ("status", "error", "expected", "message"),
    [
        (400, {"message": SIGNED + "top_k is negative (-1)", "code": None}, (400, None), "top_k is negative (-1)"),
        (404, {"message": "Previous response not found", "code": None}, (404, None), "Previous response not found"),
        (500, {"message": SIGNED + "Error creating grammar: no"}, (400, "invalid_value"), "Error creating grammar: no"),
        (500, {"message": SIGNED + "out of memory"}, (502, "backend_error"), "The runtime failed: out of memory"),
        (500, "x", (502, "backend_error"), "The runtime failed: it does not say why"),
    ],
)
def test_errors_of_the_runtime_are_told(
    status: int, error: Any, expected: tuple[int, str | None], message: str
) -> None:
    async def test(one: Stand) -> None:
        for stream in (False, True):
            refused = await one.ask(chat(stream=stream))
            assert told(refused) == expected
            assert refused.json()["error"]["message"] == message

    async def script(connection: Connection) -> None:
        await connection.whole({"error": error}, status)

    run(test, script=script)


def test_what_the_web_server_itself_says_is_told() -> None:
    async def script(connection: Connection) -> None:
        await connection.whole(b"server=oatpp/1.3.0\ncode=500\nmessage=[json.exception.type_error.302] no\n", 500)

    async def test(one: Stand) -> None:
        assert told(await one.ask()) == (400, "invalid_value")

    run(test, script=script)


def test_an_error_that_a_stream_begins_with_has_its_status() -> None:
    async def script(connection: Connection) -> None:
        await connection.head()
        await connection.event({"error": {"message": SIGNED + connection.body["user"], "type": "server_error"}})
        await connection.end()

    async def test(one: Stand) -> None:
        assert told(await one.ask(chat(stream=True, user="Error creating grammar"))) == (400, "invalid_value")
        assert told(await one.ask(chat(stream=True, user="sad"))) == (502, "backend_error")

    run(test, script=script)


def test_an_error_in_a_stream_is_counted() -> None:
    async def script(connection: Connection) -> None:
        await connection.head()
        await connection.event(chunk("a"))
        await connection.event({"error": {"message": "sad"}})
        await connection.end()

    async def test(one: Stand) -> None:
        assert (await one.ask(chat(stream=True))).text.endswith('data: {"error":{"message":"sad"}}\n\n')
        assert await one.metric(f'slmops_requests_total{{endpoint="{CHAT}",status="502",version="3"}}') == 1

    run(test, script=script)


@pytest.mark.parametrize("stream", [False, True])
def test_a_runtime_that_dies_before_its_answer_is_a_502_and_the_next_is_answered(stream: bool) -> None:
    async def script(connection: Connection) -> None:
        if connection.body.get("user") == "killer":
            raise ConnectionResetError
        await answer(connection)

    async def test(one: Stand) -> None:
        assert told(await one.ask(chat(stream=stream, user="killer"))) == (502, "backend_error")
        assert (await one.ask(chat(stream=stream))).status_code == 200

    run(test, script=script)


def test_a_runtime_that_is_not_there_is_a_503() -> None:
    async def test(one: Stand) -> None:
        one.fleet.backend.url = "http://127.0.0.1:9"
        for stream in (False, True):
            refused = await one.ask(chat(stream=stream))
            assert told(refused) == (503, "unavailable")
            assert int(refused.headers["retry-after"]) > 0

    run(test)


def test_a_stream_that_breaks_ends_with_an_error() -> None:
    async def script(connection: Connection) -> None:
        await connection.head()
        await connection.event(chunk("a"))
        raise ConnectionResetError

    async def test(one: Stand) -> None:
        answered = await one.ask(chat(stream=True))
        assert answered.status_code == 200
        first, last, rest = answered.text.split("\n\n")
        assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["content"] == "a"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "backend_error"
        assert rest == ""
        assert await one.metric(f'slmops_requests_total{{endpoint="{CHAT}",status="502",version="3"}}') == 1

    run(test, script=script)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UnknownModel("There is no model 'x'."), (404, "model_not_found")),
        (Unavailable("It is being restarted.", retry_after_s=2.5), (503, "unavailable")),
    ],
)
def test_what_the_fleet_refuses_is_told(error: Any, expected: tuple[int, str]) -> None:
    async def test(one: Stand) -> None:
        one.fleet.refuses = error
        for stream in (False, True):
            refused = await one.ask(chat(stream=stream))
            assert told(refused) == expected
            assert refused.headers.get("retry-after") == ("3" if expected[0] == 503 else None)
        one.fleet.refuses = None
        assert (await one.ask()).status_code == 200

    run(test)


# --- limits of time and number


async def held(connection: Connection) -> None:
    """Stream for as long as somebody listens."""
    await connection.head()
    while True:
        await connection.event(chunk("a"))
        await asyncio.sleep(0.01)


async def held_whole(connection: Connection) -> None:
    """Answer as a whole, when it is let go."""
    await connection.let_go.wait()
    await answer(connection)


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(5):
        while not await true():
            await asyncio.sleep(0.01)


async def in_flight(one: Stand) -> tuple[float, float]:
    return await one.metric("slmops_in_flight"), await one.metric("slmops_queued")


def test_a_client_that_leaves_a_stream_stops_the_runtime() -> None:
    async def test(one: Stand) -> None:
        async with one.client.stream("POST", CHAT, json=chat(stream=True)) as streaming:
            pieces = streaming.aiter_raw()  # who drops it leaves
            await anext(pieces)
            assert await in_flight(one) == (1, 0)
        await asyncio.wait_for(one.upstream.left.wait(), 2)
        await until(lambda: equals(one, (0, 0)))
        assert await one.metric(f'slmops_requests_total{{endpoint="{CHAT}",status="499",version="3"}}') == 1

    run(test, Limits(concurrency=1), script=held)


async def equals(one: Stand, expected: tuple[float, float]) -> bool:
    return await in_flight(one) == expected


async def leave(one: Stand, **fields: Any) -> asyncio.Task[httpx.Response]:
    """A request that somebody has sent; cancel it, and its client is gone."""
    before = len(one.upstream.received) + (await in_flight(one))[1]
    task = asyncio.create_task(one.ask(chat(**fields)))

    async def there() -> bool:
        return len(one.upstream.received) + (await in_flight(one))[1] > before

    await until(there)
    return task


def test_a_client_that_leaves_a_whole_answer_leaves_its_slot_taken() -> None:
    async def test(one: Stand) -> None:
        gone = await leave(one)
        gone.cancel()
        waits = await leave(one)
        await asyncio.sleep(0.1)
        assert await in_flight(one) == (1, 1)
        assert one.fleet.leases == 2
        one.upstream.let_go.set()
        assert (await waits).status_code == 200
        assert await in_flight(one) == (0, 0)
        assert await one.metric("slmops_completion_tokens_total") == 6

    run(test, Limits(concurrency=1), script=held_whole)


def test_a_client_that_leaves_the_queue_leaves_its_place() -> None:
    async def test(one: Stand) -> None:
        first, second = await leave(one), await leave(one)
        assert told(await one.ask()) == (503, "overloaded")
        second.cancel()
        await until(lambda: equals(one, (1, 0)))
        third = await leave(one)
        one.upstream.let_go.set()
        assert [(await task).status_code for task in (first, third)] == [200, 200]
        assert len(one.upstream.received) == 2

    run(test, Limits(concurrency=1, queue=1), script=held_whole)


def test_a_full_queue_is_a_503_at_once_and_the_others_are_answered_in_turn() -> None:
    async def test(one: Stand) -> None:
        tasks = [await leave(one, user=str(number)) for number in range(4)]
        refused = await one.ask()
        assert told(refused) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) > 0
        assert await in_flight(one) == (2, 2)
        one.upstream.let_go.set()
        assert {(await task).status_code for task in tasks} == {200}
        assert [received["user"] for received in one.upstream.received] == ["0", "1", "2", "3"]

    run(test, Limits(concurrency=2, queue=2), script=held_whole)


def test_too_long_in_the_queue_is_a_503() -> None:
    async def test(one: Stand) -> None:
        first = await leave(one)
        for stream in (False, True):
            assert told(await one.ask(chat(stream=stream))) == (503, "overloaded")
        one.upstream.let_go.set()
        assert (await first).status_code == 200

    run(test, Limits(concurrency=1, queue_timeout_s=0.1), script=held_whole)


def test_a_version_that_takes_long_to_load_takes_no_slot() -> None:
    async def test(one: Stand) -> None:
        one.fleet.loads_s = 1
        loads = asyncio.create_task(one.ask())
        await until(lambda: equals(one, (0, 1)))
        one.fleet.loads_s = 0
        assert (await one.ask()).status_code == 200
        refused = await loads
        assert told(refused) == (503, "overloaded")
        assert "was not loaded within 0.3 s" in refused.json()["error"]["message"]

    run(test, Limits(concurrency=1, queue_timeout_s=0.3))


def test_a_whole_answer_that_takes_too_long_is_a_504_and_keeps_its_slot() -> None:
    async def test(one: Stand) -> None:
        refused = await one.ask()
        assert told(refused) == (504, "timeout")
        assert refused.headers["x-should-retry"] == "false"
        assert await in_flight(one) == (1, 0)
        one.upstream.let_go.set()
        await until(lambda: equals(one, (0, 0)))
        assert (await one.ask()).status_code == 200

    run(test, Limits(concurrency=1, request_timeout_s=0.3), script=held_whole)


def test_a_runtime_that_hangs_does_not_keep_its_slot_for_ever() -> None:
    async def test(one: Stand) -> None:
        assert told(await one.ask()) == (504, "timeout")
        await until(lambda: equals(one, (0, 0)))

    run(test, Limits(concurrency=1, request_timeout_s=0.2), script=held_whole)


def test_a_stream_that_takes_too_long_ends_with_an_error_and_stops_the_runtime() -> None:
    async def test(one: Stand) -> None:
        answered = await one.ask(chat(stream=True))
        assert answered.status_code == 200
        events = answered.text.rstrip("\n").split("\n\n")
        assert len(events) > 3
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        await asyncio.wait_for(one.upstream.left.wait(), 2)
        assert await in_flight(one) == (0, 0)
        assert await one.metric(f'slmops_requests_total{{endpoint="{CHAT}",status="504",version="3"}}') == 1

    run(test, Limits(concurrency=1, request_timeout_s=0.3), script=held)


def test_what_nobody_waits_for_is_broken_off_when_the_service_ends() -> None:
    async def script(_: Connection) -> None:
        await asyncio.Event().wait()

    async def test(one: Stand) -> None:
        gone = await leave(one)
        gone.cancel()
        await asyncio.sleep(0.1)
        assert await in_flight(one) == (1, 0)  # and none when it has ended

    run(test, script=script)


def test_a_client_that_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def script(connection: Connection) -> None:
        await connection.head()
        while True:
            await connection.event(chunk("a" * 100_000))

    async def test(one: Stand) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port, limit=1000)
        body = json.dumps(chat(stream=True)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await asyncio.wait_for(one.upstream.left.wait(), 5)
        await until(lambda: equals(one, (0, 0)))
        await asyncio.sleep(0.2)
        await reader.readuntil(b"\r\n")
        writer.close()

    monkeypatch.setattr(relay, "LAST_WORDS_S", 0.1)
    run(test, Limits(concurrency=1, request_timeout_s=0.3), script=script)
    assert not any(record.exc_info for record in caplog.records)


# --- bodies


def test_a_body_that_is_too_large_is_a_413_whoever_sends_it_how() -> None:
    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * 1000

    async def test(one: Stand) -> None:
        large = says("a" * 1_000_000)
        refused = await one.ask(large)
        assert told(refused) == (413, "request_too_large")
        assert refused.headers["connection"] == "close"
        headers = {"content-type": "application/json"}
        refused = await one.client.post(CHAT, content=pieces(1000), headers=headers)
        assert told(refused) == (413, "request_too_large")
        # With Expect the client waits for leave, and hears the answer before it has sent anything.
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        writer.write(
            f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            "expect: 100-continue\r\ncontent-length: 1000000000\r\n\r\n".encode()
        )
        assert (await asyncio.wait_for(reader.readline(), 1)).startswith(b"HTTP/1.1 413")
        writer.close()
        assert one.upstream.received == []
        fits = says("a" * (10_000 - len(json.dumps(says("")))))
        assert (await one.ask(fits)).status_code == 200

    run(test, Limits(max_body_kb=10))


def test_an_endless_body_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(one: Stand) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        writer.write(
            f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            "transfer-encoding: chunked\r\n\r\n".encode()
        )

        async def send() -> None:
            while True:
                writer.write(b"2710\r\n" + b" " * 10_000 + b"\r\n")
                await writer.drain()

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(send(), 5)
        writer.close()
        assert reader is not None

    monkeypatch.setattr(proxy, "DRAIN_BYTES", 100_000)
    run(test, Limits(max_body_kb=1))


def test_a_body_that_does_not_come_is_a_408_and_takes_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(one: Stand) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        writer.write(
            f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            "content-length: 100\r\n\r\n{".encode()
        )
        assert (await one.ask()).status_code == 200
        assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 408")
        assert await asyncio.wait_for(reader.read(), 5)  # to its end: the connection is closed
        writer.close()

    monkeypatch.setattr(proxy, "BODY_S", 0.2)
    run(test, Limits(concurrency=1, queue=0))


# --- who may come in


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("", 415),
        ("application/jsonp", 415),
    ],
)
def test_only_json_is_taken(kind: str, status: int) -> None:
    async def test(one: Stand) -> None:
        refused = await one.ask(headers={"content-type": kind})
        assert refused.status_code == status
        assert status == 200 or told(refused) == (415, "unsupported_media_type")

    run(test)


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ({}, False),
        ({"authorization": "Bearer s\u00e9cret".encode()}, True),
        ({"authorization": "bearer  s\u00e9cret".encode()}, True),
        ({"authorization": b"Bearer secret"}, False),
        ({"authorization": b"Bearer"}, False),
        ({"authorization": "Basic s\u00e9cret".encode()}, False),
        ({"authorization": "s\u00e9cret".encode()}, False),
    ],
)
def test_a_token_guards_all_but_health(header: dict[str, Any], allowed: bool) -> None:
    async def test(one: Stand) -> None:
        for method, path, fine in (
            ("POST", CHAT, 415),
            ("GET", "/v1/models", 200),
            ("GET", "/metrics", 200),
            ("GET", "/nothing", 404),
        ):
            answered = await one.client.request(method, path, headers=header)
            assert answered.status_code == (fine if allowed else 401)
            if not allowed:
                assert told(answered) == (401, "invalid_api_key")
                assert answered.headers["www-authenticate"] == "Bearer"
        assert (await one.client.get("/health", headers=header)).status_code == 200

    run(test, token="s\u00e9cret")


@pytest.mark.parametrize(
    ("host", "local", "allowed"),
    [
        ("127.0.0.1:8080", True, True),
        ("localhost", True, True),
        ("LOCALHOST:1", True, True),
        ("[::1]:8080", True, True),
        ("evil.example", True, False),
        ("evil.example:8080", True, False),
        ("127.0.0.1.evil.example", True, False),
        ("localhost:8080@evil.example", True, False),
        ("", True, False),
        ("server.example:8080", False, True),
    ],
)
def test_a_service_on_loopback_answers_to_no_other_name(host: str, local: bool, allowed: bool) -> None:
    async def test(one: Stand) -> None:
        for path in ("/v1/models", "/health"):
            answered = await one.client.get(path, headers={"host": host})
            assert allowed or told(answered) == (421, "wrong_host")
            assert answered.status_code == (200 if allowed else 421)

    run(test, local=local)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", CHAT, (405, "method_not_allowed")),
        ("DELETE", "/v1/models", (405, "method_not_allowed")),
        ("OPTIONS", RESPONSES, (405, "method_not_allowed")),
        ("POST", "/shutdown", (404, "not_found")),
        ("GET", "/status", (404, "not_found")),
        ("GET", "/v1/models/", (404, "not_found")),
        ("GET", "/v1/models/x", (404, "model_not_found")),
        ("POST", "/v1//chat/completions", (404, "not_found")),
        ("GET", "/v1/models/..%2f..%2fetc", (404, "not_found")),
    ],
)
def test_nothing_else_is_here(method: str, path: str, expected: tuple[int, str]) -> None:
    async def test(one: Stand) -> None:
        answered = await one.client.request(method, path)
        assert told(answered) == expected
        assert (expected[0] == 405) == ("allow" in answered.headers)

    run(test)


# --- what it tells of itself


def test_models_and_health() -> None:
    async def test(one: Stand) -> None:
        listed = (await one.client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert [model["id"] for model in listed["data"]] == ["bot", "bot:3"]
        assert (await one.client.get("/v1/models/bot:3")).json() == listed["data"][1]
        healthy = await one.client.get("/health")
        assert (healthy.status_code, healthy.json()) == (200, {"status": "ok", "model": "bot", "version": 3})
        assert "server" not in healthy.headers
        one.fleet.ready = False
        ill = await one.client.get("/health")
        assert (ill.status_code, ill.json()) == (503, {"status": "unavailable", "model": "bot", "version": None})

    run(test)


def test_metrics_count_what_happened_and_name_nothing_of_the_clients() -> None:
    async def test(one: Stand) -> None:
        await one.ask()
        await one.ask(chat(model="secret-model"))
        await one.ask(chat(stream=True))
        await one.client.get("/secret-path")
        text = (await one.client.get("/metrics")).text
        assert "secret" not in text
        for sample in (
            f'slmops_requests_total{{endpoint="{CHAT}",status="200",version="3"}} 2.0',
            f'slmops_requests_total{{endpoint="{CHAT}",status="404",version=""}} 1.0',
            'slmops_requests_total{endpoint="other",status="404",version=""} 1.0',
            f'slmops_request_seconds_count{{endpoint="{CHAT}"}} 3.0',
            "slmops_first_token_seconds_count 1.0",
            "slmops_prompt_tokens_total 14.0",
            "slmops_completion_tokens_total 6.0",
            "slmops_in_flight 0.0",
            "slmops_queued 0.0",
            f'slmops_backend_memory_bytes{{foundry_id="{FOUNDRY_ID}"}} 5e+08',
            'slmops_model_info{model="bot",variant="int8",version="3"} 1.0',
            "slmops_switches_total 2.0",
            "slmops_backend_restarts_total 1.0",
            "slmops_ready 1.0",
            "slmops_registry_up 1.0",
        ):
            assert sample in text.splitlines(), sample
        one.fleet.ready = False
        text = (await one.client.get("/metrics")).text
        assert "slmops_model_info{" not in text
        assert "slmops_ready 0.0" in text

    run(test)
