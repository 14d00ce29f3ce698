"""Who may come in, what the proxy lets through to the runtime and what it refuses, and what it tells of itself."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from slmops.serving import proxy
from slmops.serving.limits import Serve
from tests import upstream
from tests.upstream import CHAT, FOUNDRY_ID, GOOD, RESPONSES, Stand, answer, chat, event, response, says, stand, told

pytestmark = pytest.mark.anyio


async def test_a_body_that_is_too_large_is_a_413_however_it_is_sent() -> None:
    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * 1000

    async with stand(Serve(max_body_kb=10)) as one:
        refused = await one.ask(says("a" * 1_000_000))
        assert told(refused) == (413, "request_too_large")
        assert refused.headers["connection"] == "close"
        refused = await one.client.post(CHAT, content=pieces(1000), headers={"content-type": "application/json"})
        assert told(refused) == (413, "request_too_large")
        # With Expect the client waits for leave, and hears the answer before it has sent anything.
        reader, writer = await one.post("expect: 100-continue", "content-length: 1000000")
        assert (await asyncio.wait_for(reader.readline(), 1)).startswith(b"HTTP/1.1 413")
        writer.close()
        assert one.upstream.received == []
        fits = says("a" * (10_000 - len(json.dumps(says("")))))
        assert (await one.ask(fits)).status_code == 200


async def test_a_body_that_does_not_come_is_a_408_and_takes_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "BODY_S", 0.2)
    async with stand(Serve(concurrency=1, queue=0)) as one:
        reader, writer = await one.post("content-length: 100", body=b"{")
        assert (await one.ask()).status_code == 200
        assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 408")
        assert await asyncio.wait_for(reader.read(), 5)  # to its end: the connection is closed
        writer.close()


async def test_only_json_is_taken(one: Stand) -> None:
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        assert (await one.ask(headers={"content-type": kind})).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"):
        assert told(await one.ask(headers={"content-type": kind})) == (415, "unsupported_media_type"), kind


async def test_a_token_guards_all_but_health() -> None:
    guarded = {("POST", CHAT): 415, ("GET", "/v1/models"): 200, ("GET", "/metrics"): 200, ("GET", "/nothing"): 404}
    async with stand(token="s\u00e9cret") as one:
        for shown in ("Bearer s\u00e9cret", "bearer  s\u00e9cret"):
            for (method, path), status in guarded.items():
                answered = await one.client.request(method, path, headers={"authorization": shown.encode()})
                assert answered.status_code == status, (shown, path)
        for shown in ("", "Bearer secret", "Bearer", "Basic s\u00e9cret", "s\u00e9cret"):
            header: Any = {"authorization": shown.encode()} if shown else {}
            for method, path in guarded:
                refused = await one.client.request(method, path, headers=header)
                assert told(refused) == (401, "invalid_api_key"), (shown, path)
                assert refused.headers["www-authenticate"] == "Bearer"
            assert (await one.client.get("/health", headers=header)).status_code == 200


async def test_a_service_on_loopback_answers_to_no_other_name(one: Stand) -> None:
    for path in ("/v1/models", "/health"):
        for host in ("127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080"):
            assert (await one.client.get(path, headers={"host": host})).status_code == 200, host
        for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost:8080@evil.example", ""):
            assert told(await one.client.get(path, headers={"host": host})) == (421, "wrong_host"), host
    async with stand(local=False) as elsewhere:
        answered = await elsewhere.client.get("/v1/models", headers={"host": "server.example:8080"})
        assert answered.status_code == 200


async def test_models_and_health_and_nothing_else_are_here(one: Stand) -> None:
    for expected, wrong in {
        (405, "method_not_allowed"): (f"GET {CHAT}", "DELETE /v1/models", f"OPTIONS {RESPONSES}"),
        (404, "model_not_found"): ("GET /v1/models/x",),
        (404, "not_found"): (
            *("POST /shutdown", "GET /status", "GET /v1/models/", "POST /v1//chat/completions"),
            "GET /v1/models/..%2f..%2fetc",
        ),
    }.items():
        for asked in wrong:
            answered = await one.client.request(*asked.split())
            assert told(answered) == expected, asked
            assert (expected[0] == 405) == ("allow" in answered.headers)
    listed = (await one.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["bot", "bot:3"]
    assert (await one.client.get("/v1/models/bot:3")).json() == listed["data"][1]
    healthy = await one.client.get("/health")
    assert (healthy.status_code, healthy.json()) == (200, {"status": "ok", "model": "bot", "version": 3})
    assert "server" not in healthy.headers
    one.fleet.champion = None
    ill = await one.client.get("/health")
    assert (ill.status_code, ill.json()) == (503, {"status": "unavailable", "model": "bot", "version": None})


async def test_metrics_count_what_happened_and_name_nothing_of_the_clients(one: Stand) -> None:
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
        *("slmops_first_token_seconds_count 1.0", "slmops_in_flight 0.0", "slmops_queued 0.0"),
        *("slmops_prompt_tokens_total 14.0", "slmops_completion_tokens_total 6.0"),
        f'slmops_backend_memory_bytes{{foundry_id="{FOUNDRY_ID}"}} 2e+08',
        'slmops_model_info{model="bot",variant="int8",version="3"} 1.0',
        *("slmops_switches_total 2.0", "slmops_backend_restarts_total 1.0"),
        *("slmops_ready 1.0", "slmops_registry_up 1.0"),
    ):
        assert sample in text.splitlines(), sample
    one.fleet.champion = None
    text = (await one.client.get("/metrics")).text
    assert "slmops_model_info{" not in text
    assert "slmops_ready 0.0" in text


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
TOOL = {"type": "function", "function": {"name": "f"}}
FILE = {"role": "user", "content": [{"type": "input_file", "file_data": "AAAA"}]}
BAD: list[tuple[Any, str, str | None]] = [
    *((body, "invalid_json", None) for body in NO_JSON),
    ({"messages": GOOD["messages"]}, "missing_required_parameter", "model"),
    ({"model": "bot"}, "missing_required_parameter", "messages"),
    (chat(messages=[{"content": "x"}]), "missing_required_parameter", "messages.0.role"),
    *((body, "invalid_value", field) for field, bodies in WRONG.items() for body in bodies),
    *((schema(costly), "invalid_schema", "response_format") for costly in COSTLY),
    (chat(tools=[{"function": {"name": "f", "parameters": COSTLY[0]}, "type": "function"}]), "invalid_schema", "tools"),
    (chat(tools=[TOOL], response_format={"type": "json_object"}), "invalid_value", "tools"),
]
BAD_RESPONSES: list[tuple[Any, str, str | None]] = [
    ({"model": "bot"}, "missing_required_parameter", "input"),
    *((response(input=wrong), "invalid_value", "input") for wrong in (None, 1, [])),
    (response(input=[{"role": None, "content": "x"}]), "invalid_value", "input.0.role"),
    (response(input=[FILE]), "invalid_value", "input.0.content.0.type"),
    (response(input=[{"output": FILE["content"]}]), "invalid_value", "input.0.output.0.type"),  # of a tool
    (response(max_output_tokens=0), "invalid_value", "max_output_tokens"),
    (response(instructions=["x"]), "invalid_value", "instructions"),
    (response(text={"format": {"type": "lark_grammar"}}), "invalid_value", "text.format.type"),
    (response(text={"format": {"type": "json_schema", "schema": COSTLY[0]}}), "invalid_schema", "text"),
    (response(tools=[TOOL], text={"format": {"type": "json_schema", "schema": {}}}), "invalid_value", "tools"),
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
        (chat(tools=[TOOL], response_format={"type": "json_object"}, tool_choice="none"), CHAT),
        (chat(tools=[TOOL], response_format={"type": "text"}), CHAT),
        (chat(text=[-1, "a"]), CHAT),  # what the other endpoint calls so has no meaning here
        (chat(max_tokens=None, stop=None, tools=None, temperature=1, top_p=0.5, logit_bias={"5": 1}), CHAT),
        (chat(stop=["a"], tools=[], user="u", metadata={"a": "b", "top_k": "5"}, seed=1, store=True, zzz=[1]), CHAT),
        (schema({"properties": {"allOf": {"anyOf": [{"type": "string"}, {"type": "null"}], "title": "T"}}}), CHAT),
        (schema({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"minItems": 5, "enum": [{"allOf": 1}]}}}), CHAT),
        (response(input=[{"type": "function_call_output", "call_id": "a", "output": "x"}]), RESPONSES),
        (response(instructions="Be brief.", text={"format": {"type": "text"}}, previous_response_id="r"), RESPONSES),
        (response(response_format=[-1, "a"]), RESPONSES),
    ],
)
async def test_a_request_goes_on_with_all_that_it_has(one: Stand, asked: dict[str, Any], path: str) -> None:
    answered = await one.ask(asked, path)
    assert (answered.status_code, answered.headers["x-slmops-version"]) == (200, "3")
    assert answered.json()["model"] == FOUNDRY_ID
    [received] = one.upstream.received
    assert received.pop("model") == FOUNDRY_ID
    form = asked.get("response_format")
    wrapped = form and "json_schema" in form
    placed = {"response_format": {**form, "json_schema": form["json_schema"]["schema"]}} if wrapped else {}
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
                await connection.piece(event(budget(80, wanted)))

    async with stand(Serve(max_output_tokens=50), script=script) as one:
        good, name = (chat, "max_tokens") if path == CHAT else (response, "max_output_tokens")
        for limit in ({}, {name: 10**6}):
            assert (await one.ask(good(stream=stream, **limit), path)).status_code == 200
        assert [received[name] for received in one.upstream.received] == [50, 20, 50, 20]
        refused = await one.ask(good(stream=stream, **{name: 30}), path)
        assert told(refused) == (400, "context_length_exceeded")
        assert "80 tokens of conversation and up to 30 of answer" in refused.json()["error"]["message"]
