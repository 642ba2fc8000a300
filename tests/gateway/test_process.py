"""The gateway's own end, and what it reads again while it runs."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.helpers import eventually, free_port, read_all, status_of

ROOT = Path(__file__).resolve().parent.parent.parent


async def _get(client: aiohttp.ClientSession, url: str) -> int:
    try:
        async with client.get(url) as response:
            return int(response.status)
    except aiohttp.ClientError:
        return 0


async def test_sigterm_loses_no_stream(bench: Any, tmp_path: Path) -> None:
    """The real process: not ready at once, serving still, then no new connections, and open streams run to their end."""
    runtime = await bench.runtime(tokens=30, pause=0.1)
    port, internal = free_port(), free_port()
    upstreams = tmp_path / "models.yaml"
    upstreams.write_text(
        json.dumps({"models": [{"name": "ns/m", "served_names": ["m"], "urls": [runtime.url]}]})
    )
    process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
        [
            sys.executable,
            "-m",
            "kubeinfer_gateway",
            "--host=127.0.0.1",
            f"--port={port}",
            f"--internal-port={internal}",
            "--discovery=static",
            f"--upstream-file={upstreams}",
            "--shutdown-delay=1.5",
        ],
        env={"PYTHONPATH": str(ROOT / "gateway"), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    bench.stack.callback(process.kill)
    url, health = f"http://127.0.0.1:{port}/v1/chat/completions", f"http://127.0.0.1:{internal}/readyz"

    async def stream(client: aiohttp.ClientSession) -> tuple[int, bool, str | None]:
        async with client.post(url, json={"model": "m", "messages": [], "stream": True}) as response:
            body = await response.read()
            return response.status, body.endswith(b"data: [DONE]\n\n"), response.headers.get("connection")

    async with aiohttp.ClientSession() as client:
        for _ in range(200):
            if await _get(client, health) == 200:
                break
            await asyncio.sleep(0.05)
        early = [asyncio.create_task(stream(client)) for _ in range(10)]
        await asyncio.sleep(0.5)
        process.terminate()
        await asyncio.sleep(0.3)
        assert await _get(client, health) == 503
        late = [asyncio.create_task(stream(client)) for _ in range(10)]
        assert await asyncio.gather(*early) == [(200, True, None)] * 10
        assert await asyncio.gather(*late) == [(200, True, "close")] * 10
        assert await asyncio.to_thread(process.wait, 5) == 0
    out, err = process.communicate()
    assert len(out.splitlines()) == 20
    assert {json.loads(line)["model"] for line in out.splitlines()} == {"m"}
    assert b"Traceback" not in err


async def test_a_kept_connection_is_not_closed_in_the_clients_face(bench: Any) -> None:
    """The next request on a connection whose stream ended while the gateway shuts down is answered, then it closes."""
    runtime = await bench.runtime(tokens=5, pause=0.1)
    await bench.start()
    bench.serve("m", runtime)
    body = json.dumps({"model": "m", "messages": [], "stream": True}).encode()
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.gateway.port)
    writer.write(request)
    await reader.readuntil(b"\r\n\r\n")
    stopping = asyncio.create_task(bench.gateway.stop(0, 10))
    await reader.readuntil(b"\r\n0\r\n\r\n")
    await asyncio.sleep(0.2)
    writer.write(request)
    second = await asyncio.wait_for(reader.read(), 5)
    assert second.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close\r\n" in second
    assert second.endswith(b"\r\n0\r\n\r\n")
    writer.close()
    await asyncio.wait_for(stopping, 5)


async def test_sigterm_ends_what_lasts_too_long(bench: Any) -> None:
    runtime = await bench.runtime(tokens=1000, pause=0.1)
    await bench.start()
    bench.serve("m", runtime)
    bench.serve("asleep")
    request = asyncio.create_task(read_all(bench))
    waiting = asyncio.create_task(status_of(bench, model="asleep"))
    await eventually(lambda: runtime.running == 1 and bench.gateway.registry.waiting() == 1)
    await bench.gateway.stop(0, 1)
    with pytest.raises(aiohttp.ClientError):
        await request
    status, retry, _ = await waiting
    assert (status, retry) == (503, "1")
    await eventually(lambda: runtime.running == 0, 1)


async def test_the_upstream_file_is_read_again(bench: Any, tmp_path: Path) -> None:
    one, two = await bench.runtime(name="one"), await bench.runtime(name="two")
    file = tmp_path / "models.yaml"
    file.write_text(f"models:\n- name: m\n  urls: [{one.url}]\n")
    await bench.start(discovery="static", upstream_file=str(file))
    assert (await status_of(bench))[0] == 200
    file.write_text(f"models:\n- name: m\n  urls: [{two.url}]\n- name: n\n")
    await eventually(lambda: bench.gateway.registry.names() == ["m", "n"])
    await status_of(bench)
    assert len(two.requests) == 1
    file.write_text("models: nonsense")
    await asyncio.sleep(1.2)
    assert bench.gateway.registry.names() == ["m", "n"]
