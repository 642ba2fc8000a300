"""Endpoints that fail, leave and come back; clients that leave or read slowly."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.helpers import eventually, free_port, read_all, status_of
from kubeinfer_gateway.registry import EndpointSpec, ModelSpec


async def test_a_dead_endpoint_is_passed_over(bench: Any) -> None:
    runtime = await bench.runtime()
    await bench.start(eject_after=2, eject_seconds=60)
    dead = EndpointSpec("dead", "127.0.0.1", free_port())
    live = EndpointSpec("live", "127.0.0.1", runtime.port)
    bench.gateway.registry.put(ModelSpec("default/m", ("m",), 1.0, (dead, live)))
    for number in range(20):
        async with bench.chat(text=f"text {number}") as response:
            assert response.status == 200
    endpoints = bench.gateway.registry.models["default/m"].endpoints
    assert endpoints["dead"].ejected_until > time.monotonic()
    assert endpoints["live"].ejected_until == 0
    async with bench.client.get(bench.internal + "/metrics") as response:
        text = await response.text()
    assert 'kubeinfer_gateway:upstream_errors_total{kind="connect",model="default/m"} 2.0' in text
    assert 'kubeinfer_gateway:endpoints_ejected{model="default/m"} 1.0' in text


async def test_no_endpoint_can_be_reached(bench: Any) -> None:
    await bench.start(retries=2)
    dead = EndpointSpec("dead", "127.0.0.1", free_port())
    bench.gateway.registry.put(ModelSpec("default/m", ("m",), 1.0, (dead,)))
    async with bench.chat() as response:
        assert response.status == 502
        assert response.headers["retry-after"] == "1"
        assert (await response.json())["error"]["code"] == "upstream_unreachable"


async def test_an_endpoint_that_comes_back_in_time_answers(bench: Any) -> None:
    """A runtime's container restarts in place: its address refuses connections for a moment."""
    runtime = await bench.runtime()
    await bench.start()
    bench.serve("m", runtime)
    async with bench.chat() as response:
        assert response.status == 200
    await runtime.stop()
    request = asyncio.create_task(bench.chat().__aenter__())
    await asyncio.sleep(0.4)
    await runtime.start(runtime.port)
    response = await request
    assert response.status == 200
    response.release()


async def test_an_idle_connection_that_was_closed_costs_no_request(bench: Any) -> None:
    runtime = await bench.runtime()
    await bench.start(retries=0)
    bench.serve("m", runtime)
    for _ in range(5):
        async with bench.chat() as response:
            assert response.status == 200
        for connection in list(runtime._runner.server.connections):
            connection.transport.abort()  # the gateway sees it only when it sends


async def test_a_draining_endpoint_gets_no_more(bench: Any) -> None:
    leaving = await bench.runtime(name="leaving")
    staying = await bench.runtime(name="staying")
    await bench.start()
    bench.serve("m", leaving, staying)
    leaving.draining = True
    for number in range(20):
        async with bench.chat(text=f"text {number}") as response:
            assert response.status == 200
    assert len(leaving.requests) == 1  # one was refused, and told the gateway


async def test_the_only_endpoint_drains_and_another_follows(bench: Any) -> None:
    leaving = await bench.runtime(name="leaving", draining=True)
    following = await bench.runtime(name="following")
    await bench.start()
    bench.serve("m", leaving)
    request = asyncio.create_task(bench.chat().__aenter__())
    await asyncio.sleep(0.5)
    assert not request.done()
    bench.serve("m", following)
    response = await request
    assert response.status == 200
    response.release()


async def test_the_only_endpoint_takes_requests_again(bench: Any) -> None:
    runtime = await bench.runtime(draining=True)
    await bench.start()
    bench.serve("m", runtime)
    request = asyncio.create_task(bench.chat().__aenter__())
    await asyncio.sleep(0.5)
    runtime.draining = False
    begin = time.monotonic()
    response = await request
    assert response.status == 200
    assert time.monotonic() - begin < 1.5
    response.release()


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_refusals_go_to_another_endpoint(bench: Any, status: int) -> None:
    bad = await bench.runtime(name="bad", status=status)
    good = await bench.runtime(name="good")
    await bench.start()
    bench.serve("m", bad, good)
    for number in range(20):
        async with bench.chat(text=f"text {number}") as response:
            assert response.status == 200
    bench.serve("m", bad)
    async with bench.chat() as response:
        assert response.status == status
        assert (await response.json())["error"]["message"] == f"status {status}"


