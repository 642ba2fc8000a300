"""A request at one endpoint: sent there, judged by the head of its answer, and the answer streamed back."""

from __future__ import annotations

import asyncio
import logging
import time

from kubeinfer_gateway.errors import GatewayError
from kubeinfer_gateway.exchange import Exchange
from kubeinfer_gateway.http1 import HOP_BY_HOP, ResponseHead, named_by_connection
from kubeinfer_gateway.keys import KeyStore
from kubeinfer_gateway.metrics import Metrics
from kubeinfer_gateway.options import GatewayOptions
from kubeinfer_gateway.registry import Endpoint, Model
from kubeinfer_gateway.request_bodies import RequestBodies
from kubeinfer_gateway.upstream import UpstreamConnection, UpstreamError, Upstreams
from kubeinfer_gateway.usage import Usage, read_usage

logger = logging.getLogger(__name__)

_NOT_FORWARDED = HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"expect",
    b"x-request-id",
    b"x-forwarded-for",
    b"accept-encoding",  # a compressed stream would be held back in pieces, and hide its usage
}
_NOT_RETURNED = HOP_BY_HOP | {b"x-request-id"}
_COLLECT_LIMIT = 1 << 20
_FALSE_STARTS = (502, 503, 504)
# A runtime that is shutting down answers 503 with Retry-After. It is asked again after that time, this at most.
_PAUSE_MAX = 10
# So often may one request have an endpoint paused; a request that is always refused must not stop the others.
_PAUSES = 2


