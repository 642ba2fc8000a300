"""The clients of the gateway's benchmark: many streams at once, or requests at a rate; every answer is checked."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

from gateway_servers import answer


@dataclass
class Results:
    requests: int = 0
    events: int = 0
    errors: list[str] = field(default_factory=list)
    first_byte: list[float] = field(default_factory=list)


class _Client(asyncio.Protocol):
    """One connection; `ask` sends a request and returns the seconds to the first byte of its answer."""

    def __init__(self, length: int) -> None:
        self.expected = length
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[float] | None = None
        self.sent = 0.0
        self.first = 0.0
        self.received = 0
        self.head = 0
        self.buffer = b""
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes) -> asyncio.Future[float]:
        assert self.transport is not None
        self.done = asyncio.get_running_loop().create_future()
        self.received = self.head = 0
        self.buffer = self.tail = b""
        self.first = 0.0
        self.sent = time.perf_counter()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        if self.done is None or self.done.done():
            return
        if not self.first:
            self.first = time.perf_counter()
        if not self.head:
            self.buffer += data
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            if not self.buffer.startswith(b"HTTP/1.1 200"):
                self.done.set_exception(RuntimeError(self.buffer[:200].decode("latin-1")))
                return
            self.head = end + 4
            data = self.buffer[self.head :]
            self.buffer = b""
        self.received += len(data)
        self.tail = (self.tail + data)[-24:]
        if self.received >= self.expected:
            if self.received == self.expected and self.tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                self.done.set_result(self.first - self.sent)
            else:
                self.done.set_exception(RuntimeError(f"wrong answer of {self.received} bytes: {self.tail!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.done is not None and not self.done.done():
            self.done.set_exception(RuntimeError(f"connection lost after {self.received} bytes"))


def _request(prompt_bytes: int, stream: int) -> bytes:
    body = json.dumps(
        {
            "model": "bench",
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": f"{stream} " + "x" * prompt_bytes},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        b"authorization: Bearer none\r\nuser-agent: bench\r\naccept: */*\r\ncontent-length: %d\r\n\r\n%b"
        % (len(body), body)
    )


def run_streams(port: int, streams: int, seconds: float, tokens: int, prompt: int, results: Any) -> None:
    """`streams` connections, each one request after the other until the time is up."""

    async def one(index: int, end: float, found: Results, length: int) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(min(2.0, seconds / 4) * index / streams)
        request = _request(prompt, index)
        client: _Client | None = None
        while time.monotonic() < end:
            try:
                if client is None or client.transport is None:
                    _, client = await loop.create_connection(lambda: _Client(length), "127.0.0.1", port)
                found.first_byte.append(await client.ask(request))
                found.requests += 1
                found.events += tokens + 1
            except (RuntimeError, OSError) as error:
                found.errors.append(str(error))
                if client is not None and client.transport is not None:
                    client.transport.abort()
                client = None
                await asyncio.sleep(0.1)
        if client is not None and client.transport is not None:
            client.transport.close()

    async def go() -> Results:
        found = Results()
        _, length = answer(tokens)
        end = time.monotonic() + seconds
        await asyncio.gather(*(one(index, end, found, length) for index in range(streams)))
        return found

    results.put(uvloop.run(go()))


def run_rate(ports: list[int], rate: float, seconds: float, tokens: int, prompt: int, results: Any) -> None:
    """`rate` requests a second to each port, in turn, on connections that are kept."""

    async def one(port: int, request: bytes, found: Results, idle: list[_Client], length: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            client = idle.pop() if idle else None
            if client is None or client.transport is None:
                _, client = await loop.create_connection(lambda: _Client(length), "127.0.0.1", port)
            found.first_byte.append(await client.ask(request))
            found.requests += 1
            idle.append(client)
        except (RuntimeError, OSError) as error:
            found.errors.append(str(error))

    async def go() -> list[Results]:
        found = [Results() for _ in ports]
        idle: list[list[_Client]] = [[] for _ in ports]
        _, length = answer(tokens)
        request = _request(prompt, 0)
        tasks: set[asyncio.Task[None]] = set()
        start = time.monotonic()
        count = 0
        while time.monotonic() - start < seconds:
            for index, port in enumerate(ports):
                at = start + (count + index / len(ports)) / rate
                await asyncio.sleep(max(0.0, at - time.monotonic()))
                task = asyncio.create_task(one(port, request, found[index], idle[index], length))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            count += 1
        await asyncio.gather(*tasks)
        return found

    results.put(uvloop.run(go()))
