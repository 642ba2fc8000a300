"""ASGI responses without a framework's cost a chunk: ready bytes, and streams whose client may leave or be slow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from kubeinfer.api.errors import ApiError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)


class BytesResponse(Response):
    """A body that is already encoded."""

    def __init__(
        self,
        body: bytes,
        status: int = 200,
        media_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(content=body, status_code=status, media_type=media_type, headers=headers)


def error_response(error: ApiError) -> BytesResponse:
    return BytesResponse(error.body, error.status, headers=error.headers)


class ClientGone(Exception):
    """The client has closed its connection."""


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has left (or the answer is complete)."""
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves; then :class:`ClientGone` is raised."""
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for future in (task, watch):
            if not future.done():
                future.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class Items(Protocol[T_co]):
    """What a stream is read from; ``close`` ends it early and frees what stands behind it."""

    def __aiter__(self) -> Items[T_co]: ...

    async def __anext__(self) -> T_co: ...

    def close(self) -> None: ...


async def next_item(items: Items[T]) -> T | None:
    """The next item, or None at the end."""
    try:
        return await anext(items)
    except StopAsyncIteration:
        return None


class StreamEncoder(Protocol[T_contra]):
    """Turns a stream's items into the bytes of its body."""

    media_type: str

    def encode(self, item: T_contra) -> bytes:
        """Bytes for one item; empty for nothing to send."""

    def finish(self) -> bytes:
        """Bytes after the last item."""

    def fail(self, error: Exception) -> bytes:
        """Bytes that tell the client of an error in the middle of the stream; nothing follows."""


class EncodedStream(Response):
    """Sends all of ``items`` through ``encoder``.

    The answer starts with its first item, and goes out in one piece with it: an error before it is raised, and so still
    gets a status code of its own. A client that leaves ends the stream: ``items`` is closed at once, which aborts its
    request. A client that is slow holds up only its own stream: uvicorn's send waits for it, and meanwhile the items merge
    where they come from.
    """

    def __init__(
        self,
        items: Items[Any],
        encoder: StreamEncoder[Any],
        headers: Mapping[str, str] | None = None,
    ):
        self.items = items
        self.encoder = encoder
        self.status_code = 200
        self.background = None
        self.media_type = encoder.media_type
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._pump(send, scope.get("kubeinfer.send", send)))
        except ClientGone:
            pass
        finally:
            self.items.close()

    async def _pump(self, send: Send, raw_send: Send) -> None:
        encoder = self.encoder
        encode = encoder.encode
        first = await next_item(self.items)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        send = raw_send  # the layers between have no part in a body's chunks
        try:
            body = encode(first) if first is not None else b""
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            async for item in self.items:
                body = encode(item)
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            last = encoder.finish()
        except Exception as exc:
            last = encoder.fail(exc)
        await send({"type": "http.response.body", "body": last, "more_body": False})
