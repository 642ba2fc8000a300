"""What the gateway costs: added latency, CPU and memory against a plain TCP proxy, before a fake runtime.

    python benchmarks/gateway.py                    2,000 streams for 60 s, as the issue asks
    python benchmarks/gateway.py --streams 200 --seconds 10

Every part is a process of its own on loopback: the runtime, the proxy under test, and the clients. The runtime streams
server-sent events in chunked framing as ours does, `--rate` a second and stream; each client keeps its streams open,
one request after the other on a connection, and checks every answer's length and end. CPU is the proxy process's own
user and system time, memory its resident set, both from /proc; so they do not depend on what else the machine runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvloop

ROOT = Path(__file__).resolve().parent.parent
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
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


def _answer(tokens: int) -> tuple[list[bytes], int]:
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
        self.pieces, self.length = _answer(tokens)
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


def _run_runtime(sock: socket.socket, tokens: int, rate: float) -> None:
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


def _run_tcp_proxy(sock: socket.socket, upstream: tuple[str, int]) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Pipe(upstream), sock=sock, backlog=4096)
        async with server:
            await asyncio.Event().wait()

    uvloop.run(serve())


# Clients


@dataclass
class _Results:
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


def _run_streams(port: int, streams: int, seconds: float, tokens: int, prompt: int, results: Any) -> None:
    """`streams` connections, each one request after the other until the time is up."""

    async def one(index: int, end: float, found: _Results, length: int) -> None:
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

    async def go() -> _Results:
        found = _Results()
        _, length = _answer(tokens)
        end = time.monotonic() + seconds
        await asyncio.gather(*(one(index, end, found, length) for index in range(streams)))
        return found

    results.put(uvloop.run(go()))


def _run_rate(ports: list[int], rate: float, seconds: float, tokens: int, prompt: int, results: Any) -> None:
    """`rate` requests a second to each port, in turn, on connections that are kept."""

    async def one(port: int, request: bytes, found: _Results, idle: list[_Client], length: int) -> None:
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

    async def go() -> list[_Results]:
        found = [_Results() for _ in ports]
        idle: list[list[_Client]] = [[] for _ in ports]
        _, length = _answer(tokens)
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


# Measuring


def _cpu(pid: int) -> float:
    """Seconds of user and system time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def _listen() -> tuple[socket.socket, int]:
    sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
    return sock, sock.getsockname()[1]


@contextlib.contextmanager
def _process(target: Callable[..., None], *arguments: Any) -> Iterator[int]:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments, daemon=True)
    process.start()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


@contextlib.contextmanager
def _gateway(upstream_port: int, access_log: bool, extra: list[str]) -> Iterator[tuple[int, int]]:
    """The gateway as users start it; yields its pid and port."""
    sock, port = _listen()
    sock.close()
    sock, internal = _listen()
    sock.close()
    command = [
        sys.executable,
        "-m",
        "kubeinfer_gateway",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--internal-port={internal}",
        "--discovery=static",
        f"--upstream=bench=http://127.0.0.1:{upstream_port}",
        "--log-level=warning",
        "--access-log" if access_log else "--no-access-log",
        *extra,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "gateway")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 15
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError("the gateway did not start") from None
                time.sleep(0.05)
        yield process.pid, port
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@dataclass
class _Load:
    name: str
    requests: int
    events: int
    errors: int
    cpu: float
    seconds: float
    rss_start: int
    rss_half: int
    rss_end: int
    first_byte_p50: float


