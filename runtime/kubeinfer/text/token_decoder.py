"""From token ids to text, a token at a time.

Two ways. Most tokenizers map a token to bytes whatever stands beside it (byte-level BPE; SentencePiece with byte
fallback): there a token costs a table look-up and the only state is a code point that is not complete yet. For all
other decoders a short window of tokens is decoded again, as their text depends on their neighbours.
"""

from __future__ import annotations

import codecs
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend

_REPLACEMENT = "\ufffd"
_MAX_WINDOW = 64  # tokens that a window may hold back before its text is given out as it stands
_PRIME = 6  # prompt tokens that a window starts with


class DecodeStream(Protocol):
    """The text of one growing sequence. What ``push`` has returned is never taken back."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; it may be empty."""
        ...

    def finish(self) -> str:
        """The text still held back (an incomplete code point becomes U+FFFD)."""
        ...


class TokenDecoder(ABC):
    """Decodes a tokenizer's ids."""

    @abstractmethod
    def stream(
        self, prompt_token_ids: Sequence[int], skip_special_tokens: bool, spaces: bool
    ) -> DecodeStream:
        """A stream for what follows ``prompt_token_ids``."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of a whole sequence."""

    def piece(self, token_id: int) -> str:
        """The text of one token as it stands inside a text (its leading space included)."""
        stream = self.stream([], False, True)
        return stream.push([token_id]) + stream.finish()

    def piece_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one token; they may be part of a code point."""
        return self.piece(token_id).encode()


class _Pieces(dict[int, "str | bytes"]):
    """Text of each token id seen so far; bytes where it is not a whole number of code points."""

    def __init__(self, to_bytes: Callable[[int], bytes], skipped: frozenset[int]):
        super().__init__()
        self._to_bytes = to_bytes
        self._skipped = skipped

    def __missing__(self, token_id: int) -> str | bytes:
        value: str | bytes = b"" if token_id in self._skipped else self._to_bytes(token_id)
        try:
            value = bytes(value).decode("utf-8")  # type: ignore[arg-type]
        except UnicodeDecodeError:
            pass
        self[token_id] = value
        return value


class _ByteStream:
    """Joins the pieces' bytes into code points."""

    __slots__ = ("_pending", "_per_byte", "_pieces", "_strip")

    def __init__(self, pieces: _Pieces, per_byte: bool, pending: bytes, strip: bool):
        self._pieces = pieces
        self._per_byte = per_byte
        self._pending = pending
        self._strip = strip  # the text's first space is the tokenizer's own and is not shown

    def push(self, ids: Sequence[int]) -> str:
        if len(ids) == 1 and not self._pending and not self._strip:
            piece = self._pieces[ids[0]]
            if type(piece) is str:
                return piece
        pieces = self._pieces
        text = "".join([self._add(pieces[token_id]) for token_id in ids])
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        return text

    def _add(self, piece: str | bytes) -> str:
        if type(piece) is str:
            if not piece or not self._pending:
                return piece
            return self._flush() + piece  # a piece that is whole text cannot complete what is pending
        data = self._pending + piece  # type: ignore[operator]
        if self._per_byte:
            text, used = _decode_per_byte(data)
        else:
            text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def _flush(self) -> str:
        data, self._pending = self._pending, b""
        if self._per_byte:
            return _REPLACEMENT * len(data)
        return data.decode("utf-8", "replace")

    def finish(self) -> str:
        return self._flush()


def _decode_per_byte(data: bytes) -> tuple[str, int]:
    """Like an incremental UTF-8 decoder, with one U+FFFD for each byte that is part of no code point."""
    parts: list[str] = []
    at = 0
    while at < len(data):
        try:
            text, used = codecs.utf_8_decode(data[at:], "strict", False)
        except UnicodeDecodeError as exc:
            parts.append(data[at : at + exc.start].decode("utf-8"))
            parts.append(_REPLACEMENT * (exc.end - exc.start))
            at += exc.end
            continue
        parts.append(text)
        at += used
        break
    return "".join(parts), at


class ByteDecoder(TokenDecoder):
    """For tokenizers whose tokens are byte strings. ``per_byte``: an invalid byte run gives one U+FFFD a byte."""

    def __init__(
        self, to_bytes: Callable[[int], bytes], special_ids: frozenset[int], *, per_byte: bool, strip: bool
    ):
        self._to_bytes = to_bytes
        self._all = _Pieces(to_bytes, frozenset())
        self._plain = _Pieces(to_bytes, special_ids)
        self._per_byte = per_byte
        self._strip = strip

    def stream(
        self, prompt_token_ids: Sequence[int], skip_special_tokens: bool, spaces: bool
    ) -> DecodeStream:
        pieces = self._plain if skip_special_tokens else self._all
        strip = self._strip and not any(pieces[token_id] for token_id in reversed(prompt_token_ids))
        pending = b""
        # A prompt of token ids may end inside a code point; a few tokens with text back is far enough to see it.
        shown = (token_id for token_id in reversed(prompt_token_ids) if pieces[token_id])
        last = list(itertools.islice(shown, 8))
        if last and type(pieces[last[0]]) is bytes:
            before = _ByteStream(pieces, self._per_byte, b"", False)
            before.push(last[::-1])
            pending = before._pending
        return _ByteStream(pieces, self._per_byte, pending, strip)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        stream = self.stream([], skip_special_tokens, True)
        return stream.push(ids) + stream.finish()

    def piece(self, token_id: int) -> str:
        piece = self._all[token_id]
        return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")

    def piece_bytes(self, token_id: int) -> bytes:
        piece = self._all[token_id]
        return piece.encode() if isinstance(piece, str) else piece


