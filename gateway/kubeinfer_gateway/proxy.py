"""The way of a request: admitted, matched with a model, tried at its endpoints, or held until it has one."""

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
from kubeinfer_gateway.forward import Forwarder, Retry
from kubeinfer_gateway.keys import ApiKey, KeyStore
from kubeinfer_gateway.metrics import UNKNOWN, Metrics
from kubeinfer_gateway.options import GatewayOptions
from kubeinfer_gateway.registry import Endpoint, Model, Registry
from kubeinfer_gateway.request_bodies import RequestBodies

logger = logging.getLogger(__name__)


class ModelGoneError(Exception):
    """The model that a request waits for was deleted."""


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
        self.stopping = asyncio.Event()
        self.bodies = RequestBodies(options)
        self.forwarder = Forwarder(options, keys, metrics, self.bodies, self.stopping, upstream_key)
        self.active = 0

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
            await self.bodies.read(exchange, receive)
            await self._dispatch(exchange)
        finally:
            self.bodies.drop(exchange)

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
                key.admit(exchange.prompt_estimate)
            except GatewayError as error:
                self.metrics.limited.labels(key.name, error.code).inc()
                raise
            exchange.reserved = exchange.prompt_estimate
        model.last_request = time.time()
        routing_key = b""
        if self.options.routing == "prefix":
            routing_key = session(exchange.scope["headers"]) or body.prefix(self.options.prefix_bytes)
        while True:
            try:
                await self._try_endpoints(exchange, model, routing_key)
                return
            except ModelGoneError:
                # Deleted; perhaps made again under its name since.
                again = self.registry.find(name)
                if again is None:
                    raise model_not_found(name, self.visible_names(key)) from None
                model = exchange.model = again

    def visible_names(self, key: ApiKey | None) -> list[str]:
        names = self.registry.names()
        return names if key is None else [name for name in names if key.allows(name)]

    async def _try_endpoints(self, exchange: Exchange, model: Model, routing_key: bytes) -> None:
        name = exchange.model_name or ""
        tried: set[Endpoint] = set()
        fresh = False
        endpoint: Endpoint | None = None
        while True:
            if endpoint is None:
                endpoint = model.pick(name, routing_key, tried)
            if endpoint is None and tried:
                # Every endpoint failed: each gets another chance, after a pause in which discovery may bring news.
                tried.clear()
                await model.changed(min(0.25 * 2 ** min(exchange.retries - 1, 3), 1.0))
                endpoint = model.pick(name, routing_key)
            if endpoint is None:
                endpoint = await self._wait_for_endpoint(exchange, model, routing_key)
            try:
                await self.forwarder.attempt(exchange, model, endpoint, fresh)
                return
            except Retry as retry:
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
        """Holds the request until the model has an endpoint. Raises GatewayError 429 (queue full), 503 (too late), ModelGoneError."""
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
                    raise ModelGoneError
                if keepalive and now >= next_comment:
                    self._comment(exchange)
                    next_comment = now + keepalive
                await model.changed(min(next_comment, deadline) - now)
                endpoint = model.pick(exchange.model_name or "", routing_key)
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
                close=self.stopping.is_set(),
            )
        if not client.paused:
            client.write_chunk(b": waiting for a replica\n\n")

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
        if self.stopping.is_set():
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
        """Ends streams on which nothing moves, and connections that nobody uses; called every second."""
        self.forwarder.sweep(now)
        for model in self.registry.models.values():
            for endpoint in model.endpoints.values():
                if endpoint.idle:
                    self.forwarder.upstreams.sweep(endpoint)
