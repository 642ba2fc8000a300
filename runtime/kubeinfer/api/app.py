"""The application: routers, error answers, CORS."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kubeinfer import __version__
from kubeinfer.api import chat, completions, health, legacy, models, page, tokenization, unsupported
from kubeinfer.api.errors import ApiError, as_api_error
from kubeinfer.api.middleware import Gate
from kubeinfer.api.responses import error_response
from kubeinfer.api.state import ServerState
from kubeinfer.errors import KubeinferError

Endpoint = Callable[[Request], Awaitable[Response]]


class Shortcut:
    """Calls the endpoints that generate straight away (ASGI), all others through the framework ``app``.

    They read their bodies themselves and leave their errors to :class:`Gate`, so the framework's middlewares, routing and
    dependencies would only make the first token wait.
    """

    def __init__(self, app: FastAPI, endpoints: Mapping[str, Endpoint]):
        self.app = app
        self.endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self.endpoints.get(scope["path"].removeprefix(scope["root_path"]))
        if endpoint is None:
            await self.app(scope, receive, send)
            return
        scope["app"] = self.app
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


async def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    what = f"{request.method} {request.url.path}"
    headers = dict(exc.headers or {})
    if exc.status_code == 404:
        error = ApiError(404, f"There is no {what} here.", code="not_found", headers=headers)
    elif exc.status_code == 405:
        allowed = headers.get("Allow", headers.get("allow", ""))
        error = ApiError(
            405,
            f"{what} is not allowed; use {allowed or 'another method'}.",
            code="method_not_allowed",
            headers=headers,
        )
    else:
        error = ApiError(exc.status_code, str(exc.detail), headers=headers)
    return error_response(error)


async def _own_error(request: Request, exc: Exception) -> Response:
    return error_response(as_api_error(exc))


def build_app(state: ServerState, *, legacy_only: bool = False) -> ASGIApp:
    """The ASGI application over ``state``. ``legacy_only`` leaves just ``/generate`` and the probes."""
    options = state.options
    app = FastAPI(
        title="kubeinfer",
        version=__version__,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        exception_handlers={
            HTTPException: _http_error,
            ApiError: _own_error,
            KubeinferError: _own_error,
            Exception: _own_error,
        },
    )
    app.state.server = state
    routers = [health.router, legacy.router]
    shortcuts: dict[str, Endpoint] = {"/generate": legacy.generate}
    if not legacy_only:
        routers += [completions.router, chat.router, models.router, tokenization.router, unsupported.router]
        shortcuts["/v1/completions"] = completions.create_completion
        shortcuts["/v1/chat/completions"] = chat.create_chat_completion
        if not options.disable_chat_page:
            routers.append(page.router)
    for router in routers:
        app.include_router(router)
    gate = Gate(Shortcut(app, shortcuts), state)
    return CORSMiddleware(
        gate,
        allow_origins=options.allowed_origins,
        allow_methods=options.allowed_methods,
        allow_headers=options.allowed_headers,
        allow_credentials=options.allow_credentials,
        expose_headers=["x-request-id", "retry-after"],
    )
