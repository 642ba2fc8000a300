"""A GGUF file's header: metadata and tensor table, read straight from the file's bytes (no torch, no numpy).

The format is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. Reading SmolLM2's header (49,152 tokens and
48,900 merges) takes tens of milliseconds; the ``gguf`` package's reader, which keeps every field as an array, takes seconds.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from kubeinfer.errors import ModelLoadError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# value type -> struct code of one value
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DEFAULT_ALIGNMENT = 32
_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")

# ggml type id -> (name, elements in a block, bytes of a block)
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True)
class GGUFTensorInfo:
    """One tensor of the table. ``shape`` is in torch's order (rows first); ``offset`` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    block_size: int
    """Elements in a block of the quantized format (1 where it is not quantized)."""
    block_bytes: int
    offset: int
    path: Path

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.block_size * self.block_bytes


@dataclass
class GGUFFile:
    """Metadata and tensor table of one file, or of a split set (given any of its files)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensorInfo]
    files: list[Path] = field(default_factory=list)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata entry ``key``, where ``{arch}`` stands for the architecture."""
        return self.metadata.get(key.replace("{arch}", self.architecture), default)


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of the GGUF file ``path``, and of its siblings when it is one of a split set.

    Raises :class:`ModelLoadError` where a file is missing, truncated or not GGUF.
    """
    files = split_files(path)
    merged = _read_header(files[0])
    merged.files = files
    expected = merged.metadata.get("split.tensors.count")
    for file in files[1:]:
        merged.tensors |= _read_header(file).tensors
    if len(files) > 1 and expected is not None and len(merged.tensors) != expected:
        raise ModelLoadError(
            f"The {len(files)} parts of {files[0]} hold {len(merged.tensors)} tensors where the first announces "
            f"{expected}: they are not of one model. Download all of them again."
        )
    return merged


def split_files(path: Path) -> list[Path]:
    """The files of the split set that ``path`` belongs to, in order; ``[path]`` for a file on its own."""
    match = _SPLIT_NAME.match(path.name)
    if match is None:
        if not path.is_file():
            raise ModelLoadError(f"There is no GGUF file {path}.")
        return [path]
    count = int(match["count"])
    files = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf")
        for number in range(1, count + 1)
    ]
    for file in files:
        if not file.is_file():
            raise ModelLoadError(
                f"{file} is missing: {path.name} is one of {count} parts, and all are needed."
            )
    return files


class _Cursor:
    """Reads little-endian values one after another; any read past the end is a truncated file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}")
        values = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return values

    def strings(self, count: int) -> list[str]:
        data, at, end = self.data, self.at, len(self.data)
        length_of = struct.Struct("<Q").unpack_from
        out = []
        for _ in range(count):
            (length,) = length_of(data, at)
            at += 8
            if at + length > end:
                raise struct.error("string past the end")
            out.append(data[at : at + length].decode("utf-8", "replace"))
            at += length
        self.at = at
        return out

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.strings(1)[0]
        if kind == _ARRAY:
            inner, count = self.scalars("I", 1)[0], self.scalars("Q", 1)[0]
            if count > len(self.data):
                raise struct.error("array past the end")
            if inner == _STRING:
                return self.strings(count)
            if inner == _ARRAY:
                return [self.value(_ARRAY) for _ in range(count)]
            return list(self.scalars(_SCALARS[inner], count))
        return self.scalars(_SCALARS[kind], 1)[0]


def _read_header(path: Path) -> GGUFFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise ModelLoadError(
                f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` there, or download it again."
            )
        if head[:4] != _MAGIC:
            raise ModelLoadError(f"{path} is not a GGUF file (it does not begin with the letters GGUF).")
        if len(head) < 24:
            raise ModelLoadError(f"{path} is truncated ({size} bytes): download it again.")
        version, count, entries = struct.unpack_from("<IQQ", head, 4)
        if version not in (2, 3):
            what = "big-endian" if version >= 1 << 16 else f"of version {version}"
            raise ModelLoadError(
                f"{path} is a GGUF file {what}; versions 2 and 3, little-endian, can be read."
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            cursor.at = 24
            try:
                metadata = {
                    cursor.strings(1)[0]: cursor.value(cursor.scalars("I", 1)[0]) for _ in range(entries)
                }
                table = [_table_row(cursor) for _ in range(count)]
            except struct.error:
                raise ModelLoadError(
                    f"{path} is truncated: its header runs past its end ({size} bytes). Download it again."
                ) from None
            except KeyError as exc:
                raise ModelLoadError(
                    f"{path} is damaged: metadata of unknown type {exc}. Download it again."
                ) from None
    alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, dims, type_id, offset in table:
        type_name, block_size, block_bytes = _type(type_id, name, path)
        info = GGUFTensorInfo(
            name, tuple(reversed(dims)), type_id, type_name, block_size, block_bytes, start + offset, path
        )
        if info.offset + info.nbytes > size:
            raise ModelLoadError(
                f"{path} is truncated: tensor {name} ends at byte {info.offset + info.nbytes}, the file at {size}. "
                "Download it again."
            )
        tensors[name] = info
    return GGUFFile(path, metadata, tensors, [path])


def _table_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.strings(1)[0]
    dims = cursor.scalars("Q", cursor.scalars("I", 1)[0])
    return name, dims, cursor.scalars("I", 1)[0], cursor.scalars("Q", 1)[0]


def _type(type_id: int, tensor: str, path: Path) -> tuple[str, int, int]:
    if type_id in _TYPES:
        return _TYPES[type_id]
    # Rare types: their sizes are the gguf package's to know.
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(type_id)
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise ModelLoadError(
            f"{path}: tensor {tensor} has type {type_id}, which the installed gguf package does not know. "
            "Upgrade gguf, or take a file quantized otherwise (Q4_K_M, Q8_0, F16)."
        ) from None
    return kind.name, block_size, block_bytes
