"""Connections to runtimes: HTTP/1.1 with keep-alive, whose response bodies are handed on as they come.

The bytes of a body go from `data_received` straight into the client's transport: no task wakes, nothing is copied or
decoded on the way. Only the framing is followed, to know where the response ends.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from time import monotonic
from typing import cast

from kubeinfer_gateway.http1 import (
    MAX_HEAD,
    ChunkedBody,
    ProtocolError,
    ResponseHead,
    encode_chunk,
    parse_head,
)
from kubeinfer_gateway.registry import Endpoint

_EARLY_LIMIT = 64 * 1024


class UpstreamError(Exception):
    """The runtime could not be reached or broke off. `started`: some of its response had come already."""

    def __init__(self, message: str, *, started: bool) -> None:
        super().__init__(message)
        self.started = started


class UpstreamConnection(asyncio.Protocol):
    """One connection; at most one request on it at a time."""

    def __init__(self, endpoint: Endpoint, loop: asyncio.AbstractEventLoop) -> None:
        self.endpoint = endpoint
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self.idle_since = 0.0
        self.served = 0
        # Of the exchange under way
        self.head: asyncio.Future[ResponseHead] | None = None
        self.done: asyncio.Future[None] | None = None
        self.response: ResponseHead | None = None
        self.bytes_in = 0
        self.pieces = 0
        self.events = 0
        self.tail: list[bytes] = []
        self._method = "POST"
        self._buffer = b""
        self._early: list[bytes] | None = None
        self._early_size = 0
        self._eof = False
        self._pump: Callable[[bytes], None] | None = None
        self._write: Callable[[bytes], None] = _discard
        self._chunked: ChunkedBody | None = None
        self._left = 0
        self._last = b""
        self._previous = b""
        self._count_events = False
        self._started = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.pieces += 1
        if self._pump is not None:
            self._pump(data)
        elif self.head is None:
            self.abort()  # bytes that nobody asked for
        else:
            self._receive_head(data)

    def eof_received(self) -> None:
        return None  # the transport closes; connection_lost says the rest

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        reason = str(exc) if exc else "connection closed"
        if self.head is not None and not self.head.done():
            self.head.set_exception(UpstreamError(reason, started=self._started))
        if self.done is not None and not self.done.done():
            if (
                self.response is not None
                and self.response.length is None
                and not self.response.chunked
                and exc is None
            ):
                self._finish()
            else:
                self.done.set_exception(UpstreamError(reason, started=True))
        elif self._early is not None:
            self._eof = True
        if not self.head and self in self.endpoint.idle:
            self.endpoint.idle.remove(self)

    # The request

    def send(self, method: str, head: bytes, body: bytes | bytearray) -> asyncio.Future[ResponseHead]:
        """Writes a request; the future resolves with the response's head, or raises UpstreamError."""
        assert self.transport is not None
        self._method = method
        self.head = self.loop.create_future()
        self.done = self.response = None
        self.bytes_in = self.pieces = self.events = 0
        self.tail = []
        self._buffer = b""
        self._started = False
        self._eof = False
        if self.closed:
            self.head.set_exception(UpstreamError("connection closed", started=False))
        elif len(body) < 65536:
            self.transport.write(head + body)
        else:
            self.transport.writelines([head, body])
        return self.head

    # The response

    def _receive_head(self, data: bytes) -> None:
        self._started = True
        if self._early is not None:
            self._early.append(data)
            self._early_size += len(data)
            if self._early_size > _EARLY_LIMIT:
                self.pause()
            return
        buffer = self._buffer + data if self._buffer else data
        assert self.head is not None
        try:
            while True:
                end = buffer.find(b"\r\n\r\n")
                if end < 0:
                    if len(buffer) > MAX_HEAD:
                        raise ProtocolError("response head too long")
                    self._buffer = buffer
                    return
                response = parse_head(buffer[:end], self._method)
                buffer = buffer[end + 4 :]
                if response.status >= 200:
                    break
        except ProtocolError as error:
            if not self.head.done():
                self.head.set_exception(UpstreamError(str(error), started=True))
            self.abort()
            return
        self._buffer = b""
        self.response = response
        self._early = [buffer] if buffer else []
        self._early_size = len(buffer)
        if not self.head.done():
            self.head.set_result(response)

    def forward(
        self, write: Callable[[bytes], None], framing: str, count_events: bool = False
    ) -> asyncio.Future[None]:
        """Hands the body to `write` from now on; the future resolves at its end, or raises UpstreamError.

        `framing`: "same" hands on the bytes as they are, chunk framing included; "chunked" makes chunks of a body
        that came without; "plain" gives the body alone.
        """
        response = self.response
        assert response is not None
        self.done = self.loop.create_future()
        self._write = write
        self._count_events = count_events
        self._last = self._previous = b""
        if response.chunked:
            self._chunked = ChunkedBody(None if framing == "same" else [])
            self._pump = self._pump_chunked if framing == "same" else self._pump_decoded
        elif response.length is not None:
            self._left = response.length
            self._pump = self._pump_length
            if framing == "chunked":
                self._write = lambda data: write(encode_chunk(data))
        else:
            self._pump = self._pump_chunking if framing == "chunked" else self._pump_until_close
        early, self._early = self._early or [], None
        if response.length == 0:
            self._finish()
            return self.done
        for data in early:
            if self._pump is not None:
                self._pump(data)
        if self._eof and not self.done.done():
            self.connection_lost(None)
        self.resume()
        return self.done

    @property
    def at_boundary(self) -> bool:
        """A chunk of our own may be put behind what was forwarded so far."""
        return self._chunked is None or self._chunked.at_boundary

    def last_bytes(self) -> bytes:
        """The end of the body, as it came: enough to hold `usage`."""
        return self._previous + self._last

    def _note(self, data: bytes) -> None:
        self.bytes_in += len(data)
        # Pieces that are too short to hold the whole of `usage` are joined, so that what is kept stays short.
        if len(self._last) < 1024:
            self._last = (self._last + data)[-65536:] if len(data) < 65536 else data
        else:
            self._previous = self._last
            self._last = data
        if self._count_events:
            self.events += data.count(b"\n\n")

    def _pump_chunked(self, data: bytes) -> None:
        assert self._chunked is not None
        self._note(data)
        try:
            end = self._chunked.feed(data)
        except ProtocolError as error:
            self._break(str(error))
            return
        self._write(data if end is None else data[:end])
        if end is not None:
            self._finish(excess=end < len(data))

    def _pump_decoded(self, data: bytes) -> None:
        chunked = self._chunked
        assert chunked is not None
        assert chunked.payload is not None
        try:
            end = chunked.feed(data)
        except ProtocolError as error:
            self._break(str(error))
            return
        for piece in chunked.payload:
            self._note(piece)
            self._write(piece)
        chunked.payload.clear()
        if end is not None:
            self._finish(excess=end < len(data))

    def _pump_length(self, data: bytes) -> None:
        self._note(data)
        if len(data) < self._left:
            self._left -= len(data)
            self._write(data)
            return
        self._write(data[: self._left])
        self._finish(excess=len(data) > self._left)

    def _pump_chunking(self, data: bytes) -> None:
        self._note(data)
        self._write(encode_chunk(data))

    def _pump_until_close(self, data: bytes) -> None:
        self._note(data)
        self._write(data)

    def _finish(self, excess: bool = False) -> None:
        self._pump = None
        self._write = _discard
        if excess:
            self.abort()
        if self.done is not None and not self.done.done():
            self.done.set_result(None)

    def _break(self, reason: str) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(UpstreamError(reason, started=True))
        self.abort()

    # Flow control and the connection's life

    def pause(self) -> None:
        if self.transport is not None and not self.closed and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.transport is not None and not self.closed and not self.transport.is_closing():
            self.transport.resume_reading()

    def abort(self) -> None:
        """Closes at once: the runtime sees its client leave."""
        self._pump = _discard
        self._write = _discard
        if self.transport is not None and not self.closed:
            self.transport.abort()

    def reusable(self) -> bool:
        """Whether the next request may go over this connection."""
        return (
            not self.closed
            and self.transport is not None
            and not self.transport.is_closing()
            and self.response is not None
            and self.response.keep_alive
            and self.done is not None
            and self.done.done()
            and not self.done.cancelled()
            and self.done.exception() is None
        )

    def reset(self) -> None:
        self.head = self.done = self.response = self._pump = self._chunked = self._early = None
        self._last = self._previous = b""
        self.resume()  # the last piece may have been too much for a slow client


