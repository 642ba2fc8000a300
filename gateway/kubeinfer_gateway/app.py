"""The FastAPI applications: the gateway's own routes, and the internal port; proxied routes pass beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from kubeinfer_gateway.errors import GatewayError, model_not_found
from kubeinfer_gateway.exchange import is_proxied, request_id
from kubeinfer_gateway.proxy import Proxy


def _error_response(error: GatewayError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers)


def create_public_app(proxy: Proxy) -> Callable[..., Any]:
    """The ASGI application of the public port."""
    app = FastAPI(title="kubeinfer gateway", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(GatewayError)
    async def on_gateway_error(request: Request, error: GatewayError) -> Response:
        return _error_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path[:200]}: {error.detail}."
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return _error_response(GatewayError(error.status_code, text, code=code))

    def card(name: str, created: float, owner: str, ready: bool) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": int(created), "owned_by": owner, "ready": ready}

    @app.get("/v1/models")
    async def models(request: Request) -> JSONResponse:
        key = proxy.keys.authenticate(request.scope["headers"])
        served = [
            card(name, model.spec.created, model.key, bool(model.endpoints))
            for name, model in proxy.registry.served()
            if key is None or key.allows(name)
        ]
        return JSONResponse({"object": "list", "data": served})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> JSONResponse:
        key = proxy.keys.authenticate(request.scope["headers"])
        found = proxy.registry.find(name) if key is None or key.allows(name) else None
        if found is None:
            raise model_not_found(name, proxy.visible_names(key))
        return JSONResponse(card(name, found.spec.created, found.key, bool(found.endpoints)))

    @app.get("/health")
    @app.get("/ping")
    async def health() -> Response:
        return Response(status_code=503 if proxy.stopping.is_set() or not proxy.registry.synced else 200)

    async def entry(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and is_proxied(scope["path"]):
            await proxy(scope, receive, send)
            return
        start = time.monotonic()
        identity = request_id(scope["headers"])
        status = 0

        async def watched_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
                if proxy.stopping.is_set():
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await app(scope, receive, watched_send)
        if proxy.access_log.enabled and scope["path"] not in ("/health", "/ping"):
            proxy.access_log.write(
                {
                    "time": round(time.time(), 3),
                    "request_id": identity,
                    "method": scope["method"],
                    "path": scope["path"][:256],
                    "status": status,
                    "client": scope["client"][0] if scope["client"] else None,
                    "duration_ms": round((time.monotonic() - start) * 1e3, 2),
                }
            )

    return entry


def create_internal_app(proxy: Proxy, health: Callable[[], str | None]) -> FastAPI:
    """The internal port: metrics, probes and the demand that the operator polls. `health` says what is wrong, or None."""
    app = FastAPI(title="kubeinfer gateway, internal", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/metrics")
    async def metrics() -> Response:
        proxy.metrics.active.set(proxy.active)
        proxy.metrics.buffered.set(proxy.bodies.held)
        proxy.metrics.collect(proxy.registry)
        text = await asyncio.to_thread(proxy.metrics.render)  # so that no stream stands still meanwhile
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/demand")
    async def demand() -> JSONResponse:
        return JSONResponse(proxy.registry.demand())

    @app.get("/healthz")
    async def healthz() -> PlainTextResponse:
        problem = health()
        return PlainTextResponse(problem or "ok", 503 if problem else 200)

    @app.get("/readyz")
    async def readyz() -> PlainTextResponse:
        problem = health()
        if problem is None and proxy.stopping.is_set():
            problem = "shutting down"
        if problem is None and not proxy.registry.synced:
            problem = "the models are not listed yet"
        return PlainTextResponse(problem or "ok", 503 if problem else 200)

    return app