class _WindowStream:
    """Decodes a window of tokens again for each new one, and gives out what it has grown by."""

    __slots__ = ("_decode", "_ids", "_read", "_shown")

    def __init__(self, decode: Callable[[list[int]], str], prompt_token_ids: Sequence[int]):
        self._decode = decode
        self._ids = list(prompt_token_ids[-_PRIME:])
        self._read = len(self._ids)
        self._shown = decode(self._ids) if self._ids else ""

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in ids])

    def _push_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        held = text.endswith(_REPLACEMENT) and len(self._ids) - self._read < _MAX_WINDOW
        if held or len(text) <= len(self._shown):
            if len(self._ids) > 4 * _MAX_WINDOW:
                self._slide()
            return ""
        new = text[len(self._shown) :]
        self._slide()
        return new

    def _slide(self) -> None:
        # The tokens given out last stay in the window: the text of the next ones may depend on them.
        del self._ids[: self._read]
        self._read = len(self._ids)
        self._shown = self._decode(self._ids)

    def finish(self) -> str:
        text = self._decode(self._ids)
        new = text[len(self._shown) :]
        self._shown = text
        return new


class WindowDecoder(TokenDecoder):
    """For every other tokenizer; ``decode_ids(ids, skip_special_tokens)`` is its own decoder."""

    def __init__(self, decode_ids: Callable[[list[int], bool], str], special_ids: frozenset[int]):
        self._decode_ids = decode_ids
        self._special_ids = special_ids
        self._cache: dict[int, str] = {}

    def stream(
        self, prompt_token_ids: Sequence[int], skip_special_tokens: bool, spaces: bool
    ) -> DecodeStream:
        def decode(ids: list[int]) -> str:
            return self._decode_ids(ids, skip_special_tokens)

        def decode_tight(ids: list[int]) -> str:
            # No space between two special tokens that follow each other.
            parts: list[str] = []
            start = 0
            for at in range(1, len(ids) + 1):
                if at == len(ids) or (ids[at] in self._special_ids and ids[at - 1] in self._special_ids):
                    parts.append(self._decode_ids(ids[start:at], False))
                    start = at
            return "".join(parts)

        return _WindowStream(decode if spaces or skip_special_tokens else decode_tight, prompt_token_ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._decode_ids(list(ids), skip_special_tokens)

    def piece(self, token_id: int) -> str:
        text = self._cache.get(token_id)
        if text is None:
            text = self._cache[token_id] = self._decode_ids([token_id], False)
        return text


def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, the other way round."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(256 + index): byte for index, byte in enumerate(rest)})
    return table


def decoder_for(backend: Backend) -> TokenDecoder:
    """The decoder that fits ``backend``'s own."""
    special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
    steps = _decoder_steps(backend)
    kinds = [step["type"] for step in steps]
    id_to_token = backend.id_to_token
    if kinds == ["ByteLevel"]:
        table = _byte_level_table()

        def byte_level(token_id: int) -> bytes:
            token = id_to_token(token_id)
            if token is None:
                return b""
            try:
                return bytes([table[char] for char in token])
            except KeyError:
                return token.encode("utf-8")

        return ByteDecoder(byte_level, special, per_byte=False, strip=False)
    if _is_byte_fallback(steps):
        pattern = steps[0]["pattern"]["String"]
        content = steps[0]["content"]

        def byte_fallback(token_id: int) -> bytes:
            token = id_to_token(token_id)
            if token is None:
                return b""
            token = token.replace(pattern, content)
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                try:
                    return bytes([int(token[3:5], 16)])
                except ValueError:
                    pass
            return token.encode("utf-8")

        return ByteDecoder(byte_fallback, special, per_byte=True, strip="Strip" in kinds)

    def decode(ids: list[int], skip_special_tokens: bool) -> str:
        return backend.decode(ids, skip_special_tokens=skip_special_tokens)

    return WindowDecoder(decode, special)


def _decoder_steps(backend: Backend) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _is_byte_fallback(steps: list[dict[str, Any]]) -> bool:
    kinds = [step["type"] for step in steps]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return False
    if kinds[3:] and (steps[3].get("content"), steps[3].get("start"), steps[3].get("stop")) != (" ", 1, 0):
        return False
    pattern = steps[0].get("pattern")
    return isinstance(pattern, dict) and "String" in pattern