class Upstreams:
    """Opens connections and keeps idle ones for reuse."""

    def __init__(self, *, connect_timeout: float, idle_timeout: float, max_idle: int) -> None:
        self.connect_timeout = connect_timeout
        self.idle_timeout = idle_timeout
        self.max_idle = max_idle
        self._tls: ssl.SSLContext | None = None

    async def acquire(self, endpoint: Endpoint, fresh: bool = False) -> UpstreamConnection:
        """An idle connection, or a new one. Raises UpstreamError where the endpoint cannot be reached in time."""
        oldest = monotonic() - self.idle_timeout
        while endpoint.idle and not fresh:
            connection = endpoint.idle.pop()
            if connection.closed or connection.idle_since < oldest:
                connection.abort()
                continue
            return connection
        loop = asyncio.get_running_loop()
        spec = endpoint.spec
        if spec.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            async with asyncio.timeout(self.connect_timeout):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(endpoint, loop),
                    spec.host,
                    spec.port,
                    ssl=self._tls if spec.tls else None,
                )
        except TimeoutError:
            raise UpstreamError(f"no connection within {self.connect_timeout:g} s", started=False) from None
        except OSError as error:
            raise UpstreamError(f"cannot connect: {error.strerror or error}", started=False) from None
        return connection

    def release(self, connection: UpstreamConnection) -> None:
        """Takes back a connection whose exchange is over, whichever way it ended."""
        endpoint = connection.endpoint
        if not connection.reusable() or endpoint.gone or len(endpoint.idle) >= self.max_idle:
            connection.abort()
            return
        connection.reset()
        connection.served += 1
        connection.idle_since = monotonic()
        endpoint.idle.append(connection)

    def sweep(self, endpoint: Endpoint) -> None:
        """Closes connections that were idle too long."""
        oldest = monotonic() - self.idle_timeout
        stale = [connection for connection in endpoint.idle if connection.idle_since < oldest]
        if stale:
            endpoint.idle = [connection for connection in endpoint.idle if connection.idle_since >= oldest]
            for connection in stale:
                connection.abort()


def _discard(data: bytes) -> None:
    pass
