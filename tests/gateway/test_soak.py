"""Many requests, clients that leave at random, odd bytes: nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from pathlib import Path
from typing import Any

import aiohttp


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _body(**more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 500}], **more}).encode()


def _head(body: bytes, extra: bytes = b"") -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n" % (
        extra,
        len(body),
    )


async def _settled(bench: Any, runtimes: list[Any]) -> None:
    for _ in range(200):
        if not bench.gateway.proxy.active and not any(runtime.running for runtime in runtimes):
            break
        await asyncio.sleep(0.02)
    proxy, registry = bench.gateway.proxy, bench.gateway.registry
    assert proxy.active == 0
    assert proxy.bodies.held == 0
    assert not proxy.forwarder.streams
    assert registry.waiting() == 0
    for model in registry.models.values():
        assert model.inflight == 0
        assert not model._waiters
        assert all(endpoint.inflight == 0 for endpoint in model.endpoints.values())
    assert not any(runtime.running for runtime in runtimes)


async def test_clients_that_leave_at_random_leave_nothing_behind(bench: Any) -> None:
    runtimes = [await bench.runtime(name=f"r{number}", tokens=8, pause=0.002) for number in range(3)]
    await bench.start()
    bench.serve("m", *runtimes)
    bench.serve("asleep")
    done = 0

    async def client(seed: int, rounds: int) -> None:
        nonlocal done
        chance = random.Random(seed)
        for _ in range(rounds):
            reader, writer = await asyncio.open_connection("127.0.0.1", bench.gateway.port)
            body = _body(
                stream=chance.random() < 0.7, **({"model": "asleep"} if chance.random() < 0.1 else {})
            )
            data = _head(body, b"connection: close\r\n") + body
            kind = chance.random()
            try:
                if kind < 0.15:  # leaves within its request
                    writer.write(data[: chance.randrange(len(data))])
                    await asyncio.sleep(chance.random() * 0.01)
                elif kind < 0.6:  # leaves within the answer
                    writer.write(data)
                    await asyncio.wait_for(reader.read(chance.randrange(1, 2000)), chance.random() * 0.05)
                else:
                    writer.write(data)
                    answer = await asyncio.wait_for(reader.read(), 0.5)
                    assert answer.startswith(b"HTTP/1.1 200")
                    done += 1
            except TimeoutError:
                pass
            finally:
                writer.transport.abort() if chance.random() < 0.5 else writer.close()
        await asyncio.sleep(0)

    await asyncio.gather(*(client(number, 10) for number in range(30)))
    await _settled(bench, runtimes)
    gc.collect()
    before = _rss()
    await asyncio.gather(*(client(100 + number, 40) for number in range(30)))
    await _settled(bench, runtimes)
    gc.collect()
    assert done > 100
    for runtime in runtimes:
        runtime.requests.clear()
    assert _rss() - before < 12 << 20
    idle = sum(len(e.idle) for m in bench.gateway.registry.models.values() for e in m.endpoints.values())
    assert idle <= 90


async def test_odd_bytes_harm_nobody(bench: Any) -> None:
    runtime = await bench.runtime(tokens=3)
    await bench.start()
    bench.serve("m", runtime)
    chance = random.Random(7)
    body = _body()
    good = _head(body) + body
    for number in range(300):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 8)):
            at = chance.randrange(len(_head(body)) + 10)
            what = chance.random()
            if what < 0.4:
                data[at] = chance.randrange(256)
            elif what < 0.7:
                del data[at : at + chance.randrange(1, 20)]
            else:
                data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 20)))
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.gateway.port)
        writer.write(bytes(data))
        try:
            answer = await asyncio.wait_for(reader.read(12), 0.03)
            assert not answer or answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), (
                number,
                bytes(data),
                answer,
            )
        except (TimeoutError, ConnectionError):
            pass
        writer.transport.abort()
    async with bench.chat() as response:
        assert response.status == 200
    await _settled(bench, [runtime])


async def test_many_streams_at_once(bench: Any) -> None:
    runtime = await bench.runtime(tokens=20, pause=0.05)
    await bench.start()
    bench.serve("m", runtime)

    async def one() -> bool:
        async with bench.chat(stream=True) as response:
            return (await response.read()).endswith(b"data: [DONE]\n\n") and response.status == 200

    assert all(await asyncio.gather(*(one() for _ in range(400))))
    await _settled(bench, [runtime])
    assert isinstance(bench.client, aiohttp.ClientSession)
