"""A runtime to test against: a real aiohttp server that streams as ours does, and misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class FakeRuntime:
    """`tokens` events a request, `pause` seconds apart. What came in is kept in `requests`."""

    name: str = "runtime"
    tokens: int = 5
    pause: float = 0.0
    delay: float = 0.0
    token_size: int = 0
    status: int = 200
    draining: bool = False
    break_after: int | None = None  # events after which the connection is cut
    requests: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0
    sent: int = 0
    port: int = 0

    async def start(self, port: int = 0) -> FakeRuntime:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        return self

    async def stop(self) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.requests.append({"path": request.path_qs, "headers": dict(request.headers), "body": raw})
        if self.draining:
            response = web.json_response({"error": {"message": "draining"}}, status=503)
            response.headers["retry-after"] = "1"
            return response
        if self.status != 200:
            return web.json_response({"error": {"message": f"status {self.status}"}}, status=self.status)
        body = json.loads(raw)
        self.running += 1
        try:
            if self.delay:
                await asyncio.sleep(self.delay)
            if body.get("stream"):
                return await self._stream(request, body)
            usage = {"prompt_tokens": 7, "completion_tokens": self.tokens, "total_tokens": 7 + self.tokens}
            choices = [{"index": 0, "message": {"role": "assistant", "content": f"from {self.name}"}}]
            return web.json_response(
                {"id": "x", "model": body.get("model"), "choices": choices, "usage": usage}
            )
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for index in range(self.tokens):
            if self.break_after is not None and index >= self.break_after:
                assert request.transport is not None
                request.transport.abort()
                await asyncio.sleep(1)
            text = f"{self.name}-{index} " + "x" * self.token_size
            event = {
                "id": "x",
                "object": "chat.completion.chunk",
                "choices": [{"index": 0, "delta": {"content": text}}],
            }
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.sent += 1
            if self.pause:
                await asyncio.sleep(self.pause)
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 7, "completion_tokens": self.tokens, "total_tokens": 7 + self.tokens}
            await response.write(
                b"data: " + json.dumps({"id": "x", "choices": [], "usage": usage}).encode() + b"\n\n"
            )
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response
