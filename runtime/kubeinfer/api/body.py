"""Reading and decoding request bodies, bounded in size, with errors that name the field."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from kubeinfer.api.errors import ApiError

T = TypeVar("T", bound=msgspec.Struct)

# How long the rest of an over-long body is read and thrown away, so that the client gets to read its 413.
_DISCARD_SECONDS = 10.0

_MESSAGE = re.compile(r"^(?P<what>.*?)(?: - at (?P<where>.*))?$", re.DOTALL)
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")
_NAMES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body. Raises 413 past ``limit`` bytes; no more than that is ever held."""
    too_long = ApiError(
        413,
        f"The request's body is longer than {limit} bytes (--max-request-bytes).",
        code="request_too_large",
        headers={"connection": "close"},
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit and "expect" in request.headers:
        raise too_long  # the client waits for our word before it sends
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                chunks.clear()
                await _discard(request)
                raise too_long
            chunks.append(chunk)
    except ClientDisconnect:
        raise ApiError(400, "The client left before its request was complete.", code="client_gone") from None
    return b"".join(chunks)


async def _discard(request: Request) -> None:
    async def drain() -> None:
        while True:
            message = await request.receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                return

    try:
        await asyncio.wait_for(drain(), _DISCARD_SECONDS)
    except TimeoutError:
        pass


def decode_body(body: bytes, cls: type[T]) -> T:
    """``body`` as a ``cls``. Raises 400: broken JSON, or the field that is unknown, missing or of a wrong type."""
    try:
        return msgspec.json.decode(body, type=cls)
    except msgspec.ValidationError as exc:
        return _decode_leniently(body, cls, exc)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ApiError(400, f"The request's body is not valid JSON: {exc}.", code="invalid_json") from None


def _decode_leniently(body: bytes, cls: type[T], error: msgspec.ValidationError) -> T:
    """As JSON knows one kind of number only, 16.0 is taken where an integer is due."""
    if "`int" not in str(error) or "`float`" not in str(error):
        raise _field_error(error, cls) from None
    value = _whole_floats_as_ints(msgspec.json.decode(body))
    try:
        return msgspec.convert(value, cls, str_keys=True)
    except msgspec.ValidationError as exc:
        raise _field_error(exc, cls) from None


def _whole_floats_as_ints(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole_floats_as_ints(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_floats_as_ints(item) for item in value]
    return value


def _field_error(error: msgspec.ValidationError, cls: type[msgspec.Struct]) -> ApiError:
    match = _MESSAGE.match(str(error))
    what = match["what"] if match else str(error)
    where = (match["where"] or "") if match else ""
    path = re.sub(r"^.*?\$\.?", "", where.replace("`", "").replace("[...]", ""))
    unknown = _UNKNOWN.search(what)
    if unknown:
        name = f"{path}.{unknown[1]}" if path else unknown[1]
        return ApiError(
            400, f"Unknown field: {name}. It would have no effect.", param=name, code="unknown_field"
        )
    missing = _MISSING.search(what)
    if missing:
        name = f"{path}.{missing[1]}" if path else missing[1]
        return ApiError(400, f"{name} is required.", param=name, code="missing_field")
    expected = re.match(r"Expected `([^`]*)`, got `([^`]*)`", what)
    if expected:
        kinds = [_NAMES.get(kind.strip(), kind.strip()) for kind in expected[1].split("|")]
        got = _NAMES.get(expected[2], expected[2])
        what = f"must be {' or '.join(kinds)}, got {got}"
        if "key" in where.split(" in ")[0]:
            what = f"has a key that {what}"
    if not path:
        return ApiError(400, f"The request's body {what}.", code="invalid_type")
    return ApiError(400, f"{path} {what}.", param=path, code="invalid_type")
