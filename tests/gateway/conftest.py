"""Real gateways, real runtimes and real clients on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
import uvloop

from gateway.fake_runtime import FakeRuntime
from kubeinfer_gateway.discovery import Discovery
from kubeinfer_gateway.options import GatewayOptions
from kubeinfer_gateway.registry import EndpointSpec, ModelSpec, Registry
from kubeinfer_gateway.server import Gateway


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the gateway runs on."""
    return {"uvloop": uvloop.new_event_loop}


class ManualDiscovery(Discovery):
    """Discovery under the test's hand."""

    def __init__(self) -> None:
        super().__init__(Registry())

    async def run(self) -> None:
        await asyncio.Event().wait()


class Bench:
    """A gateway, runtimes behind it, and a client; all closed at the test's end."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.stack = stack
        self.gateway: Gateway = None  # type: ignore[assignment]
        self.client: aiohttp.ClientSession = None  # type: ignore[assignment]

    async def runtime(self, **settings: Any) -> FakeRuntime:
        runtime = await FakeRuntime(**settings).start()
        self.stack.push_async_callback(runtime.stop)
        return runtime

    async def start(self, *, kubernetes: bool = False, **settings: Any) -> Gateway:
        options = GatewayOptions(
            **{"host": "127.0.0.1", "port": 0, "internal_port": 0, "access_log": False} | settings
        )
        if kubernetes or options.discovery == "static":
            self.gateway = Gateway(options)
        else:
            discovery = ManualDiscovery()
            self.gateway = Gateway(options, discovery)
            discovery.registry = self.gateway.registry
            self.gateway.registry.synced = True
        await self.gateway.start()
        self.stack.push_async_callback(self.gateway.stop, 0, 1)
        self.client = await self.stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60)
            )
        )
        return self.gateway

    def serve(
        self, name: str, *runtimes: FakeRuntime, created: float = 1.0, names: tuple[str, ...] = ()
    ) -> None:
        endpoints = tuple(EndpointSpec(f"{r.name}:{r.port}", "127.0.0.1", r.port) for r in runtimes)
        key = name if "/" in name else f"default/{name}"
        self.gateway.registry.put(ModelSpec(key, names or (name,), created, endpoints))

    async def raw_upstream(self, answer: bytes, *, close: bool = False) -> asyncio.Server:
        """A server that gives every request the same bytes."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                    await reader.readexactly(length)
                    writer.write(answer)
                    await writer.drain()
                    if close:
                        break
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.stack.callback(server.close)
        port = server.sockets[0].getsockname()[1]
        self.gateway.registry.put(
            ModelSpec("default/m", ("m",), 1.0, (EndpointSpec("raw", "127.0.0.1", port),))
        )
        return server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.port}"

    @property
    def internal(self) -> str:
        return f"http://127.0.0.1:{self.gateway.internal_port}"

    def chat(
        self, model: str = "m", text: str = "hello", headers: dict[str, str] | None = None, **body: Any
    ) -> Any:
        request = {"model": model, "messages": [{"role": "user", "content": text}], **body}
        return self.client.post(self.url + "/v1/chat/completions", json=request, headers=headers)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        yield Bench(stack)
    await asyncio.sleep(0.05)  # aborted transports close on the loop's next rounds


Start = Callable[..., Awaitable[Gateway]]
