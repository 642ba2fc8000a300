"""GGUF's blocks on a GPU: unpacked at load into integers with a scale and a minimum a group, and multiplied from these."""

from __future__ import annotations

import torch
from torch import Tensor

from kubeinfer.kernels.int4 import Int4Weight, pack_with_minimums
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.layers.quantization.base import LinearMethod, LoadingWeight, Part, Shard, say_once
from kubeinfer.layers.quantization.dense import DenseWeight
from kubeinfer.layers.quantization.grouped_int import Int4Method
from kubeinfer.quantization import GGUFConfig, GGUFType
from kubeinfer.weights.readers.gguf_dequant import unpack

# Any value gives finite weights; this one, numbers of some 0.01.
_DUMMY_BYTE = 0x0A


def gguf_weight(store: ParameterStore, shard: Shard, config: GGUFConfig) -> LoadingWeight:
    """The layer's blocks as they are where all its parts have them and its slice holds whole groups; else dequantized."""
    types = [config.types.get(f"{part.name}.weight") for part in shard.parts]
    served = [found for found in types if found is not None]
    if not served:
        return DenseWeight(store, shard)
    if len(served) < len(types):
        others = ", ".join(part.name for part, found in zip(shard.parts, types) if found is None)
        say_once(f"GGUF weights beside {others} are dequantized at load: these are stored in another form")
        return DenseWeight(store, shard)
    unit = max(found.group for found in served)
    if shard.in_start % unit or shard.in_features % unit:
        say_once(
            f"GGUF weights of {shard.parts[0].name} are dequantized at load: tensor_parallel_size {store.group.size} cuts "
            f"its {shard.in_total} inputs within a group of {unit} quantized ones"
        )
        return DenseWeight(store, shard)
    return GGUFWeight(store, shard, served)


class GGUFWeight(LoadingWeight):
    """The file's blocks, uint8 ``[rows, bytes]`` a part, until `finish`.

    Parts may be of several types: the layer takes the most bits and the smallest groups of them.
    """

    def __init__(self, store: ParameterStore, shard: Shard, types: list[GGUFType]):
        self.store, self.shard, self.types = store, shard, types
        self.bits = max(kind.bits for kind in types)
        self.group = min(kind.group for kind in types)
        self.blocks = [self._expect(part, kind) for part, kind in zip(shard.parts, types)]

    def _expect(self, part: Part, kind: GGUFType) -> Tensor:
        """Blocks of this rank's inputs, with those that begin before and end after them."""
        store, shard, name = self.store, self.shard, f"{part.name}.weight"
        first = shard.in_start // kind.block_size
        count = -(-(shard.in_start + shard.in_features) // kind.block_size) - first
        into = store.empty(part.length, count * kind.block_bytes, dtype=torch.uint8, dummy=_DUMMY_BYTE)
        if shard.splits_inputs:
            store.expect(name, into, 1, first * kind.block_bytes, count * kind.block_bytes)
        else:
            store.expect(name, into, 0, part.start, part.length)
        store.stored_names.add(name)
        return into

    def _unpacked(self, blocks: Tensor, kind: GGUFType) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``[N, k]``, scales and minimums ``[N, k / group]`` in the layer's form."""
        rows, shard = blocks.shape[0], self.shard
        found = unpack(blocks.view(-1, kind.block_bytes), kind.name)
        codes, scale = found.codes.reshape(rows, -1), found.scale.view(rows, -1)
        minimum = torch.zeros_like(scale) if found.minimum is None else found.minimum.view(rows, -1)
        if self.bits == 4 and codes.dtype == torch.int8:
            codes, minimum = (codes + 8).view(torch.uint8), minimum - 8 * scale
        start = shard.in_start % kind.block_size
        codes = codes[:, start : start + shard.in_features]
        groups = slice(start // kind.group, (start + shard.in_features) // kind.group)
        repeats = kind.group // self.group
        return (
            codes,
            scale[:, groups].repeat_interleave(repeats, 1),
            minimum[:, groups].repeat_interleave(repeats, 1),
        )

    def packed(self) -> Int4Weight:
        """The weight in our layout."""
        parts = [self._unpacked(blocks, kind) for blocks, kind in zip(self.blocks, self.types)]
        codes = torch.cat([part[0].view(torch.int8) for part in parts])
        scales, minimums = (torch.cat([part[i] for part in parts]) for i in (1, 2))
        return pack_with_minimums(
            codes if self.bits == 8 else codes.view(torch.uint8), scales, minimums, self.group, self.bits
        )

    def finish(self) -> LinearMethod:
        weight = self.packed()
        self.store.num_bytes += weight.num_bytes - sum(blocks.numel() for blocks in self.blocks)
        return Int4Method(weight)
