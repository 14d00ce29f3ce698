"""Answers on their way back: streams, failures of the runtime, the queue, clients that leave, and time limits."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from slmops.serving import relay
from slmops.serving.limits import Serve
from slmops.serving.requests import Refused, not_now
from tests import upstream
from tests.upstream import CHAT, RESPONSES, Stand, chat, chunk, event, held, replies, response, stand, streams, told

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("wanted", [False, True])
async def test_a_stream_passes_as_it_is_and_its_tokens_are_counted(one: Stand, wanted: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if wanted else {}
    answered = await one.ask(chat(stream=True, **options))
    assert answered.headers["content-type"].startswith("text/event-stream")
    assert answered.headers["x-slmops-version"] == "3"
    events = [event(chunk(letter)) for letter in "abc"]
    usage = [event(chunk(None, usage=upstream.USAGE))] if wanted else []
    assert answered.content == b": keep-alive\n\n" + b"".join(events + usage) + b"data: [DONE]\n\n"
    assert one.upstream.received[0]["stream_options"] == {"include_usage": True}
    for name, count in (("prompt_tokens_total", 7), ("completion_tokens_total", 3), ("first_token_seconds_count", 1)):
        assert await one.metric(f"slmops_{name}") == count


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
async def test_events_are_found_however_the_stream_is_cut(size: int) -> None:
    events = event(chunk("a")) + event(chunk("b")) + event(chunk(None, usage=upstream.USAGE)) + b"data: [DONE]\n\n"
    cut = [events[start : start + size] for start in range(0, len(events), size)]
    async with stand(script=streams(*cut)) as one:
        answered = await one.ask(chat(stream=True))
        assert answered.content == event(chunk("a")) + event(chunk("b")) + b"data: [DONE]\n\n"
        assert await one.metric("slmops_completion_tokens_total") == 3


async def test_an_answer_that_speaks_of_events_is_none_and_tokens_of_responses_are_counted(one: Stand) -> None:
    said = event(chunk('data: {"error": 1}\n\nevent: response.failed\n\n"usage":{} "choices":[] "delta"'))
    one.upstream.script = streams(said)
    assert (await one.ask(chat(stream=True))).content == said
    assert await one.counted(200) == 1
    usage = {"input_tokens": 5, "output_tokens": 4}
    one.upstream.script = replies({"usage": usage})
    assert (await one.ask(response(), RESPONSES)).json() == {"usage": usage}
    one.upstream.script = streams(
        b"event: response.created\n" + event({"response": {"usage": dict.fromkeys(usage, 0)}}),
        b"event: response.output_text.delta\n" + event({"delta": "a"}),
        b"event: response.completed\n" + event({"response": {"usage": usage}}),
    )
    streamed = await one.ask(response(stream=True), RESPONSES)
    assert streamed.text.count("event: ") == 3
    assert "stream_options" not in one.upstream.received[2]
    assert await one.metric("slmops_prompt_tokens_total") == 10
    assert await one.metric("slmops_completion_tokens_total") == 8


SIGNED = "Inference failed: a.cc:1 X<fl::Y> fl::{anonymous}::F(std::function<void(int)> f, int)::<lambda(int)> "


@pytest.mark.parametrize(
    ("status", "error", "expected", "message"),
    [
        (400, {"message": SIGNED + "top_k is negative (-1)", "code": None}, (400, None), "top_k is negative (-1)"),
        (500, {"message": SIGNED + "Error creating grammar: no"}, (400, "invalid_value"), "Error creating grammar: no"),
        (500, {"message": SIGNED + "Model emitted an invalid tool call: x"}, (422, "invalid_tool_call"), None),
        (500, {"message": "tool_call_plan.cc:3 F() /x not allowed"}, (422, "invalid_tool_call"), None),
        (500, {"message": SIGNED + "out of memory"}, (502, "backend_error"), "The runtime failed: out of memory"),
        (500, "x", (502, "backend_error"), "The runtime failed: it does not say why"),
        (500, b"server=oatpp/1.3.0\ncode=500\nmessage=[json.exception.1] no\n", (400, "invalid_value"), None),
    ],
)
async def test_errors_of_the_runtime_are_told(
    status: int, error: Any, expected: tuple[int, str | None], message: str | None
) -> None:
    async with stand(script=replies(error if isinstance(error, bytes) else {"error": error}, status)) as one:
        for stream in (False, True):
            refused = await one.ask(chat(stream=stream))
            assert told(refused) == expected
            assert message in (None, refused.json()["error"]["message"])


async def test_an_error_that_a_stream_begins_with_has_its_status_and_a_later_one_is_counted(one: Stand) -> None:
    for message, expected in (("Error creating grammar", (400, "invalid_value")), ("sad", (502, "backend_error"))):
        one.upstream.script = streams(event({"error": {"message": SIGNED + message, "type": "server_error"}}))
        assert told(await one.ask(chat(stream=True))) == expected
    before = await one.counted(502)
    one.upstream.script = streams(event(chunk("a")), event({"error": {"message": "sad"}}))
    assert (await one.ask(chat(stream=True))).text.endswith('data: {"error":{"message":"sad"}}\n\n')
    assert await one.counted(502) == before + 1


async def dies(connection: upstream.Connection) -> None:
    """Break off, in the middle of an answer if one was wanted."""
    if connection.body.get("user"):
        await connection.piece(event(chunk("a")))
    raise ConnectionResetError


@pytest.mark.parametrize(
    ("name", "fault", "expected", "retry_after"),
    [
        ("script", dies, (502, "backend_error"), None),
        ("url", "http://127.0.0.1:9", (503, "unavailable"), "3"),  # the runtime is not there
        ("refuses", Refused(404, "There is no model 'x'.", "model_not_found"), (404, "model_not_found"), None),
        ("refuses", not_now("It is being restarted.", 2.5), (503, "unavailable"), "3"),
    ],
)
async def test_a_request_that_fails_is_told_and_the_next_is_answered(
    one: Stand, name: str, fault: Any, expected: tuple[int, str], retry_after: str | None
) -> None:
    place = {"script": one.upstream, "url": one.fleet.backend, "refuses": one.fleet}[name]
    before = getattr(place, name)
    for stream in (False, True):
        setattr(place, name, fault)
        refused = await one.ask(chat(stream=stream))
        assert (told(refused), refused.headers.get("retry-after")) == (expected, retry_after)
        setattr(place, name, before)
        assert (await one.ask(chat(stream=stream))).status_code == 200


async def test_a_stream_that_breaks_ends_with_an_error(one: Stand) -> None:
    one.upstream.script = dies
    answered = await one.ask(chat(stream=True, user="midway"))
    assert answered.status_code == 200
    first, last, rest = answered.content.split(b"\n\n")
    assert first + b"\n\n" == event(chunk("a"))
    assert (json.loads(last.removeprefix(b"data: "))["error"]["code"], rest) == ("backend_error", b"")
    assert await one.counted(502) == 1


async def leave(one: Stand, **fields: Any) -> asyncio.Task[httpx.Response]:
    """A request that somebody has sent; cancel it, and its client is gone."""

    async def there() -> float:
        return len(one.upstream.received) + (await one.in_flight())[1]

    before = await there()
    task = asyncio.create_task(one.ask(chat(**fields)))
    async with asyncio.timeout(5):
        while await there() <= before:
            await asyncio.sleep(0.01)
    return task


async def test_a_client_that_leaves_stops_a_stream_and_leaves_the_slot_of_a_whole_answer_taken() -> None:
    async with stand(Serve(concurrency=1), script=upstream.endless) as one:
        async with one.client.stream("POST", CHAT, json=chat(stream=True)) as streaming:
            pieces = streaming.aiter_raw()  # who drops it leaves
            await anext(pieces)
            assert await one.in_flight() == (1, 0)
        await asyncio.wait_for(one.upstream.left.wait(), 2)
        await one.reaches(0, 0)
        assert await one.counted(499) == 1
        one.upstream.script = held
        (await leave(one)).cancel()
        waits = await leave(one)
        await asyncio.sleep(0.1)
        assert await one.in_flight() == (1, 1)
        assert one.fleet.backend.in_flight == 2
        one.upstream.let_go.set()
        assert ((await waits).status_code, await one.in_flight()) == (200, (0, 0))
        assert await one.metric("slmops_completion_tokens_total") == 6


async def test_a_full_queue_is_a_503_at_once_and_the_others_are_answered_in_turn() -> None:
    async with stand(Serve(concurrency=2, queue=2), script=held) as one:
        tasks = [await leave(one, user=str(number)) for number in range(4)]
        refused = await one.ask()
        assert told(refused) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) > 0
        assert await one.in_flight() == (2, 2)
        tasks.pop(2).cancel()  # a client that leaves the queue leaves its place
        await one.reaches(2, 1)
        tasks.append(await leave(one, user="4"))
        one.upstream.let_go.set()
        assert {(await task).status_code for task in tasks} == {200}
        assert [received["user"] for received in one.upstream.received] == ["0", "1", "3", "4"]


async def test_too_long_in_the_queue_is_a_503_and_a_version_that_takes_long_to_load_takes_no_slot() -> None:
    async with stand(Serve(concurrency=1, queue_timeout_s=0.3), script=held) as one:
        first = await leave(one)
        for stream in (False, True):
            assert told(await one.ask(chat(stream=stream))) == (503, "overloaded")
        one.upstream.let_go.set()
        assert (await first).status_code == 200
        one.fleet.loads_s = 1
        loads = asyncio.create_task(one.ask())
        await one.reaches(0, 1)
        one.fleet.loads_s = 0
        assert (await one.ask()).status_code == 200
        refused = await loads
        assert told(refused) == (503, "overloaded")
        assert "was not loaded within 0.3 s" in refused.json()["error"]["message"]


async def test_a_whole_answer_that_takes_too_long_is_a_504_and_a_stream_ends_with_an_error() -> None:
    async with stand(Serve(concurrency=1, request_timeout_s=0.3), script=held) as one:
        refused = await one.ask()
        assert told(refused) == (504, "timeout")
        assert refused.headers["x-should-retry"] == "false"
        assert await one.in_flight() == (1, 0)
        await one.reaches(0, 0)  # a runtime that hangs does not keep it for ever
        one.upstream.let_go.set()
        assert (await one.ask()).status_code == 200
        one.upstream.script = upstream.endless
        one.upstream.left.clear()
        answered = await one.ask(chat(stream=True))
        assert answered.status_code == 200
        events = answered.text.rstrip("\n").split("\n\n")
        assert len(events) > 3
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        await asyncio.wait_for(one.upstream.left.wait(), 2)
        assert (await one.in_flight(), await one.counted(504)) == ((0, 0), 2)


async def test_what_nobody_waits_for_is_broken_off_when_the_service_ends() -> None:
    async with stand(script=lambda _: asyncio.Event().wait()) as one:
        (await leave(one)).cancel()
        await asyncio.sleep(0.1)
        assert await one.in_flight() == (1, 0)  # and none when it has ended


async def test_a_client_that_does_not_read_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(relay, "LAST_WORDS_S", 0.1)
    limits = Serve(concurrency=1, request_timeout_s=0.3)
    async with stand(limits, script=lambda to: upstream.endless(to, "a" * 100_000)) as one:
        body = json.dumps(chat(stream=True)).encode()
        reader, writer = await one.post(f"content-length: {len(body)}", body=body, limit=1000)
        await asyncio.wait_for(one.upstream.left.wait(), 5)
        await one.reaches(0, 0)
        await asyncio.sleep(0.2)
        await reader.readuntil(b"\r\n")
        writer.close()
    assert not any(record.exc_info for record in caplog.records)
