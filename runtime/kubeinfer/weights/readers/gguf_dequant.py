"""GGUF's block formats with torch: codes, scales and minimums, and from them the ``gguf`` package's values, bit for bit.

Layouts are those of ggml-common.h in ggml. Each function takes ``blocks`` (uint8, [blocks, bytes of a block]). Formats
without a function here go through the package's numpy code.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import NamedTuple

import torch

# Elements dequantized at a time: the working set of a chunk stays in the processor's caches.
_CHUNK = 1 << 17
# Beyond this, threads wait for Python's lock; below that, starting them costs more than it saves.
_MOST_WORKERS = 8
_CHUNKS_A_WORKER = 8
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class Unpacked(NamedTuple):
    """Weights ``scale * code + minimum`` of blocks: codes int8 or uint8 [blocks, groups, group], the others float32 [blocks, groups].

    ``minimum`` None: zeros.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None

    def values(self) -> torch.Tensor:
        """float32 [blocks, elements]."""
        wide = self.codes.to(torch.float32).mul_(self.scale.unsqueeze(-1))
        if self.minimum is not None:
            # two operations, not addcmul: a fused multiply-add would round once where ggml rounds twice
            wide.add_(self.minimum.unsqueeze(-1))
        return wide.flatten(1)


def dequantize(
    raw: torch.Tensor,
    type_name: str,
    shape: tuple[int, ...],
    block_size: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The tensor that ``raw`` (uint8, contiguous) holds in GGUF type ``type_name``.

    Returns ``shape`` in ``dtype``; where that is None, in the type it is stored in, or float32 if that is a
    quantized one. Values are computed in float32 and rounded once. The result may share memory with ``raw``.
    """
    if type_name in _PLAIN:
        plain = raw.view(_PLAIN[type_name]).view(shape)
        return plain if dtype is None else plain.to(dtype)
    blocks = raw.view(prod(shape) // block_size, -1)
    out = torch.empty(blocks.shape[0], block_size, dtype=dtype or torch.float32)
    step = max(1, _CHUNK // block_size)
    known = type_name in _UNPACK

    def chunk(first: int) -> None:
        part = blocks[first : first + step]
        out[first : first + step] = unpack(part, type_name).values() if known else _with_gguf(part, type_name)

    _run(chunk, range(0, blocks.shape[0], step))
    return out.view(shape)


def _run(chunk: Callable[[int], None], firsts: range) -> None:
    """Call ``chunk`` with each of ``firsts``, on as many threads as torch has; each operation on one thread.

    Operations are too short for OpenMP: waiting for a second thread at the end of each costs more than it saves, many
    times more on a busy machine.
    """
    threads = torch.get_num_threads()
    workers = min(threads, _MOST_WORKERS, len(firsts) // _CHUNKS_A_WORKER)
    try:
        torch.set_num_threads(1)
        if workers > 1:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for _ in pool.map(chunk, firsts):
                    pass
        else:
            for first in firsts:
                chunk(first)
    finally:
        torch.set_num_threads(threads)


def _with_gguf(blocks: torch.Tensor, type_name: str) -> torch.Tensor:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as gguf_dequantize

    from kubeinfer.errors import ModelLoadError

    try:
        return torch.from_numpy(gguf_dequantize(blocks.numpy(), GGMLQuantizationType[type_name]))
    except NotImplementedError:
        raise ModelLoadError(
            f"GGUF tensors of type {type_name} cannot be dequantized by the installed gguf package. "
            "Take a file quantized otherwise (Q4_K_M, Q8_0, F16)."
        ) from None


def unpack(blocks: torch.Tensor, type_name: str) -> Unpacked:
    """Codes, scales and minimums of ``blocks`` (uint8 [n, bytes of a block]) in one of `UNPACKED_TYPES`, on their device."""
    return _UNPACK[type_name](blocks)


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte ``start`` of each block, as float32 [blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> uint8 [..., 2, n]: low halves, then high halves."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-2)


def _bits(packed: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., n] -> uint8 [..., 8 / width, n]: fields of ``width`` bits, lowest first."""
    mask = (1 << width) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, width)], dim=-2)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 4] -> uint8 [n, 32]: bit i of the little-endian word, moved to the fifth place (0 or 16)."""
    return _bits(packed, 1).transpose(-1, -2).reshape(-1, 32) << 4


def _signed(codes: torch.Tensor, middle: int, group: int) -> torch.Tensor:
    """uint8 codes less ``middle``, as int8 [blocks, groups, group]."""
    return codes.view(torch.int8).sub_(middle).view(codes.shape[0], -1, group)


def _q4_0(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(_signed(_nibbles(blocks[:, 2:18]).reshape(-1, 32), 8, 32), _half(blocks, 0), None)


def _q4_1(blocks: torch.Tensor) -> Unpacked:
    codes = _nibbles(blocks[:, 4:20]).reshape(-1, 1, 32)
    return Unpacked(codes, _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> Unpacked:
    codes = _nibbles(blocks[:, 6:22]).reshape(-1, 32) | _fifth_bits(blocks[:, 2:6])
    return Unpacked(_signed(codes, 16, 32), _half(blocks, 0), None)


def _q5_1(blocks: torch.Tensor) -> Unpacked:
    codes = _nibbles(blocks[:, 8:24]).reshape(-1, 32) | _fifth_bits(blocks[:, 4:8])
    return Unpacked(codes.unsqueeze(1), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(blocks[:, 2:34].view(torch.int8).unsqueeze(1), _half(blocks, 0), None)


def _q2_k(blocks: torch.Tensor) -> Unpacked:
    scales = blocks[:, 0:16]
    codes = _bits(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    return Unpacked(
        codes, _half(blocks, 80) * (scales & 0x0F).float(), -(_half(blocks, 82) * (scales >> 4).float())
    )


def _q3_k(blocks: torch.Tensor) -> Unpacked:
    low = _nibbles(blocks[:, 96:104]).reshape(-1, 16)
    high = _bits(blocks[:, 104:108], 2).reshape(-1, 16)
    codes = _bits(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    # the mask's bit is set where nothing is to be subtracted
    codes = codes | (_bits(blocks[:, 0:32], 1).reshape(-1, 16, 16) << 2)
    return Unpacked(_signed(codes, 4, 16), _half(blocks, 108) * ((low | (high << 4)).float() - 32.0), None)


def _scales_and_minimums(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of Q4_K and Q5_K, of 6 bits each in 12 bytes: two float32 [n, 8]."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((first & 0x3F, (third & 0x0F) | ((first >> 2) & 0x30)), dim=-1)
    minimum = torch.cat((second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)), dim=-1)
    return _half(blocks, 0) * scale.float(), -(_half(blocks, 2) * minimum.float())


def _q4_k(blocks: torch.Tensor) -> Unpacked:
    codes = _nibbles(blocks[:, 16:144].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return Unpacked(codes, *_scales_and_minimums(blocks))


def _q5_k(blocks: torch.Tensor) -> Unpacked:
    low = _nibbles(blocks[:, 48:176].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return Unpacked(low | (_bits(blocks[:, 16:48], 1) << 4), *_scales_and_minimums(blocks))


def _q6_k(blocks: torch.Tensor) -> Unpacked:
    low = _nibbles(blocks[:, 0:128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return Unpacked(_signed(low | (high << 4), 32, 16), scale, None)


_UNPACK: dict[str, Callable[[torch.Tensor], Unpacked]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
