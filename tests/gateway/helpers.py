"""What several tests of the gateway use."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def eventually(check: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise AssertionError("did not come true in time")
        await asyncio.sleep(0.01)


async def status_of(bench: Any, **body: Any) -> tuple[int, str | None, bytes]:
    async with bench.chat(**body) as response:
        return response.status, response.headers.get("retry-after"), await response.read()


async def read_all(bench: Any) -> None:
    async with bench.chat(stream=True) as response:
        await response.read()
