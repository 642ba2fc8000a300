"""The gate in front of every route: request ids, API keys, and counting what is in flight."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kubeinfer.api.errors import ApiError, as_api_error, log_failure
from kubeinfer.api.responses import error_response
from kubeinfer.api.state import ServerState

_logger = logging.getLogger("kubeinfer.api")

# Probes, scrapers and the page itself carry no key; the page asks its reader for one.
_OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics", "/"})
GENERATING_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/generate"})
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")  # it is written into logs and headers


class Gate:
    """Wraps the application (ASGI). Whatever an inner layer raises becomes an answer in OpenAI's shape."""

    def __init__(self, app: ASGIApp, state: ServerState):
        self.app = app
        self.state = state
        root_path = (state.options.root_path or "").strip("/")
        self.root_path = "/" + root_path if root_path else ""
        self.keys = [key.encode() for key in state.options.api_key or []]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = self._request_id(scope)
        scope["kubeinfer.request_id"] = request_id
        scope["kubeinfer.send"] = send
        header = (b"x-request-id", request_id.encode())
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if not started and message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        path: str = scope["path"]
        if self.root_path:
            # The proxy in front may or may not have taken the prefix off.
            path = path.removeprefix(self.root_path) if path.startswith(self.root_path + "/") else path
            scope["root_path"] = self.root_path
            scope["path"] = self.root_path + path
        generating = path in GENERATING_PATHS
        state = self.state
        try:
            self._check_key(scope, path)
            if not generating:
                await self.app(scope, receive, send_with_id)
                return
            self._admit()
            state.in_flight += 1
            try:
                await self.app(scope, receive, send_with_id)
            finally:
                state.in_flight -= 1
        except asyncio.CancelledError:
            # The server ends before this request did: the client is told why, not with uvicorn's bare 500.
            if not started:
                gone = state.refusal() or ApiError(503, "The server is shutting down.", code="shutting_down")
                await error_response(gone)(scope, receive, send_with_id)
            raise
        except Exception as exc:
            error = as_api_error(exc)
            if error.status == 500:
                log_failure(_logger, f"Request {request_id}", exc)
            if started:
                return  # uvicorn closes the connection of an answer that is not complete
            await error_response(error)(scope, receive, send_with_id)

    def _admit(self) -> None:
        refusal = self.state.refusal()
        if refusal is not None:
            raise refusal
        limit = self.state.options.max_waiting_requests
        if self.state.in_flight >= limit:
            raise ApiError(
                429,
                f"{limit} requests are in flight already (--max-waiting-requests); try again.",
                code="queue_full",
                headers={"retry-after": "1"},
            )

    def _request_id(self, scope: Scope) -> str:
        for name, value in scope["headers"]:
            if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
                return str(value.decode("ascii"))
        return uuid.uuid4().hex

    def _check_key(self, scope: Scope, path: str) -> None:
        if not self.keys or path in _OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                kind, _, given = value.partition(b" ")
                if kind.lower() != b"bearer":
                    given = b""
        given = given.strip()
        # all keys are compared, so that time does not tell which one was near
        matches = [hmac.compare_digest(given, key) for key in self.keys]
        if True not in matches:
            what = "is not one of this server's" if given else "is missing"
            raise ApiError(
                401,
                f"The API key {what}; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
