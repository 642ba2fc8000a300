"""The servers of the gateway's benchmark: a fake runtime that streams on a clock, and a plain TCP proxy to compare with."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import cast

import uvloop

_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: fake\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def _event(index: int) -> bytes:
    chunk = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1790000000,
        "model": "bench",
        "choices": [
            {"index": 0, "delta": {"content": f" token{index:05d}"}, "logprobs": None, "finish_reason": None}
        ],
    }
    data = b"data: " + json.dumps(chunk).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer(tokens: int) -> tuple[list[bytes], int]:
    """The pieces of one answer behind its head, and their length together."""
    usage = (
        b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":9}}\n\n'
        % tokens
    )
    done = b"data: [DONE]\n\n"
    pieces = [_event(index) for index in range(tokens)]
    pieces.append(b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(usage), usage, len(done), done))
    return pieces, sum(map(len, pieces))


# The runtime


class _Runtime(asyncio.Protocol):
    """Answers each POST with `tokens` events, one every `interval` seconds; a wheel of timers serves all streams."""

    def __init__(self, wheel: _Wheel) -> None:
        self.wheel = wheel
        self.transport: asyncio.Transport | None = None
        self.buffer = b""
        self.at = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.wheel.leave(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        if len(self.buffer) < end + 4 + length:
            return
        self.buffer = b""
        self.at = 0
        assert self.transport is not None
        self.transport.write(_HEAD + self.wheel.pieces[0])
        self.at = 1
        self.wheel.join(self)

    def step(self) -> bool:
        """Writes the next event; False where it was the last."""
        if self.transport is None:
            return False
        self.transport.write(self.wheel.pieces[self.at])
        self.at += 1
        return self.at < len(self.wheel.pieces)


class _Wheel:
    """Slots of streams that are due together, `slots` of them in an interval."""

    def __init__(self, tokens: int, interval: float, slots: int = 50) -> None:
        self.pieces, self.length = answer(tokens)
        self.interval = interval
        self.slots: list[set[_Runtime]] = [set() for _ in range(slots)]
        self.next = 0

    def join(self, stream: _Runtime) -> None:
        self.slots[(self.next - 1) % len(self.slots)].add(stream)

    def leave(self, stream: _Runtime) -> None:
        for slot in self.slots:
            slot.discard(stream)

    async def turn(self) -> None:
        start = time.monotonic()
        turns = 0
        while True:
            slot = self.slots[self.next]
            self.next = (self.next + 1) % len(self.slots)
            for stream in list(slot):
                if not stream.step():
                    slot.discard(stream)
            turns += 1
            await asyncio.sleep(max(0.0, start + turns * self.interval / len(self.slots) - time.monotonic()))


def run_runtime(sock: socket.socket, tokens: int, rate: float) -> None:
    async def serve() -> None:
        wheel = _Wheel(tokens, 1 / rate)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Runtime(wheel), sock=sock)
        async with server:
            await wheel.turn()

    uvloop.run(serve())


# The plain TCP proxy


class _Pipe(asyncio.Protocol):
    def __init__(self, upstream: tuple[str, int] | None, peer: _Pipe | None = None) -> None:
        self.upstream = upstream
        self.peer = peer
        self.transport: asyncio.Transport | None = None
        self.early: list[bytes] = []
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.upstream is not None:
            self.task = asyncio.ensure_future(self.connect(*self.upstream))

    async def connect(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        _, peer = await loop.create_connection(lambda: _Pipe(None, self), host, port)
        self.peer = peer
        for data in self.early:
            peer.data_received_from(data)

    def data_received_from(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.write(data)
        else:
            self.early.append(data)

    def pause_writing(self) -> None:
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.close()


def run_tcp_proxy(sock: socket.socket, upstream: tuple[str, int]) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Pipe(upstream), sock=sock, backlog=4096)
        async with server:
            await asyncio.Event().wait()

    uvloop.run(serve())
