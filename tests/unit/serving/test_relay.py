"""Answers on their way back: streams, and what the runtime says when it fails."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slmops.serving.fleet import UnknownModel
from slmops.serving.spares import Unavailable
from tests.upstream import (
    GOOD_RESPONSE,
    RESPONSES,
    USAGE,
    Connection,
    Stand,
    answer,
    chat,
    chunk,
    event,
    replies,
    stand,
    streams,
    told,
)

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("wanted", [False, True])
async def test_a_stream_passes_as_it_is_and_its_tokens_are_counted(one: Stand, wanted: bool) -> None:
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


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
async def test_events_are_found_however_the_stream_is_cut(size: int) -> None:
    events = event(chunk("a")) + event(chunk("b")) + event(chunk(None, usage=USAGE)) + b"data: [DONE]\n\n"
    cut = [events[start : start + size] for start in range(0, len(events), size)]
    async with stand(script=streams(*cut)) as one:
        answered = await one.ask(chat(stream=True))
        assert answered.content == event(chunk("a")) + event(chunk("b")) + b"data: [DONE]\n\n"
        assert await one.metric("slmops_completion_tokens_total") == 3


async def test_an_answer_that_speaks_of_events_is_none() -> None:
    text = 'data: {"error": 1}\n\nevent: response.failed\n\n"usage":{} "choices":[] "delta"'
    async with stand(script=streams(event(chunk(text)))) as one:
        answered = await one.ask(chat(stream=True))
        assert answered.content == event(chunk(text))
        assert await one.counted(200) == 1


async def test_tokens_of_responses_are_counted() -> None:
    usage = {"input_tokens": 5, "output_tokens": 4}
    async with stand(script=replies({"usage": usage})) as one:
        assert (await one.ask(GOOD_RESPONSE, RESPONSES)).json() == {"usage": usage}
        one.upstream.script = streams(
            b"event: response.created\n" + event({"response": {"usage": dict.fromkeys(usage, 0)}}),
            b"event: response.output_text.delta\n" + event({"delta": "a"}),
            b"event: response.completed\n" + event({"response": {"usage": usage}}),
        )
        streamed = await one.ask({**GOOD_RESPONSE, "stream": True}, RESPONSES)
        assert streamed.text.count("event: ") == 3
        assert "stream_options" not in one.upstream.received[1]
        assert await one.metric("slmops_prompt_tokens_total") == 10
        assert await one.metric("slmops_completion_tokens_total") == 8


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


@pytest.mark.parametrize("stream", [False, True])
async def test_a_runtime_that_dies_before_its_answer_is_a_502_and_the_next_is_answered(stream: bool) -> None:
    async def script(connection: Connection) -> None:
        if connection.body.get("user") == "killer":
            raise ConnectionResetError
        await answer(connection)

    async with stand(script=script) as one:
        assert told(await one.ask(chat(stream=stream, user="killer"))) == (502, "backend_error")
        assert (await one.ask(chat(stream=stream))).status_code == 200


async def test_a_runtime_that_is_not_there_is_a_503(one: Stand) -> None:
    one.fleet.backend.url = "http://127.0.0.1:9"
    for stream in (False, True):
        refused = await one.ask(chat(stream=stream))
        assert told(refused) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) > 0


async def test_a_stream_that_breaks_ends_with_an_error() -> None:
    async def script(connection: Connection) -> None:
        await connection.event(chunk("a"))
        raise ConnectionResetError

    async with stand(script=script) as one:
        answered = await one.ask(chat(stream=True))
        assert answered.status_code == 200
        first, last, rest = answered.text.split("\n\n")
        assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["content"] == "a"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "backend_error"
        assert rest == ""
        assert await one.counted(502) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UnknownModel("There is no model 'x'."), (404, "model_not_found")),
        (Unavailable("It is being restarted.", retry_after_s=2.5), (503, "unavailable")),
    ],
)
async def test_what_the_fleet_refuses_is_told(one: Stand, error: Any, expected: tuple[int, str]) -> None:
    one.fleet.refuses = error
    for stream in (False, True):
        refused = await one.ask(chat(stream=stream))
        assert told(refused) == expected
        assert refused.headers.get("retry-after") == ("3" if expected[0] == 503 else None)
    one.fleet.refuses = None
    assert (await one.ask()).status_code == 200