async def test_terminating_under_load_fails_nothing(bench: Any) -> None:
    """Endpoints leave and join by discovery while streams run; those that left finish theirs."""
    runtimes = [await bench.runtime(name=f"r{number}", tokens=10, pause=0.01) for number in range(4)]
    await bench.start()
    bench.serve("m", *runtimes)
    results: list[tuple[int, bool]] = []
    stop = False

    async def client(number: int) -> None:
        while not stop:
            async with bench.chat(text=f"user {number}", stream=True) as response:
                body = await response.read()
                results.append((response.status, body.endswith(b"data: [DONE]\n\n")))

    clients = [asyncio.create_task(client(number)) for number in range(40)]
    begin = time.monotonic()
    turn = 0
    while time.monotonic() - begin < 4:
        gone = runtimes[turn % 4]
        leaving = bench.gateway.registry.models["default/m"].endpoints[f"{gone.name}:{gone.port}"]
        bench.serve("m", *(runtime for runtime in runtimes if runtime is not gone))
        open_before = leaving.inflight
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert leaving.inflight <= open_before  # nothing new once it is leaving
            open_before = leaving.inflight
        bench.serve("m", *runtimes)
        turn += 1
    stop = True
    await asyncio.gather(*clients)
    assert len(results) > 100
    assert set(results) == {(200, True)}
    assert bench.gateway.registry.models["default/m"].inflight == 0


async def test_crashing_under_load_fails_only_what_had_begun(bench: Any) -> None:
    """A runtime dies and restarts over and over: requests that had no byte yet go elsewhere."""
    stable = await bench.runtime(name="stable", delay=0.02)
    crashing = await bench.runtime(name="crashing", delay=0.02)
    await bench.start(eject_seconds=0.1)
    bench.serve("m", stable, crashing)
    stop = False
    statuses: list[int] = []

    async def client(number: int) -> None:
        while not stop:
            async with bench.chat(text=f"user {number}") as response:
                await response.read()
                statuses.append(response.status)

    clients = [asyncio.create_task(client(number)) for number in range(20)]
    for _ in range(4):
        await asyncio.sleep(0.3)
        for connection in list(crashing._runner.server.connections):
            connection.transport.abort()
        await crashing.stop()
        await asyncio.sleep(0.3)
        await crashing.start(crashing.port)
    stop = True
    await asyncio.gather(*clients)
    assert len(statuses) > 50
    assert set(statuses) == {200}
    assert len(crashing.requests) > 5


async def test_a_stream_that_breaks_off_says_so(bench: Any) -> None:
    runtime = await bench.runtime(tokens=10, break_after=3, pause=0.01)
    await bench.start()
    bench.serve("m", runtime)
    async with bench.chat(stream=True) as response:
        assert response.status == 200
        body = b""
        whole = True
        try:
            async for data in response.content.iter_any():
                body += data
        except aiohttp.ClientPayloadError:
            whole = False
    assert not whole
    assert body.count(b'"delta"') == 3
    error = json.loads(body.rstrip().rpartition(b"data: ")[2])["error"]
    assert (error["code"], error["status"]) == ("upstream_broke_off", 502)
    assert b"[DONE]" not in body


async def test_an_endpoint_that_goes_silent(bench: Any) -> None:
    runtime = await bench.runtime(tokens=3, pause=30)
    await bench.start(idle_timeout=0.5, first_byte_timeout=0.5)
    bench.serve("m", runtime)
    begin = time.monotonic()
    async with bench.chat(stream=True) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    runtime.delay = 30
    async with bench.chat(stream=True) as response:
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "upstream_timeout"
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("delay", [0.0, 30.0])
async def test_a_client_that_leaves_cancels_upstream(bench: Any, delay: float) -> None:
    runtime = await bench.runtime(tokens=10_000, pause=0.01, delay=delay)
    await bench.start()
    bench.serve("m", runtime)
    clients = [asyncio.create_task(read_all(bench)) for _ in range(20)]
    await eventually(lambda: runtime.running == 20)
    await asyncio.sleep(0.2)
    for client in clients:
        client.cancel()
    begin = time.monotonic()
    await asyncio.gather(*clients, return_exceptions=True)
    await eventually(lambda: runtime.running == 0)
    assert time.monotonic() - begin < 1.0
    assert runtime.cancelled == 20
    assert bench.gateway.proxy.active == 0
    model = bench.gateway.registry.models["default/m"]
    assert model.inflight == 0
    assert all(endpoint.inflight == 0 for endpoint in model.endpoints.values())


