"""Errors in the shape OpenAI's clients expect: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging

import msgspec

from kubeinfer.errors import (
    ContextLengthError,
    EngineDeadError,
    KubeinferError,
    NotSupportedError,
    QueueFullError,
    RequestError,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer other than 200. ``param`` names the request's field; ``headers`` go out with the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | int | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> bytes:
        """The JSON body."""
        return msgspec.json.encode({"error": self.detail})

    @property
    def detail(self) -> dict[str, object]:
        """What stands under ``error``."""
        return {
            "message": self.message,
            "type": _TYPES.get(self.status, "internal_error"),
            "param": self.param,
            "code": self.code if self.code is not None else self.status,
        }


def log_failure(logger: logging.Logger, what: str, exc: BaseException) -> None:
    """One line of a failure that was raised on purpose, and whose message says all; the trace of another."""
    logger.error("%s: %s", what, exc, exc_info=None if isinstance(exc, KubeinferError) else exc)


def as_api_error(exc: BaseException) -> ApiError:
    """The answer to give for ``exc``, whatever it is."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, NotSupportedError):
        return ApiError(400, str(exc), param=exc.param, code="not_supported")
    if isinstance(exc, ContextLengthError):
        return ApiError(400, str(exc), param=exc.param, code="context_length_exceeded")
    if isinstance(exc, RequestError):
        return ApiError(400, str(exc), param=exc.param, code="invalid_value" if exc.param else None)
    if isinstance(exc, QueueFullError):
        return ApiError(429, str(exc), code="queue_full", headers={"retry-after": str(exc.retry_after)})
    if isinstance(exc, EngineDeadError):
        return ApiError(
            503, f"The engine has stopped: {exc}", code="engine_dead", headers={"retry-after": "10"}
        )
    if isinstance(exc, KubeinferError):
        return ApiError(500, str(exc), code="internal_error")
    return ApiError(500, f"Internal error: {type(exc).__name__}: {exc}", code="internal_error")
