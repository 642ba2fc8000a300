"""The part of HTTP/1.1 (RFC 9112) that a proxy needs of a response: its head, and where its body ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_HEAD = 64 * 1024
_MAX_CHUNK_LINE = 1024
# RFC 9110, section 7.6.1, and what a proxy must not hand on.
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)


def named_by_connection(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Headers that Connection names: they are for the next hop only, too (RFC 9110, 7.6.1)."""
    words = (word for name, value in headers if name == b"connection" for word in value.split(b","))
    return frozenset(word.strip().lower() for word in words)


class ProtocolError(Exception):
    """The peer did not speak HTTP/1.1."""


@dataclass(slots=True)
class ResponseHead:
    """`length` is the body's length in bytes where it is known; else `chunked`, or the body ends with the connection."""

    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    length: int | None
    chunked: bool
    keep_alive: bool

    def get(self, name: bytes) -> bytes | None:
        for key, value in self.headers:
            if key == name:
                return value
        return None


def parse_head(data: bytes, method: str = "POST") -> ResponseHead:
    """Parses a response's head, without the empty line that ends it; header names come back in lower case."""
    lines = data.split(b"\r\n")
    version, _, rest = lines[0].partition(b" ")
    code, _, reason = rest.partition(b" ")
    if not version.startswith(b"HTTP/1.") or len(code) != 3 or not code.isdigit():
        raise ProtocolError(f"not an HTTP/1.1 status line: {lines[0][:80]!r}")
    status = int(code)
    headers: list[tuple[bytes, bytes]] = []
    length: int | None = None
    chunked = False
    keep_alive = version != b"HTTP/1.0"
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        name = name.lower()
        value = value.strip(b" \t")
        if not colon or not name or name != name.strip() or b"\n" in value or b"\r" in value:
            raise ProtocolError(f"bad header line: {line[:80]!r}")
        if name == b"content-length":
            if not value.isdigit() or (length is not None and length != int(value)):
                raise ProtocolError(f"bad content-length: {value[:80]!r}")
            length = int(value)
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked":
                raise ProtocolError(f"transfer-encoding not understood: {value[:80]!r}")
            chunked = True
        elif name == b"connection":
            tokens = [token.strip() for token in value.lower().split(b",")]
            if b"close" in tokens:
                keep_alive = False
            elif b"keep-alive" in tokens:
                keep_alive = True
        headers.append((name, value))
    if chunked:
        length = None  # RFC 9112, section 6.3: transfer-encoding wins
    if method == "HEAD" or status in (204, 304) or status < 200:
        length, chunked = 0, False
    return ResponseHead(status, reason, headers, length, chunked, keep_alive)


class ChunkedBody:
    """Finds the end of a chunked body, and optionally what it holds, without copying it.

    `payload`, where a list was given, collects the decoded pieces; `at_boundary` tells that a further chunk could be
    put in here by us without breaking the framing.
    """

    __slots__ = ("_need", "_partial", "_trailers", "complete", "payload")

    def __init__(self, payload: list[bytes] | None = None) -> None:
        self._need = 0  # bytes left of the current chunk with the line break behind it
        self._partial = b""
        self._trailers = False
        self.complete = False
        self.payload = payload

    @property
    def at_boundary(self) -> bool:
        return not self._need and not self._partial and not self._trailers and not self.complete

    def feed(self, data: bytes) -> int | None:
        """Returns the index in `data` just behind the body's end, or None while it goes on."""
        size = len(data)
        need = self._need
        payload = self.payload
        if size < need:
            if payload is not None and need > 2:
                payload.append(data[: need - 2])
            self._need = need - size
            return None
        if payload is not None and need > 2:
            payload.append(data[: need - 2])
        position = need
        kept = 0
        if self._partial:
            kept = len(self._partial)
            data = self._partial + data
            size += kept
            self._partial = b""
        while position < size:
            end = data.find(b"\r\n", position)
            if end < 0:
                self._partial = data[position:]
                self._need = 0
                if len(self._partial) > _MAX_CHUNK_LINE:
                    raise ProtocolError("chunk line too long")
                return None
            if self._trailers:
                if end == position:
                    self.complete = True
                    self._need = 0
                    return end + 2 - kept
                position = end + 2
                if position >= size:
                    break
                continue
            line = data[position:end]
            digits = line.split(b";", 1)[0].strip(b" \t") if b";" in line else line
            if not digits.isalnum() or b"x" in digits or b"X" in digits:
                raise ProtocolError(f"bad chunk size: {line[:80]!r}")
            try:
                length = int(digits, 16)
            except ValueError:
                raise ProtocolError(f"bad chunk size: {line[:80]!r}") from None
            start = end + 2
            if length == 0:
                self._trailers = True
                position = start
                if position >= size:
                    break
                continue
            if payload is not None:
                piece = data[start : start + length]
                if piece:
                    payload.append(piece)
            position = start + length + 2
            if position > size:
                self._need = position - size
                return None
        self._need = 0
        return None


def encode_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
