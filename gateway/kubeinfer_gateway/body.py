"""What the gateway reads of a request's body: the model's name, whether it streams, and the prompt's beginning.

The body itself goes to the runtime unchanged, byte for byte.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from kubeinfer_gateway.errors import GatewayError

# json.loads builds every object of the body, so the fallback is kept to bodies it reads in a few milliseconds.
_FALLBACK_LIMIT = 1 << 20
_EMPTY = msgspec.Raw(b"")


class _Peek(msgspec.Struct):
    model: msgspec.Raw = _EMPTY
    stream: msgspec.Raw = _EMPTY
    messages: msgspec.Raw = _EMPTY
    prompt: msgspec.Raw = _EMPTY
    input: msgspec.Raw = _EMPTY
    query: msgspec.Raw = _EMPTY
    text_1: msgspec.Raw = _EMPTY


class _Message(msgspec.Struct):
    role: msgspec.Raw = _EMPTY
    content: msgspec.Raw = _EMPTY


_peek = msgspec.json.Decoder(_Peek)
_messages = msgspec.json.Decoder(list[_Message])
_string = msgspec.json.Decoder(str)


class RequestBody:
    """`model`: the name asked for, or None where the body has none; `stream`: whether server-sent events are wanted."""

    __slots__ = ("_fields", "model", "stream")

    def __init__(self, model: str | None, stream: bool, fields: _Peek) -> None:
        self.model = model
        self.stream = stream
        self._fields = fields

    def prefix(self, length: int) -> bytes:
        """The first `length` bytes of what the model is asked, as JSON text; empty where there is none.

        Of chat messages, all up to and including the first from the user count and the later ones do not: the
        turns of one conversation have the same prefix, so they go where its KV blocks are.
        """
        fields = self._fields
        if fields.messages:
            return _messages_prefix(fields.messages, length)
        for raw in (fields.prompt, fields.input, fields.query, fields.text_1):
            if raw:
                return bytes(memoryview(raw)[:length])
        return b""


def _messages_prefix(raw: msgspec.Raw, length: int) -> bytes:
    try:
        messages = _messages.decode(raw)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return bytes(memoryview(raw)[:length])
    prefix = bytearray()
    for message in messages:
        prefix += memoryview(message.role)[:64]
        prefix += memoryview(message.content)[:length]
        prefix += b"\0"
        if len(prefix) >= length or bytes(memoryview(message.role)[:8]) == b'"user"':
            break
    return bytes(prefix[:length])


def read_body(body: bytes | bytearray) -> RequestBody:
    """Reads a JSON request body. Raises GatewayError (400) where it is no JSON object or `model` is no string."""
    try:
        fields = _peek.decode(body)
        model = _string.decode(fields.model) if fields.model else None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        return _read_slowly(body, error)
    return RequestBody(model, bytes(memoryview(fields.stream)[:5]).strip() == b"true", fields)


def _read_slowly(body: bytes | bytearray, error: Exception) -> RequestBody:
    """What msgspec refuses and Python's json takes (NaN, lone surrogates) is accepted, and mistakes get their message."""
    invalid = GatewayError(400, f"The request body is not a JSON object: {error}", code="invalid_json")
    if len(body) > _FALLBACK_LIMIT:
        raise invalid
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise invalid from None
    if not isinstance(value, dict):
        raise GatewayError(400, "The request body must be a JSON object.", code="invalid_json")
    model = value.get("model")
    if "model" in value and not isinstance(model, str):
        raise GatewayError(400, "'model' must be a string.", param="model", code="invalid_type")

    def raw(name: str) -> msgspec.Raw:
        return msgspec.Raw(json.dumps(value[name]).encode()) if name in value else _EMPTY

    fields = _Peek(
        messages=raw("messages"),
        prompt=raw("prompt"),
        input=raw("input"),
        query=raw("query"),
        text_1=raw("text_1"),
    )
    return RequestBody(model, value.get("stream") is True, fields)
