"""The queue, clients that leave, and answers that take too long."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from slmops.serving import relay
from slmops.serving.limits import Limits
from tests.upstream import CHAT, Stand, chat, endless, held, stand, told

pytestmark = pytest.mark.anyio


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


async def test_a_client_that_leaves_a_stream_stops_the_runtime() -> None:
    async with stand(Limits(concurrency=1), script=endless) as one:
        async with one.client.stream("POST", CHAT, json=chat(stream=True)) as streaming:
            pieces = streaming.aiter_raw()  # who drops it leaves
            await anext(pieces)
            assert await one.in_flight() == (1, 0)
        await asyncio.wait_for(one.upstream.left.wait(), 2)
        await one.reaches(0, 0)
        assert await one.counted(499) == 1


async def test_a_client_that_leaves_a_whole_answer_leaves_its_slot_taken() -> None:
    async with stand(Limits(concurrency=1), script=held) as one:
        (await leave(one)).cancel()
        waits = await leave(one)
        await asyncio.sleep(0.1)
        assert await one.in_flight() == (1, 1)
        assert one.fleet.backend.in_flight == 2
        one.upstream.let_go.set()
        assert (await waits).status_code == 200
        assert await one.in_flight() == (0, 0)
        assert await one.metric("slmops_completion_tokens_total") == 6


async def test_a_full_queue_is_a_503_at_once_and_the_others_are_answered_in_turn() -> None:
    async with stand(Limits(concurrency=2, queue=2), script=held) as one:
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


async def test_too_long_in_the_queue_is_a_503() -> None:
    async with stand(Limits(concurrency=1, queue_timeout_s=0.1), script=held) as one:
        first = await leave(one)
        for stream in (False, True):
            assert told(await one.ask(chat(stream=stream))) == (503, "overloaded")
        one.upstream.let_go.set()
        assert (await first).status_code == 200


async def test_a_version_that_takes_long_to_load_takes_no_slot() -> None:
    async with stand(Limits(concurrency=1, queue_timeout_s=0.3)) as one:
        one.fleet.loads_s = 1
        loads = asyncio.create_task(one.ask())
        await one.reaches(0, 1)
        one.fleet.loads_s = 0
        assert (await one.ask()).status_code == 200
        refused = await loads
        assert told(refused) == (503, "overloaded")
        assert "was not loaded within 0.3 s" in refused.json()["error"]["message"]


async def test_a_whole_answer_that_takes_too_long_is_a_504_and_keeps_its_slot() -> None:
    async with stand(Limits(concurrency=1, request_timeout_s=0.3), script=held) as one:
        refused = await one.ask()
        assert told(refused) == (504, "timeout")
        assert refused.headers["x-should-retry"] == "false"
        assert await one.in_flight() == (1, 0)
        await one.reaches(0, 0)  # a runtime that hangs does not keep it for ever
        one.upstream.let_go.set()
        assert (await one.ask()).status_code == 200


async def test_a_stream_that_takes_too_long_ends_with_an_error_and_stops_the_runtime() -> None:
    async with stand(Limits(concurrency=1, request_timeout_s=0.3), script=endless) as one:
        answered = await one.ask(chat(stream=True))
        assert answered.status_code == 200
        events = answered.text.rstrip("\n").split("\n\n")
        assert len(events) > 3
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        await asyncio.wait_for(one.upstream.left.wait(), 2)
        assert await one.in_flight() == (0, 0)
        assert await one.counted(504) == 1


async def test_what_nobody_waits_for_is_broken_off_when_the_service_ends() -> None:
    async with stand(script=lambda _: asyncio.Event().wait()) as one:
        (await leave(one)).cancel()
        await asyncio.sleep(0.1)
        assert await one.in_flight() == (1, 0)  # and none when it has ended


async def test_a_client_that_does_not_read_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(relay, "LAST_WORDS_S", 0.1)
    limits = Limits(concurrency=1, request_timeout_s=0.3)
    async with stand(limits, script=lambda to: endless(to, "a" * 100_000)) as one:
        body = json.dumps(chat(stream=True)).encode()
        reader, writer = await one.post(f"content-length: {len(body)}", body=body, limit=1000)
        await asyncio.wait_for(one.upstream.left.wait(), 5)
        await one.reaches(0, 0)
        await asyncio.sleep(0.2)
        await reader.readuntil(b"\r\n")
        writer.close()
    assert not any(record.exc_info for record in caplog.records)
