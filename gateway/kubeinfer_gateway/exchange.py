"""One request: what is known of it, and which requests belong to the models at all."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from typing import Any

from kubeinfer_gateway.connection import ClientStream
from kubeinfer_gateway.keys import ApiKey
from kubeinfer_gateway.registry import Endpoint, Model
from kubeinfer_gateway.upstream import UpstreamConnection
from kubeinfer_gateway.usage import Usage

CLIENT_LEFT = 499
_PATH = re.compile(r"/[A-Za-z0-9_\-./:@]*\Z")
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}\Z")
# Routes of a runtime that are for its owner, not for the users of its models.
_PRIVATE = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_ROUTES = frozenset(
    (
        "/tokenize",
        "/detokenize",
        "/score",
        "/rerank",
        "/v2/rerank",
        "/pooling",
        "/classify",
        "/v2/embed",
        "/generate",
    )
)


def is_proxied(path: str) -> bool:
    """Whether a path belongs to the models rather than to the gateway."""
    if path in _ROUTES:
        return True
    return (
        path.startswith("/v1/")
        and path != "/v1/models"
        and not path.startswith(("/v1/models/", *_PRIVATE))
        and ".." not in path
        and _PATH.match(path) is not None
    )


class Exchange:
    """One request and what became of it."""

    __slots__ = (
        "body",
        "bytes_in",
        "bytes_out",
        "client",
        "connection",
        "endpoint",
        "error",
        "first_byte",
        "key",
        "model",
        "model_name",
        "pauses",
        "queue_time",
        "request_id",
        "reserved",
        "retries",
        "scope",
        "seen",
        "seen_at",
        "sse",
        "start",
        "status",
        "stream",
        "task",
        "usage",
    )

    def __init__(self, scope: Any, client: ClientStream, task: asyncio.Task[Any]) -> None:
        self.scope = scope
        self.client = client
        self.task = task
        self.start = time.monotonic()
        self.request_id = request_id(scope["headers"])
        self.body: bytes | None = b""
        self.bytes_in = 0
        self.bytes_out = 0
        self.model: Model | None = None
        self.model_name: str | None = None
        self.stream = False
        self.key: ApiKey | None = None
        self.endpoint: Endpoint | None = None
        self.connection: UpstreamConnection | None = None
        self.sse = False
        self.status = 0
        self.error: str | None = None
        self.reserved = 0  # tokens taken from the key's limit in advance
        self.retries = 0
        self.pauses = 0
        self.queue_time = 0.0
        self.first_byte: float | None = None
        self.usage: Usage | None = None
        self.seen = -1
        self.seen_at = self.start

    @property
    def prompt_estimate(self) -> int:
        """Tokens of the prompt, about: four bytes each."""
        return self.bytes_in // 4

    def client_lost(self) -> None:
        """The client left: the runtime is told at once, then the request's task ends."""
        if self.connection is not None:
            self.connection.abort()
        self.task.cancel()

    def record(self, duration: float) -> dict[str, Any]:
        """The line of the access log; `duration` is in seconds."""
        scope = self.scope
        record: dict[str, Any] = {
            "time": round(time.time(), 3),
            "request_id": self.request_id,
            "method": scope["method"],
            "path": scope["path"][:256],
            "status": self.status,
            "model": self.model_name[:200] if self.model_name else None,
            "endpoint": self.endpoint.spec.address if self.endpoint else None,
            "key": self.key.name if self.key else None,
            "client": scope["client"][0] if scope["client"] else None,
            "stream": self.stream,
            "duration_ms": round(duration * 1e3, 2),
            "first_byte_ms": round(self.first_byte * 1e3, 2) if self.first_byte is not None else None,
            "queue_ms": round(self.queue_time * 1e3, 2),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "retries": self.retries,
        }
        if self.usage is not None:
            record["prompt_tokens"] = self.usage.prompt
            record["completion_tokens"] = self.usage.completion
            record["tokens_exact"] = self.usage.exact
        if self.error is not None:
            record["error"] = self.error
        return record


def request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's x-request-id where it can be used, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.match(value):
            return value.decode("ascii")
    return uuid.uuid4().hex


def session(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The routing key of a session that the client named, or empty."""
    for name, value in headers:
        if name == b"x-session-id" and value:
            return b"session:" + value
    return b""