def _measure_streams(name: str, pid: int, port: int, arguments: argparse.Namespace) -> _Load:
    queue: Any = multiprocessing.get_context("fork").Queue()
    rss_start = _rss(pid)
    cpu = _cpu(pid)
    begin = time.monotonic()
    with _process(
        _run_streams, port, arguments.streams, arguments.seconds, arguments.tokens, arguments.prompt, queue
    ):
        time.sleep(arguments.seconds / 2)
        rss_half = _rss(pid)
        time.sleep(max(0.0, arguments.seconds * 0.95 - (time.monotonic() - begin)))
        rss_end = _rss(pid)
        found: _Results = queue.get(timeout=arguments.seconds + 120)
    seconds = time.monotonic() - begin
    for error in sorted(set(found.errors))[:5]:
        print(f"  {name}: {found.errors.count(error)} x {error[:200]}", file=sys.stderr)
    return _Load(
        name,
        found.requests,
        found.events,
        len(found.errors),
        _cpu(pid) - cpu,
        seconds,
        rss_start,
        rss_half,
        rss_end,
        statistics.median(found.first_byte) if found.first_byte else float("nan"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=128, help="events an answer")
    parser.add_argument("--rate", type=float, default=5, help="events a second and stream")
    parser.add_argument("--prompt", type=int, default=2000, help="bytes of the prompt")
    parser.add_argument("--latency-seconds", type=float, default=10)
    parser.add_argument(
        "--latency-rate", type=float, default=100, help="requests a second of the latency test"
    )
    parser.add_argument(
        "--access-log", action="store_true", help="with the gateway's access log (to /dev/null)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("gateway_options", nargs="*", help="further options of the gateway, behind --")
    arguments = parser.parse_args()
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))

    loads: list[_Load] = []
    runtime_sock, runtime_port = _listen()
    proxy_sock, proxy_port = _listen()
    with _process(_run_runtime, runtime_sock, arguments.tokens, arguments.rate):
        with _process(_run_tcp_proxy, proxy_sock, ("127.0.0.1", runtime_port)) as pid:
            loads.append(_measure_streams("TCP proxy", pid, proxy_port, arguments))
        with _gateway(runtime_port, arguments.access_log, arguments.gateway_options) as (pid, port):
            loads.append(_measure_streams("gateway", pid, port, arguments))
    proxy_sock.close()
    print(
        f"{arguments.streams} streams, {arguments.rate:g} events/s each, answers of {arguments.tokens} events"
    )
    print(
        f"{'':10} {'requests':>9} {'events/s':>9} {'errors':>7} {'CPU %':>7} {'us/event':>9} {'RSS start/half/end MiB':>24}"
    )
    for load in loads:
        mib = "/".join(f"{size / 2**20:.0f}" for size in (load.rss_start, load.rss_half, load.rss_end))
        print(
            f"{load.name:10} {load.requests:9} {load.events / load.seconds:9.0f} {load.errors:7} "
            f"{100 * load.cpu / load.seconds:7.1f} {1e6 * load.cpu / max(load.events, 1):9.2f} {mib:>24}"
        )
    per_event = [load.cpu / max(load.events, 1) for load in loads]
    print(f"CPU an event, gateway to TCP proxy: {per_event[1] / per_event[0]:.2f} x")

    runtime_sock, runtime_port = _listen()
    queue: Any = multiprocessing.get_context("fork").Queue()
    with (
        _process(_run_runtime, runtime_sock, 8, 50),
        _gateway(runtime_port, arguments.access_log, arguments.gateway_options) as (_, port),
        _process(
            _run_rate,
            [runtime_port, port],
            arguments.latency_rate,
            arguments.latency_seconds,
            8,
            arguments.prompt,
            queue,
        ),
    ):
        direct, through = queue.get(timeout=arguments.latency_seconds + 60)
    added = []
    for share in (0.5, 0.9, 0.99):
        times = [
            sorted(found.first_byte)[int(share * (len(found.first_byte) - 1))] for found in (direct, through)
        ]
        added.append(1e3 * (times[1] - times[0]))
        print(
            f"first byte p{100 * share:.0f}: direct {1e3 * times[0]:.2f} ms, gateway {1e3 * times[1]:.2f} ms, added {added[-1]:.2f} ms"
        )
    print(
        f"at {arguments.latency_rate:g} requests/s; errors: {len(direct.errors)} direct, {len(through.errors)} through the gateway"
    )
    if arguments.json:
        figures = {
            "loads": [vars(load) for load in loads],
            "cpu_ratio": per_event[1] / per_event[0],
            "added_first_byte_ms": dict(zip(("p50", "p90", "p99"), added)),
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    failed = any(load.errors for load in loads) or through.errors
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
