"""Errors as OpenAI's API shapes them."""

from __future__ import annotations

import json
from collections.abc import Iterable

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
}
_NAMES_SHOWN = 20


class GatewayError(Exception):
    """An answer that the gateway gives itself, in place of a runtime.

    `retry_after` is in seconds and becomes the `Retry-After` header (rounded up, at least 1).
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.close = close

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def retry_after_seconds(self) -> int | None:
        if self.retry_after is None:
            return None
        return max(1, int(-(-self.retry_after // 1)))

    def body(self) -> bytes:
        """The JSON body: {"error": {"message", "type", "param", "code"}}."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json")]
        if self.retry_after_seconds is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after_seconds))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.close:
            headers.append((b"connection", b"close"))
        return headers

    def event(self) -> bytes:
        """The same error as one server-sent event, for a stream that has already started with status 200."""
        error: dict[str, object] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
            "status": self.status,
        }
        if self.retry_after_seconds is not None:
            error["retry_after"] = self.retry_after_seconds
        return b"data: " + json.dumps({"error": error}, ensure_ascii=False).encode() + b"\n\n"


def model_not_found(name: str, existing: Iterable[str]) -> GatewayError:
    names = sorted(existing)
    if not names:
        there = "This gateway serves no model yet."
    elif len(names) <= _NAMES_SHOWN:
        there = "Models here: " + ", ".join(names) + "."
    else:
        there = (
            "Models here: "
            + ", ".join(names[:_NAMES_SHOWN])
            + f" and {len(names) - _NAMES_SHOWN} more (see /v1/models)."
        )
    return GatewayError(
        404, f"The model '{name[:200]}' does not exist. {there}", code="model_not_found", param="model"
    )
