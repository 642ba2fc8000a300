"""What the gateway costs: added latency, CPU and memory against a plain TCP proxy, before a fake runtime.

    python benchmarks/gateway.py                    2,000 streams for 60 s: the figures of docs/gateway.md
    python benchmarks/gateway.py --streams 200 --seconds 10

Every part is a process of its own on loopback: the runtime, the proxy under test, and the clients. The runtime streams
server-sent events in chunked framing as ours does, `--rate` a second and stream; each client keeps its streams open,
one request after the other on a connection, and checks every answer's length and end. CPU is the proxy process's own
user and system time, memory its resident set, both from /proc; so they do not depend on what else the machine runs.
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway_clients import Results, run_rate, run_streams
from gateway_servers import run_runtime, run_tcp_proxy

ROOT = Path(__file__).resolve().parent.parent
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


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
        run_streams, port, arguments.streams, arguments.seconds, arguments.tokens, arguments.prompt, queue
    ):
        time.sleep(arguments.seconds / 2)
        rss_half = _rss(pid)
        time.sleep(max(0.0, arguments.seconds * 0.95 - (time.monotonic() - begin)))
        rss_end = _rss(pid)
        found: Results = queue.get(timeout=arguments.seconds + 120)
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
    with _process(run_runtime, runtime_sock, arguments.tokens, arguments.rate):
        with _process(run_tcp_proxy, proxy_sock, ("127.0.0.1", runtime_port)) as pid:
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
        _process(run_runtime, runtime_sock, 8, 50),
        _gateway(runtime_port, arguments.access_log, arguments.gateway_options) as (_, port),
        _process(
            run_rate,
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
