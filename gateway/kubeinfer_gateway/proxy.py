"""The way of a request: admitted, matched with a model and an endpoint, sent, and its answer streamed back."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from kubeinfer_gateway.access_log import AccessLog
from kubeinfer_gateway.body import read_body
from kubeinfer_gateway.connection import SCOPE_KEY, ClientStream, send_error
from kubeinfer_gateway.errors import GatewayError, model_not_found
from kubeinfer_gateway.exchange import CLIENT_LEFT, Exchange, session
from kubeinfer_gateway.http1 import HOP_BY_HOP, ResponseHead
from kubeinfer_gateway.keys import ApiKey, KeyStore
from kubeinfer_gateway.metrics import UNKNOWN, Metrics
from kubeinfer_gateway.options import GatewayOptions
from kubeinfer_gateway.registry import Endpoint, Model, Registry
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


class _Retry(Exception):
    """The endpoint did not take the request; another one may. `error` is the answer if none does."""

    def __init__(self, error: GatewayError, *, same: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.same = same


class Proxy:
    """The raw ASGI application of every route that a runtime answers."""

    def __init__(
        self,
        options: GatewayOptions,
        registry: Registry,
        keys: KeyStore,
        metrics: Metrics,
        access_log: AccessLog,
        upstream_key: bytes | None = None,
    ) -> None:
        self.options = options
        self.registry = registry
        self.keys = keys
        self.metrics = metrics
        self.access_log = access_log
        self.upstreams = Upstreams(
            connect_timeout=options.connect_timeout,
            idle_timeout=options.upstream_keepalive,
            max_idle=options.upstream_max_idle,
        )
        self.upstream_key = upstream_key
        self.active = 0
        self.buffered = 0
        self.shutting_down = False
        self._streams: set[Exchange] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        client: ClientStream = scope[SCOPE_KEY]
        exchange = Exchange(scope, client, task)
        self.active += 1
        try:
            client.watch(exchange.client_lost)
            await self._handle(exchange, receive)
        except GatewayError as error:
            exchange.error = error.code or error.message
            exchange.status = CLIENT_LEFT
            if not client.lost:
                await self._answer_error(exchange, error, send)
        except asyncio.CancelledError:
            if client.lost:
                exchange.status = CLIENT_LEFT
            else:  # the shutdown's deadline
                exchange.error = "shutdown"
                if client.started:
                    client.break_off()
                else:
                    closing = GatewayError(
                        503, "The gateway is shutting down.", code="shutting_down", retry_after=1, close=True
                    )
                    await self._answer_error(exchange, closing, send)
        except Exception:
            logger.exception("request %s failed within the gateway", exchange.request_id)
            exchange.error = "internal_error"
            if client.started:
                client.break_off()
            elif not client.lost:
                failure = GatewayError(
                    500, "The gateway failed; its log has the request's id.", code="internal_error"
                )
                await self._answer_error(exchange, failure, send)
        finally:
            self.active -= 1
            client.release()
            self._finish(exchange)

    # A request's way

    async def _handle(self, exchange: Exchange, receive: Any) -> None:
        scope = exchange.scope
        if self.active > self.options.max_requests:
            raise GatewayError(
                429, "The gateway is handling as many requests as it may.", code="overloaded", retry_after=1
            )
        exchange.key = self.keys.authenticate(scope["headers"])
        if scope["method"] != "POST":
            raise GatewayError(
                405,
                f"{scope['method']} {scope['path']}: only POST is passed on to models.",
                code="method_not_allowed",
            )
        try:
            await self._read_request(exchange, receive)
            await self._dispatch(exchange)
        finally:
            self._drop_body(exchange)

    async def _read_request(self, exchange: Exchange, receive: Any) -> None:
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
                        self.buffered += len(piece)
                        if exchange.bytes_in > limit:
                            raise too_large
                        if self.buffered > self.options.max_buffered_bytes:
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

    def _drop_body(self, exchange: Exchange) -> None:
        if exchange.body is not None:
            self.buffered -= exchange.bytes_in
            exchange.body = None

    async def _dispatch(self, exchange: Exchange) -> None:
        assert exchange.body is not None
        body = read_body(exchange.body)
        exchange.stream = body.stream
        key = exchange.key
        name = body.model
        if not name:
            raise GatewayError(
                400,
                "The request names no model. Set 'model' to one of: "
                + ", ".join(self.visible_names(key)[:20]),
                param="model",
                code="model_required",
            )
        exchange.model_name = name
        if key is not None and not key.allows(name):
            raise GatewayError(
                403,
                f"The API key '{key.name}' may not use the model '{name[:200]}'.",
                param="model",
                code="model_not_allowed",
            )
        model = self.registry.find(name)
        if model is None:
            if not self.registry.synced:
                raise GatewayError(
                    503, "The gateway is still learning which models exist.", code="starting", retry_after=1
                )
            raise model_not_found(name, self.visible_names(key))
        exchange.model = model
        if key is not None:
            try:
                key.admit(_estimate(exchange))
            except GatewayError as error:
                self.metrics.limited.labels(key.name, error.code).inc()
                raise
            exchange.reserved = _estimate(exchange)
        model.last_request = time.time()
        routing_key = b""
        if self.options.routing == "prefix":
            routing_key = session(exchange.scope["headers"]) or body.prefix(self.options.prefix_bytes)
        await self._try_endpoints(exchange, model, routing_key)

    def visible_names(self, key: ApiKey | None) -> list[str]:
        names = self.registry.names()
        return names if key is None else [name for name in names if key.allows(name)]

    async def _try_endpoints(self, exchange: Exchange, model: Model, routing_key: bytes) -> None:
        tried: set[Endpoint] = set()
        fresh = False
        endpoint: Endpoint | None = None
        while True:
            if endpoint is None:
                endpoint = model.pick(routing_key, tried)
            if endpoint is None and tried:
                # Every endpoint failed: each gets another chance, after a pause in which discovery may bring news.
                tried.clear()
                await model.changed(min(0.25 * 2 ** min(exchange.retries - 1, 3), 1.0))
                endpoint = model.pick(routing_key)
            if endpoint is None:
                endpoint = await self._wait_for_endpoint(exchange, model, routing_key)
            try:
                await self._attempt(exchange, model, endpoint, fresh)
                return
            except _Retry as retry:
                exchange.error = retry.error.code
                if retry.same:  # an idle connection that had just been closed
                    fresh = True
                    continue
                fresh = False
                if (
                    exchange.retries >= self.options.retries
                    and not model.gone
                    and endpoint.draining_until < time.monotonic()
                ):
                    raise retry.error from None
                exchange.retries += 1
                self.metrics.retries.labels(model.key).inc()
                tried.add(endpoint)
                endpoint = None

    async def _wait_for_endpoint(self, exchange: Exchange, model: Model, routing_key: bytes) -> Endpoint:
        """Holds the request until the model has an endpoint. Raises GatewayError 429 (queue full), 503 (too late)."""
        options = self.options
        loop = asyncio.get_running_loop()
        begin = loop.time()
        if self.registry.waiting() >= options.queue_total:
            raise GatewayError(
                429,
                f"{options.queue_total} requests wait for models already.",
                code="queue_full",
                retry_after=5,
            )
        model.enter(options.queue_size)
        try:
            deadline = begin + options.queue_timeout - exchange.queue_time
            keepalive = options.sse_keepalive if exchange.stream and not exchange.client.http_1_0 else 0
            next_comment = begin + keepalive if keepalive else deadline
            while True:
                now = loop.time()
                note = f" ({model.spec.note})" if model.spec.note else ""
                if model.spec.suspended:
                    raise GatewayError(
                        503,
                        f"The model '{exchange.model_name}' is suspended.",
                        code="model_suspended",
                        retry_after=60,
                    )
                if now >= deadline:
                    raise GatewayError(
                        503,
                        f"The model '{exchange.model_name}' had no ready replica within {options.queue_timeout:g} s{note}.",
                        code="model_not_ready",
                        retry_after=10,
                    )
                if model.gone:
                    raise model_not_found(exchange.model_name or "", self.visible_names(exchange.key))
                if keepalive and now >= next_comment:
                    self._comment(exchange)
                    next_comment = now + keepalive
                await model.changed(min(next_comment, deadline) - now)
                endpoint = model.pick(routing_key)
                if endpoint is not None:
                    return endpoint
        finally:
            model.leave()
            exchange.queue_time += loop.time() - begin
            model.last_request = time.time()

    def _comment(self, exchange: Exchange) -> None:
        """Starts the answer early, as an event stream, and puts a comment into it that clients skip."""
        client = exchange.client
        if not client.started:
            exchange.status = 200
            client.start(
                200,
                [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-request-id", exchange.request_id.encode()),
                    (b"transfer-encoding", b"chunked"),
                ],
                close=self.shutting_down,
            )
        if not client.paused:
            client.write_chunk(b": waiting for a replica\n\n")

    async def _attempt(self, exchange: Exchange, model: Model, endpoint: Endpoint, fresh: bool) -> None:
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
            self._drop_body(exchange)
            await self._stream(exchange, model, endpoint, connection, head)
        finally:
            endpoint.inflight -= 1
            model.inflight -= 1
            exchange.connection = None
            self._streams.discard(exchange)
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
            return _Retry(answer, same=True)
        self._count_failure(model, endpoint, "connect" if connection is None else "closed")
        return _Retry(answer)

    def _judge(self, exchange: Exchange, model: Model, endpoint: Endpoint, head: ResponseHead) -> None:
        """Raises _Retry where the endpoint refused the request in a way that another one may not."""
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
            raise _Retry(refused)
        self._count_failure(model, endpoint, f"status_{head.status}")
        if exchange.retries < self.options.retries and model.pick(b"", (endpoint,)) is not None:
            raise _Retry(refused)

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
        for name, value in scope["headers"]:
            if name == b"x-forwarded-for":
                forwarded = value + b", "
            if name in _NOT_FORWARDED or (replace_key and name in secret):
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

    # The answer's way

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
        headers = [(name, value) for name, value in head.headers if name not in _NOT_RETURNED]
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
            client.start(head.status, headers, close=close or self.shutting_down)
        chunked_out = framing == "chunked" or head.chunked
        exchange.seen, exchange.seen_at = -1, time.monotonic()
        self._streams.add(exchange)
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
            exchange.usage = Usage(_estimate(exchange), max(connection.events - 1, 0), exact=False)

    async def _answer_error(self, exchange: Exchange, error: GatewayError, send: Any) -> None:
        client = exchange.client
        if client.started:
            exchange.status = 200
            if not exchange.client.cycle.response_complete:
                client.write_chunk(error.event())
                client.write(b"0\r\n\r\n")
                client.finish()
            return
        exchange.status = error.status
        if self.shutting_down:
            error.close = True
        await send_error(send, error, [(b"x-request-id", exchange.request_id.encode())])

    # Afterwards

    def _finish(self, exchange: Exchange) -> None:
        duration = time.monotonic() - exchange.start
        metrics = self.metrics
        model = exchange.model.key if exchange.model is not None else UNKNOWN
        metrics.requests.labels(model, str(exchange.status)).inc()
        if exchange.model is not None:
            metrics.duration.labels(model).observe(duration)
            if exchange.first_byte is not None:
                metrics.first_byte.labels(model).observe(exchange.first_byte)
            if exchange.queue_time:
                metrics.queue_time.labels(model).observe(exchange.queue_time)
        usage = exchange.usage
        key = exchange.key
        if key is not None:
            metrics.key_requests.labels(key.name, str(exchange.status)).inc()
            if exchange.reserved:
                key.settle(exchange.reserved, usage.total if usage is not None else 0)
        if usage is not None:
            name = key.name if key is not None else ""
            metrics.tokens.labels(name, model, "prompt").inc(usage.prompt)
            metrics.tokens.labels(name, model, "completion").inc(usage.completion)
        if self.access_log.enabled:
            self.access_log.write(exchange.record(duration))

    def sweep(self, now: float) -> None:
        """Ends streams on which nothing moves; called every second."""
        for exchange in list(self._streams):
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
        for model in self.registry.models.values():
            for endpoint in model.endpoints.values():
                if endpoint.idle:
                    self.upstreams.sweep(endpoint)


def _estimate(exchange: Exchange) -> int:
    """Tokens of the prompt, about: four bytes each."""
    return exchange.bytes_in // 4