class Retry(Exception):
    """The endpoint did not take the request; another one may. `error` is the answer if none does."""

    def __init__(self, error: GatewayError, *, same: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.same = same


class Forwarder:
    """Connections to the runtimes, and the streams that run over them."""

    def __init__(
        self,
        options: GatewayOptions,
        keys: KeyStore,
        metrics: Metrics,
        bodies: RequestBodies,
        stopping: asyncio.Event,
        upstream_key: bytes | None,
    ) -> None:
        self.options = options
        self.keys = keys
        self.metrics = metrics
        self.bodies = bodies
        self.stopping = stopping
        self.upstream_key = upstream_key
        self.upstreams = Upstreams(
            connect_timeout=options.connect_timeout,
            idle_timeout=options.upstream_keepalive,
            max_idle=options.upstream_max_idle,
        )
        self.streams: set[Exchange] = set()

    async def attempt(self, exchange: Exchange, model: Model, endpoint: Endpoint, fresh: bool) -> None:
        """Raises Retry where another endpoint may take the request; `fresh` forbids a connection used before."""
        exchange.endpoint = endpoint
        connection: UpstreamConnection | None = None
        endpoint.inflight += 1
        model.inflight += 1
        try:
            try:
                connection = await self.upstreams.acquire(endpoint, fresh)
                exchange.connection = connection
                async with asyncio.timeout(self.options.first_byte_timeout):
                    body = exchange.body or b""
                    head = await connection.send("POST", self._request_head(exchange, endpoint), body)
            except UpstreamError as error:
                raise self._unreached(exchange, model, endpoint, connection, error) from None
            except TimeoutError:
                self._count_failure(model, endpoint, "first_byte_timeout")
                raise GatewayError(
                    504,
                    f"The replica did not begin its answer within {self.options.first_byte_timeout:g} s.",
                    code="upstream_timeout",
                ) from None
            self._judge(exchange, model, endpoint, head)
            exchange.error = None  # of an attempt before this one
            exchange.first_byte = time.monotonic() - exchange.start
            self.bodies.drop(exchange)
            await self._stream(exchange, model, endpoint, connection, head)
        finally:
            endpoint.inflight -= 1
            model.inflight -= 1
            exchange.connection = None
            self.streams.discard(exchange)
            if connection is not None:
                exchange.bytes_out += connection.bytes_in
                self._read_usage(exchange, connection)
                self.upstreams.release(connection)

    def _unreached(
        self,
        exchange: Exchange,
        model: Model,
        endpoint: Endpoint,
        connection: UpstreamConnection | None,
        error: UpstreamError,
    ) -> Exception:
        answer = GatewayError(
            502,
            f"The model '{exchange.model_name}' could not be reached: {error}.",
            code="upstream_unreachable",
            retry_after=1,
        )
        if error.started:
            self._count_failure(model, endpoint, "bad_response")
            return answer
        if connection is not None and connection.served:
            return Retry(answer, same=True)
        self._count_failure(model, endpoint, "connect" if connection is None else "closed")
        return Retry(answer)

    def _judge(self, exchange: Exchange, model: Model, endpoint: Endpoint, head: ResponseHead) -> None:
        """Raises Retry where the endpoint refused the request in a way that another one may not."""
        if head.status not in _FALSE_STARTS:
            model.succeeded(endpoint)
            return
        refused = GatewayError(
            503,
            f"Every replica of '{exchange.model_name}' refused the request.",
            code="upstream_unavailable",
            retry_after=2,
        )
        wait = head.get(b"retry-after")
        if head.status == 503 and (wait is not None or not head.keep_alive) and exchange.pauses < _PAUSES:
            exchange.pauses += 1
            seconds = int(wait) if wait is not None and wait.isdigit() else _PAUSE_MAX
            model.pause(endpoint, min(max(seconds, 1), _PAUSE_MAX))
            raise Retry(refused)
        self._count_failure(model, endpoint, f"status_{head.status}")
        if (
            exchange.retries < self.options.retries
            and model.pick(exchange.model_name or "", b"", (endpoint,)) is not None
        ):
            raise Retry(refused)

    def _count_failure(self, model: Model, endpoint: Endpoint, kind: str) -> None:
        self.metrics.upstream_errors.labels(model.key, kind).inc()
        if model.failed(endpoint):
            self.metrics.ejections.labels(model.key).inc()
            logger.warning(
                "%s: %s is left out for a while after failures (%s)", model.key, endpoint.spec.address, kind
            )

    def _request_head(self, exchange: Exchange, endpoint: Endpoint) -> bytes:
        scope = exchange.scope
        target: bytes = scope["raw_path"]
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        parts = [b"POST ", target, b" HTTP/1.1\r\nhost: ", endpoint.spec.address.encode(), b"\r\n"]
        replace_key = self.keys.required or self.upstream_key is not None
        secret = (b"authorization", b"api-key", b"x-api-key")
        forwarded = b""
        not_forwarded = _NOT_FORWARDED | named_by_connection(scope["headers"])
        for name, value in scope["headers"]:
            if name == b"x-forwarded-for":
                forwarded = value + b", "
            if name in not_forwarded or (replace_key and name in secret):
                continue
            parts += (name, b": ", value, b"\r\n")
        if self.upstream_key is not None:
            parts += (b"authorization: Bearer ", self.upstream_key, b"\r\n")
        if scope["client"]:
            parts += (b"x-forwarded-for: ", forwarded, scope["client"][0].encode(), b"\r\n")
        parts.append(
            b"x-request-id: %b\r\ncontent-length: %d\r\n\r\n"
            % (exchange.request_id.encode(), exchange.bytes_in)
        )
        return b"".join(parts)

    async def _stream(
        self,
        exchange: Exchange,
        model: Model,
        endpoint: Endpoint,
        connection: UpstreamConnection,
        head: ResponseHead,
    ) -> None:
        client = exchange.client
        content_type = head.get(b"content-type") or b""
        exchange.sse = content_type.startswith(b"text/event-stream")
        if client.started and not (exchange.sse and head.status == 200):
            await self._wrap_as_event(exchange, connection)
            return
        close = False
        not_returned = _NOT_RETURNED | named_by_connection(head.headers)
        headers = [(name, value) for name, value in head.headers if name not in not_returned]
        headers.append((b"x-request-id", exchange.request_id.encode()))
        framing = "same"
        if head.length is None:
            headers = [header for header in headers if header[0] != b"content-length"]
            if client.http_1_0:
                framing, close = "plain", True
            else:
                headers.append((b"transfer-encoding", b"chunked"))
                framing = "same" if head.chunked else "chunked"
        elif client.started:
            framing = "chunked"
        if not client.started:
            exchange.status = head.status
            client.start(head.status, headers, close=close or self.stopping.is_set())
        chunked_out = framing == "chunked" or head.chunked
        exchange.seen, exchange.seen_at = -1, time.monotonic()
        self.streams.add(exchange)
        client.throttle(connection.pause, connection.resume)
        done = connection.forward(client.write, framing, exchange.sse and exchange.key is not None)
        if client.paused:
            connection.pause()
        try:
            await done
        except UpstreamError as error:
            self._count_failure(model, endpoint, "broke_off")
            exchange.error = "upstream_broke_off"
            if exchange.sse and chunked_out and framing != "plain" and connection.at_boundary:
                broken = GatewayError(502, f"The replica broke off: {error}.", code="upstream_broke_off")
                client.write_chunk(broken.event())
            client.break_off()
            return
        if framing == "chunked":
            client.write(b"0\r\n\r\n")
        client.finish()

    async def _wrap_as_event(self, exchange: Exchange, connection: UpstreamConnection) -> None:
        """Puts a whole answer, mostly an error, into an event stream that was started while the request waited."""
        body = bytearray()
        client = exchange.client

        def collect(data: bytes) -> None:
            if len(body) <= _COLLECT_LIMIT:
                body.extend(data)

        try:
            await connection.forward(collect, "plain")
        except UpstreamError as error:
            body[:] = GatewayError(502, f"The replica broke off: {error}.", code="upstream_broke_off").body()
        if connection.response is not None and connection.response.status >= 400:
            exchange.error = f"upstream_status_{connection.response.status}"
        lines = b" ".join(bytes(body).split(b"\n"))
        client.write_chunk(b"data: " + lines + b"\n\n")
        client.write(b"0\r\n\r\n")
        client.finish()

    def _read_usage(self, exchange: Exchange, connection: UpstreamConnection) -> None:
        response = connection.response
        if response is None or response.status != 200:
            return
        exchange.usage = read_usage(connection.last_bytes()[-16384:])
        if exchange.usage is None and exchange.key is not None and (exchange.sse or exchange.client.lost):
            # No usage was asked for, or the client did not wait for it: an event is about a token.
            exchange.usage = Usage(exchange.prompt_estimate, max(connection.events - 1, 0), exact=False)

    def sweep(self, now: float) -> None:
        """Ends streams on which nothing moves."""
        for exchange in list(self.streams):
            connection = exchange.connection
            if connection is None:
                continue
            if connection.pieces != exchange.seen:
                exchange.seen, exchange.seen_at = connection.pieces, now
            elif exchange.client.paused:
                if now - exchange.seen_at > self.options.write_timeout:
                    exchange.error = "client_too_slow"
                    exchange.client.protocol.transport.abort()  # connection_lost does the rest
            elif now - exchange.seen_at > self.options.idle_timeout:
                connection.abort()
