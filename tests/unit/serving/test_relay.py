"""Answers on their way back: streams, and what the runtime says when it fails."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slmops.serving.fleet import UnknownModel
from slmops.serving.spares import Unavailable
from tests import upstream
from tests.upstream import RESPONSES, USAGE, Stand, chat, chunk, event, replies, response, stand, streams, told

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
    for name, count in (("prompt_tokens_total", 7), ("completion_tokens_total", 3), ("first_token_seconds_count", 1)):
        assert await one.metric(f"slmops_{name}") == count


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
async def test_events_are_found_however_the_stream_is_cut(size: int) -> None:
    events = event(chunk("a")) + event(chunk("b")) + event(chunk(None, usage=USAGE)) + b"data: [DONE]\n\n"
    cut = [events[start : start + size] for start in range(0, len(events), size)]
    async with stand(script=streams(*cut)) as one:
        answered = await one.ask(chat(stream=True))
        assert answered.content == event(chunk("a")) + event(chunk("b")) + b"data: [DONE]\n\n"
        assert await one.metric("slmops_completion_tokens_total") == 3


async def test_an_answer_that_speaks_of_events_is_none(one: Stand) -> None:
    said = event(chunk('data: {"error": 1}\n\nevent: response.failed\n\n"usage":{} "choices":[] "delta"'))
    one.upstream.script = streams(said)
    assert (await one.ask(chat(stream=True))).content == said
    assert await one.counted(200) == 1


async def test_tokens_of_responses_are_counted(one: Stand) -> None:
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


async def dies(connection: upstream.Connection) -> None:
    """Break off, in the middle of an answer if one was wanted."""
    if connection.body.get("user"):
        await connection.event(chunk("a"))
    raise ConnectionResetError


@pytest.mark.parametrize(
    ("name", "fault", "expected", "retry_after"),
    [
        ("script", dies, (502, "backend_error"), None),
        ("url", "http://127.0.0.1:9", (503, "unavailable"), "3"),  # the runtime is not there
        ("refuses", UnknownModel("There is no model 'x'."), (404, "model_not_found"), None),
        ("refuses", Unavailable("It is being restarted.", retry_after_s=2.5), (503, "unavailable"), "3"),
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
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "backend_error"
    assert rest == b""
    assert await one.counted(502) == 1