async def test_a_client_that_leaves_while_it_waits(bench: Any) -> None:
    await bench.start()
    bench.serve("m")
    client = asyncio.create_task(read_all(bench))
    await eventually(lambda: bench.gateway.registry.waiting() == 1)
    client.cancel()
    await eventually(lambda: bench.gateway.registry.waiting() == 0, 1)
    assert bench.gateway.proxy.bodies.held == 0


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def test_a_slow_client_does_not_grow_memory(bench: Any) -> None:
    """200 MB wait at the runtime; the client reads nothing: the runtime is held back, not the gateway's memory."""
    runtime = await bench.runtime(tokens=2000, token_size=100_000)
    await bench.start(write_timeout=3)
    bench.serve("m", runtime)
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.gateway.port, limit=1024)
    body = json.dumps({"model": "m", "messages": [], "stream": True}).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )
    await reader.readexactly(100)
    await asyncio.sleep(0.5)
    before, sent = _rss(), runtime.sent
    await asyncio.sleep(1.0)
    assert runtime.sent == sent  # nobody moves
    assert runtime.sent < 200
    assert _rss() - before < 8 << 20
    (stream,) = next(iter(bench.gateway._servers[0][0].server_state.connections)).streams
    assert stream.protocol.transport.get_write_buffer_size() < 1 << 20
    # Reading on lets it go on.
    await reader.readexactly(20_000_000)
    assert runtime.sent > sent
    # A client that has stopped for good is dropped, and the runtime freed.
    await eventually(lambda: runtime.running == 0, 8)
    writer.close()


async def test_a_connection_that_was_held_back_at_its_answers_end_is_usable(bench: Any) -> None:
    """The last piece of an answer is what was too much for a slow client; the next request has a client of its own."""
    await bench.start()
    await bench.raw_upstream(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
    (endpoint,) = bench.gateway.registry.models["default/m"].endpoints.values()
    upstreams = bench.gateway.proxy.forwarder.upstreams
    request = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    for _ in range(3):
        connection = await upstreams.acquire(endpoint)
        await asyncio.wait_for(connection.send("POST", request, b""), 2)
        connection.pause()
        got: list[bytes] = []

        def write(data: bytes, connection: Any = connection, got: list[bytes] = got) -> None:
            got.append(data)
            connection.pause()

        await connection.forward(write, "same")
        connection.pause()
        assert got == [b"hello"]
        upstreams.release(connection)
    assert len(endpoint.idle) == 1


async def test_a_request_that_is_always_refused_does_not_stop_others(bench: Any) -> None:
    runtime = await bench.runtime()
    await bench.start()
    bench.serve("m", runtime)
    runtime.draining = True
    refused = asyncio.create_task(status_of(bench))
    await asyncio.sleep(0.3)
    status, _, body = await asyncio.wait_for(refused, 25)
    assert status == 503
    assert json.loads(body)["error"]["message"] == "draining"
    assert len(runtime.requests) == 3


async def test_a_slow_client_gets_everything(bench: Any) -> None:
    runtime = await bench.runtime(tokens=100, token_size=50_000)
    await bench.start()
    bench.serve("m", runtime)
    size = 0
    async with bench.chat(stream=True) as response:
        async for data in response.content.iter_chunked(65536):
            size += len(data)
            tail = data[-14:]
            await asyncio.sleep(0.002)
    assert tail == b"data: [DONE]\n\n"
    assert size > 5_000_000


async def test_the_session_header_keeps_a_session_together(bench: Any) -> None:
    runtimes = [await bench.runtime(name=f"r{number}") for number in range(4)]
    await bench.start()
    bench.serve("m", *runtimes)
    for number in range(12):
        async with bench.chat(text=f"text {number}", headers={"x-session-id": "s"}) as response:
            assert response.status == 200
    assert sorted(len(runtime.requests) for runtime in runtimes) == [0, 0, 0, 12]
    for number in range(40):
        async with bench.chat(text=f"text {number}") as response:
            assert response.status == 200
    assert sum(bool(runtime.requests) for runtime in runtimes) == 4


async def test_least_load(bench: Any) -> None:
    runtimes = [await bench.runtime(name=f"r{number}", delay=0.5) for number in range(4)]
    await bench.start(routing="least-load")
    bench.serve("m", *runtimes)
    await asyncio.gather(*(status_of(bench) for _ in range(12)))
    assert [len(runtime.requests) for runtime in runtimes] == [3, 3, 3, 3]
