"""The client's side: uvicorn's HTTP protocol with the limits it lacks, and a way past ASGI for response bodies.

ASGI hands each piece of a body through two coroutines and an encoder. For a proxied stream of many small pieces that
is most of the work, so the proxy takes a `ClientStream` from the request's scope and writes to the transport itself;
everything else (parsing, keep-alive, pipelining, shutdown, the FastAPI routes) stays uvicorn's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from kubeinfer_gateway.errors import GatewayError
from kubeinfer_gateway.http1 import encode_chunk

SCOPE_KEY = "kubeinfer.client"
_LINGER = 2  # seconds
_H2C = re.compile(rb"\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n|\Z)", re.IGNORECASE)


class Limits:
    """What one client connection may do. Sizes are in bytes, times in seconds."""

    max_header_bytes = 64 * 1024
    max_connections = 20_000
    header_timeout = 15.0
    flush_timeout = 60.0


class ClientStream:
    """The response to one request, written straight to its connection."""

    __slots__ = ("_on_lost", "_on_pause", "_on_resume", "cycle", "lost", "protocol", "started")

    def __init__(self, protocol: GatewayProtocol, cycle: RequestResponseCycle) -> None:
        self.protocol = protocol
        self.cycle = cycle
        self.lost = False
        self.started = False
        self._on_lost: Callable[[], None] | None = None
        self._on_pause: Callable[[], None] | None = None
        self._on_resume: Callable[[], None] | None = None

    @property
    def http_1_0(self) -> bool:
        return self.cycle.scope["http_version"] == "1.0"

    @property
    def write(self) -> Callable[[bytes], None]:
        return self.protocol.transport.write

    @property
    def paused(self) -> bool:
        return self.protocol.flow.write_paused

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Calls `on_lost` when the client leaves before its response is complete (at once if it has left already)."""
        self._on_lost = on_lost
        self.protocol.streams.add(self)
        if self.protocol.transport.is_closing():
            self._lose()

    def throttle(self, on_pause: Callable[[], None] | None, on_resume: Callable[[], None] | None) -> None:
        """Calls `on_pause` when the client reads too slowly for what is written, `on_resume` when it caught up."""
        self._on_pause = on_pause
        self._on_resume = on_resume
        if on_pause is not None and self.paused:
            on_pause()

    def start(self, status: int, headers: Iterable[tuple[bytes, bytes]], *, close: bool = False) -> None:
        """Writes the head; the caller has put the body's framing among the headers."""
        self.started = True
        cycle = self.cycle
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        if close:
            cycle.keep_alive = False
        content = [STATUS_LINE[status]]
        for name, value in cycle.default_headers:
            content += (name, b": ", value, b"\r\n")
        for name, value in headers:
            content += (name, b": ", value, b"\r\n")
        content.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
        self.protocol.transport.write(b"".join(content))

    def write_chunk(self, data: bytes) -> None:
        self.protocol.transport.write(encode_chunk(data))

    def finish(self) -> None:
        """The whole response is written."""
        cycle = self.cycle
        self.release()
        if cycle.response_complete:
            return
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.protocol.transport.close()
        cycle.on_response()

    def break_off(self) -> None:
        """Closes the connection without the framing that would say that the response is whole."""
        self.release()
        self.cycle.response_complete = True
        self.protocol.transport.close()

    def abort(self) -> None:
        """Drops the connection with whatever is still unsent."""
        self.release()
        self.cycle.response_complete = True
        self.protocol.transport.abort()

    def release(self) -> None:
        self.protocol.streams.discard(self)
        self._on_lost = self._on_pause = self._on_resume = None

    def _lose(self) -> None:
        self.lost = True
        on_lost = self._on_lost
        self.release()
        if on_lost is not None:
            on_lost()


class GatewayProtocol(HttpToolsProtocol):
    """A client connection. `limits` is set once, before the server starts."""

    limits = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.streams: set[ClientStream] = set()
        self._header_bytes = 0
        self._in_head = False
        self._head_since = monotonic()  # infinite while no head is awaited
        self._closing_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self.connections.discard(self)
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for stream in list(self.streams):
            stream._lose()

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self.transport.is_closing():
            return
        if b"h2c" in data and (self.cycle is None or self.cycle.response_complete):
            data = _without_upgrade(data)
        super().data_received(data)
        if self._in_head:
            self._header_bytes += len(data)
            if self._header_bytes > self.limits.max_header_bytes:
                self._refuse_header()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._header_bytes = 0
        self._head_since = monotonic()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_since = float("inf")  # from here on the request's own time-outs and keep-alive's rule
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        app = self.app
        if size > self.limits.max_header_bytes:
            self.app = cast(Any, _header_too_large)
        try:
            super().on_headers_complete()
        finally:
            self.app = app
        cast(dict[str, Any], self.scope)[SCOPE_KEY] = ClientStream(self, self.cycle)

    def pause_writing(self) -> None:
        super().pause_writing()
        for stream in self.streams:
            if stream._on_pause is not None:
                stream._on_pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        for stream in list(self.streams):
            if stream._on_resume is not None:
                stream._on_resume()

    def shutdown(self) -> None:
        """Ends the connection, at once or a moment after its open response.

        That response's head promised that the connection stays. A client that goes by it may send its next request
        with the last byte still on the way, so there is time for one more, which is answered with `Connection: close`.
        """
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.timeout_keep_alive = _LINGER

    def sweep(self, now: float) -> None:
        """Closes a connection that takes too long to say what it wants, or to take the last of its answer."""
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            if now - self._closing_since > self.limits.flush_timeout:
                self.transport.abort()
            return
        busy = self.cycle is not None and not self.cycle.response_complete
        if not busy and now - self._head_since > self.limits.header_timeout:
            self.transport.close()

    def _refuse_header(self) -> None:
        error = _header_error()
        body = error.body()
        self.transport.write(
            STATUS_LINE[431]
            + b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            + body
        )
        self.transport.close()


def _without_upgrade(data: bytes) -> bytes:
    """Takes the offer of HTTP/2 out of a request's head: the parser would take the body for what follows the upgrade.

    Java's HTTP client makes that offer in each request, and may be answered in HTTP/1.1 (RFC 9110, section 7.8).
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return _H2C.sub(b"", head) + end + rest


def _header_error() -> GatewayError:
    return GatewayError(
        431,
        f"The request's header is larger than {GatewayProtocol.limits.max_header_bytes} bytes.",
        close=True,
    )


async def send_error(send: Any, error: GatewayError, extra: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Answers with an error over plain ASGI."""
    body = error.body()
    headers = [*error.headers(), (b"content-length", b"%d" % len(body)), *extra]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _header_too_large(scope: Any, receive: Any, send: Any) -> None:
    await send_error(send, _header_error())
