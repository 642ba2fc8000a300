"""The key-value metadata of a GGUF file, read without touching its tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package reads the same but builds a
NumPy view for every string, which takes seconds for a vocabulary; a server must be up in less.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from kubeinfer.errors import ModelLoadError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9


class _Cursor:
    """Reads little-endian values from ``data`` (big-endian where the file's version says so)."""

    def __init__(self, data: mmap.mmap, order: str):
        self.data = data
        self.at = 0
        self.order = order
        self._u64 = struct.Struct(order + "Q")

    def scalar(self, kind: int) -> Any:
        layout = struct.Struct(self.order + _SCALARS[kind])
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def string(self) -> str:
        (size,) = self._u64.unpack_from(self.data, self.at)
        start = self.at + 8
        self.at = start + size
        if self.at > len(self.data):
            raise struct.error("string past the end")
        # Vocabularies are known to hold pieces that are no valid UTF-8 (split code points).
        return self.data[start : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item = self.scalar(4)
            count = self.scalar(10)
            if item in _SCALARS:
                layout = struct.Struct(f"{self.order}{count}{_SCALARS[item]}")
                values = list(layout.unpack_from(self.data, self.at))
                self.at += layout.size
                return values
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise struct.error(f"unknown value type {kind}")
        return self.scalar(kind)


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """All keys of the file's header. Raises :class:`ModelLoadError` for a file that is damaged or no GGUF."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                pointer = data[:40].startswith(b"version https://git-lfs")
                hint = "it is a git-lfs pointer: run `git lfs pull`" if pointer else "download it again"
                raise ModelLoadError(f"{path} is not a GGUF file; {hint}.")
            cursor = _Cursor(data, "<")
            cursor.at = 4
            version = cursor.scalar(4)
            if version & 0xFFFF == 0:
                cursor = _Cursor(data, ">")
                cursor.at = 4
                version = cursor.scalar(4)
            if version not in (2, 3):
                raise ModelLoadError(f"{path} is GGUF version {version}; versions 2 and 3 are supported.")
            cursor.scalar(10)  # number of tensors
            count = cursor.scalar(10)
            metadata: dict[str, Any] = {}
            for _ in range(count):
                key = cursor.string()
                metadata[key] = cursor.value(cursor.scalar(4))
            return metadata
    except (struct.error, MemoryError, OverflowError) as exc:
        raise ModelLoadError(f"{path}: the GGUF header is damaged ({exc}); download it again.") from None
    except ValueError:
        raise ModelLoadError(f"{path} is empty; download it again.") from None
    except OSError as exc:
        raise ModelLoadError(f"{path} cannot be read: {exc.strerror}.") from None
