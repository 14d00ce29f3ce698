"""Who may come in, with how much, and what the proxy tells of itself."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from slmops.core import web
from slmops.serving import proxy
from slmops.serving.limits import Serve
from tests.upstream import CHAT, FOUNDRY_ID, RESPONSES, Stand, chat, says, stand, told

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


async def test_an_endless_body_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "DISCARDED_BYTES", 100_000)
    async with stand(Serve(max_body_kb=1)) as one:
        _, writer = await one.post("transfer-encoding: chunked")

        async def send() -> None:
            while True:
                writer.write(b"2710\r\n" + b" " * 10_000 + b"\r\n")
                await writer.drain()

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(send(), 5)
        writer.close()


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


async def test_nothing_else_is_here(one: Stand) -> None:
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


async def test_models_and_health(one: Stand) -> None:
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
