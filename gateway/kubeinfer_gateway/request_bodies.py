"""Bodies of requests: read whole, and held until a runtime has taken them; bounded one by one and together."""

from __future__ import annotations

import asyncio
from typing import Any

from kubeinfer_gateway.errors import GatewayError
from kubeinfer_gateway.exchange import Exchange
from kubeinfer_gateway.options import GatewayOptions


class RequestBodies:
    """`held` is the bytes of all requests under way."""

    def __init__(self, options: GatewayOptions) -> None:
        self.options = options
        self.held = 0

    async def read(self, exchange: Exchange, receive: Any) -> None:
        """Raises GatewayError 408 (too slow), 413 (too large), 429 (too many bytes held already)."""
        limit = self.options.max_body_bytes
        too_large = GatewayError(
            413, f"The request body is larger than {limit} bytes.", code="request_too_large", close=True
        )
        for name, value in exchange.scope["headers"]:
            if name == b"content-length" and int(value) > limit:
                raise too_large
        pieces: list[bytes] = []
        try:
            async with asyncio.timeout(self.options.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise asyncio.CancelledError
                    piece = message["body"]
                    if piece:
                        pieces.append(piece)
                        exchange.bytes_in += len(piece)
                        self.held += len(piece)
                        if exchange.bytes_in > limit:
                            raise too_large
                        if self.held > self.options.max_buffered_bytes:
                            raise GatewayError(
                                429,
                                "The gateway holds as many request bytes as it may.",
                                code="overloaded",
                                retry_after=1,
                                close=True,
                            )
                    if not message["more_body"]:
                        break
        except TimeoutError:
            raise GatewayError(
                408,
                f"The request's body did not arrive within {self.options.body_timeout:g} s.",
                code="request_timeout",
                close=True,
            ) from None
        exchange.body = pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def drop(self, exchange: Exchange) -> None:
        """The request needs its body no more."""
        if exchange.body is not None:
            self.held -= exchange.bytes_in
            exchange.body = None
