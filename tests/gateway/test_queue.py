"""Requests for a model without a replica: held, bounded, kept alive, and given up in time."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from gateway.helpers import eventually, status_of
from kubeinfer_gateway.registry import ModelSpec


async def test_requests_wait_for_a_replica(bench: Any) -> None:
    runtime = await bench.runtime(tokens=3)
    await bench.start()
    bench.serve("m")
    requests = [asyncio.create_task(status_of(bench, stream=bool(number % 2))) for number in range(20)]
    await eventually(lambda: bench.gateway.registry.waiting() == 20)
    async with bench.client.get(bench.internal + "/demand") as response:
        demand = await response.json()
    assert demand == {
        "models": {
            "default/m": {
                "waiting": 20,
                "inflight": 0,
                "last_request": demand["models"]["default/m"]["last_request"],
            }
        }
    }
    assert abs(demand["models"]["default/m"]["last_request"] - time.time()) < 5
    bench.serve("m", runtime)
    assert {status for status, _, _ in await asyncio.gather(*requests)} == {200}
    assert bench.gateway.registry.waiting() == 0


async def test_a_model_that_is_made_again_serves_those_who_waited_for_it(bench: Any) -> None:
    runtime = await bench.runtime(tokens=3)
    await bench.start()
    bench.serve("m")
    requests = [asyncio.create_task(status_of(bench)) for _ in range(3)]
    await eventually(lambda: bench.gateway.registry.waiting() == 3)
    bench.gateway.registry.remove("default/m")
    bench.serve("m", runtime)
    assert {status for status, _, _ in await asyncio.gather(*requests)} == {200}


async def test_the_queue_is_bounded(bench: Any) -> None:
    runtime = await bench.runtime()
    await bench.start(queue_size=5)
    bench.serve("m")
    requests = [asyncio.create_task(status_of(bench)) for _ in range(8)]
    begin = time.monotonic()
    await eventually(lambda: sum(request.done() for request in requests) == 3)
    assert time.monotonic() - begin < 1
    refused = [request.result() for request in requests if request.done()]
    assert {(status, retry) for status, retry, _ in refused} == {(429, "5")}
    assert json.loads(refused[0][2])["error"]["code"] == "queue_full"
    bench.serve("m", runtime)
    assert sorted(status for status, _, _ in await asyncio.gather(*requests)) == [200] * 5 + [429] * 3


async def test_all_queues_together_are_bounded(bench: Any) -> None:
    await bench.start(queue_total=3, queue_timeout=1)
    for name in ("a", "b"):
        bench.serve(name)
    answers = await asyncio.gather(*(status_of(bench, model=name) for name in ("a", "b") * 3))
    assert sorted(status for status, _, _ in answers) == [429, 429, 429, 503, 503, 503]


async def test_the_deadline(bench: Any) -> None:
    await bench.start(queue_timeout=0.4)
    bench.gateway.registry.put(ModelSpec("default/m", ("m",), 1.0, note="Pulling: 12% of 5 GB"))
    begin = time.monotonic()
    status, retry, body = await status_of(bench)
    assert (status, retry) == (503, "10")
    assert 0.35 < time.monotonic() - begin < 2
    error = json.loads(body)["error"]
    assert error["code"] == "model_not_ready"
    assert "Pulling: 12% of 5 GB" in error["message"]


async def test_comments_keep_a_waiting_stream_alive(bench: Any) -> None:
    runtime = await bench.runtime(tokens=3)
    await bench.start(sse_keepalive=0.1)
    bench.serve("m")
    async with bench.chat(stream=True) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert await response.content.readuntil(b"\n\n") == b": waiting for a replica\n\n"
        assert await response.content.readuntil(b"\n\n") == b": waiting for a replica\n\n"
        bench.serve("m", runtime)
        rest = await response.read()
    events = [line for line in rest.split(b"\n\n") if line and not line.startswith(b":")]
    assert len(events) == 4
    assert events[-1] == b"data: [DONE]"
    assert bench.gateway.proxy.active == 0


async def test_a_started_stream_ends_with_an_error_event(bench: Any) -> None:
    await bench.start(sse_keepalive=0.1, queue_timeout=0.3)
    bench.serve("m")
    status, _, body = await status_of(bench, stream=True)
    assert status == 200
    error = json.loads(body.rpartition(b"data: ")[2])["error"]
    assert (error["status"], error["code"], error["retry_after"]) == (503, "model_not_ready", 10)
    refusing = await bench.runtime(status=400)
    request = asyncio.create_task(status_of(bench, stream=True))
    await asyncio.sleep(0.2)
    bench.serve("m", refusing)
    status, _, body = await request
    assert json.loads(body.rpartition(b"data: ")[2]) == {"error": {"message": "status 400"}}


async def test_a_model_that_is_deleted_or_suspended_while_requests_wait(bench: Any) -> None:
    await bench.start()
    bench.serve("m")
    requests = [asyncio.create_task(status_of(bench)) for _ in range(3)]
    await eventually(lambda: bench.gateway.registry.waiting() == 3)
    bench.gateway.registry.remove("default/m")
    assert [status for status, _, _ in await asyncio.gather(*requests)] == [404] * 3
    bench.gateway.registry.put(ModelSpec("default/m", ("m",), 1.0, suspended=True))
    status, retry, body = await status_of(bench)
    assert (status, retry, json.loads(body)["error"]["code"]) == (503, "60", "model_suspended")


async def test_nothing_is_known_yet(bench: Any) -> None:
    await bench.start()
    bench.gateway.registry.synced = False
    status, retry, _ = await status_of(bench)
    assert (status, retry) == (503, "1")
    async with bench.client.get(bench.internal + "/readyz") as response:
        assert response.status == 503
    async with bench.client.get(bench.internal + "/healthz") as response:
        assert response.status == 200
