"""Tensors of a GGUF file under Hugging Face's names and row orders: dequantized, or as raw blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kubeinfer.weights.readers.gguf_dequant import dequantize
from kubeinfer.weights.readers.gguf_file import GGUFFile, GGUFTensorInfo, read_gguf
from kubeinfer.weights.readers.gguf_hf import ROPE_FREQS, check_architecture, hf_name, permuted_heads


@dataclass(frozen=True)
class RawTensor:
    """A tensor as the file holds it, its rows in Hugging Face's order.

    ``blocks`` is uint8 [rows, bytes of a row]; ``shape`` the shape in elements.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    block_size: int
    blocks: torch.Tensor

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Values in ``dtype``; None leaves stored floats as they are and makes quantized ones float32."""
        return dequantize(self.blocks.reshape(-1), self.type_name, self.shape, self.block_size, dtype)


def iterate_gguf_raw(path: Path, wanted: Callable[[str], bool] | None = None) -> Iterator[RawTensor]:
    """Each tensor of the GGUF file ``path`` (any file of a split set) as raw blocks, in the file's order.

    The blocks lie in a private memory map of the file: read once, they cost no memory until written to.
    """
    file = read_gguf(path)
    check_architecture(file)
    maps: dict[Path, torch.Tensor] = {}
    for info in file.tensors.values():
        if info.name == ROPE_FREQS:
            continue
        name = hf_name(info.name, info.path)
        if wanted is not None and not wanted(name):
            continue
        if info.path not in maps:
            # one map at a time: the pages of a file that has been read through may go
            maps = {info.path: _map(info.path)}
        yield RawTensor(name, info.type_name, info.shape, info.block_size, _rows(maps[info.path], info, file))


def iterate_gguf(
    path: Path,
    wanted: Callable[[str], bool] | None = None,
    dtype: torch.dtype | None = None,
    as_stored: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of each tensor of the GGUF file ``path``: its blocks if ``as_stored``, else dequantized."""
    for raw in iterate_gguf_raw(path, wanted):
        stored = as_stored is not None and as_stored(raw.name)
        yield raw.name, raw.blocks if stored else raw.dequantize(dtype)


def _map(path: Path) -> torch.Tensor:
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def _rows(data: torch.Tensor, info: GGUFTensorInfo, file: GGUFFile) -> torch.Tensor:
    rows = info.shape[0] if len(info.shape) > 1 else 1
    blocks = data[info.offset : info.offset + info.nbytes]
    heads = permuted_heads(info.name, file)
    if heads is None:
        return blocks.view(rows, -1)
    # [heads, pairs, 2] -> [heads, 2, pairs]: whole rows move, so quantized blocks stay whole
    outputs = info.shape[0]
    return blocks.view(heads, outputs // heads // 2, 2, -1).transpose(1, 2).reshape(rows, -1)
