"""Products with weights of 4-bit integers in groups, ``w = (q - zero) * scale``; or ``w = q * scale + minimum``, 4 bits or 8.

AWQ's and GPTQ's layouts are taken apart once, at load, into plain codes, and put together again in one of ours: 32-bit words
of eight codes, rows of the weight contiguous. A chunk of 256 inputs is 32 words; code ``j`` (bits ``4 j``) of a chunk's word
``i`` is that of input ``32 j + i``, so that threads that read neighbouring words need neighbouring inputs. A group's scale and
zero share a word: a float32 scale whose low 8 bits (which scales stored in 16 bits do not use) are the zero.

Weights with minimums (GGUF's) keep the scale and the minimum as float16 in that word. Their codes may have 8 bits: four a
word, chunks of 128 inputs. Such a code is signed and stored with 128 added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels.activation import silu_and_mul
from kubeinfer.kernels.norm import rms_norm

CHUNK = 256  # inputs of 32 words of 4-bit codes
# AutoAWQ's order: where in a run of eight outputs the code of each bit position belongs.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# More tokens than this: a whole weight is dequantized and cuBLAS multiplies.
MAX_FUSED_ROWS = 256


@dataclass(slots=True)
class Int4Weight:
    """A weight ``[n, k]``: ``words`` int32 ``[n, K bits / 32]``, ``meta`` int32 ``[n, K / group]``, K being k rounded up to chunks.

    ``order`` int64 ``[k]``: the inputs' order in the weight where it is not the layer's own (GPTQ's act-order).
    ``minimums``: ``meta`` holds them instead of zeros. ``bits`` is 8, and ``group`` 16, only with them.
    """

    words: Tensor
    meta: Tensor
    n: int
    k: int
    group: int
    order: Tensor | None = None
    minimums: bool = False
    bits: int = 4

    @property
    def chunk(self) -> int:
        """Inputs of 32 words."""
        return 1024 // self.bits

    @property
    def num_bytes(self) -> int:
        extra = 0 if self.order is None else 8 * self.order.numel()
        return 4 * (self.words.numel() + self.meta.numel()) + extra


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """``packed`` int32 ``[R, C]`` -> uint8 ``[R, C, 32 / bits]``, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8)


def unpack_awq(packed: Tensor) -> Tensor:
    """AutoAWQ's GEMM layout, int32 ``[R, N / 8]`` -> codes uint8 ``[R, N]``; of weights (R inputs) and of zeros (R groups)."""
    places = torch.tensor(_AWQ_ORDER, device=packed.device)
    # Bits 4 i hold the output at places[i]: the inverse permutation puts outputs in their own order.
    return unpack_bits(packed, 4).index_select(2, places.argsort()).flatten(1)


def unpack_gptq_weight(packed: Tensor, bits: int) -> Tensor:
    """GPTQ's weights, int32 ``[K bits / 32, N]`` -> codes uint8 ``[K, N]``."""
    return unpack_bits(packed, bits).permute(0, 2, 1).reshape(-1, packed.shape[1])


def unpack_gptq_zeros(packed: Tensor, bits: int, offset: int) -> Tensor:
    """GPTQ's zeros, int32 ``[G, N bits / 32]`` -> uint8 ``[G, N]``; ``offset`` is what the format subtracted when storing."""
    return unpack_bits(packed, bits).flatten(1).add_(offset).bitwise_and_((1 << bits) - 1)


def dequantize_codes(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """fp32 ``[N, K]`` of codes ``[K, N]``, scales and zeros ``[G, N]`` and the group ``[K]`` of each input."""
    wide = codes.float().sub_(zeros.float().index_select(0, groups))
    return wide.mul_(scales.float().index_select(0, groups)).t()


def pack_int4(codes: Tensor, scales: Tensor, zeros: Tensor, group: int, order: Tensor | None) -> Int4Weight:
    """Our layout of codes ``[K, N]`` (in ``order``), scales and zeros ``[G, N]`` of ``group`` neighbouring inputs each.

    ``group`` is 32, 64, a multiple of 128, or at least K.
    """
    k, n = codes.shape
    if group >= k:
        own, repeats = 128, -(-k // 128)
    else:
        own, repeats = min(group, 128), max(1, group // 128)
    padded = -(-k // CHUNK) * CHUNK
    meta = pack_meta(scales.t(), zeros.t()).repeat_interleave(repeats, 1)
    meta = F.pad(meta[:, : padded // own], (0, max(0, padded // own - meta.shape[1])))
    return Int4Weight(_pack_words(codes.t(), 4), meta.contiguous(), n, k, own, order)


def pack_with_minimums(codes: Tensor, scales: Tensor, minimums: Tensor, group: int, bits: int) -> Int4Weight:
    """Our layout of ``codes * scales + minimums``, these rounded to float16.

    Args:
        codes: ``[N, K]``; uint8 of 4 bits, or int8 (``bits`` 8).
        scales, minimums: ``[N, K / group]`` float.
        group: 32, or of 8 bits 16 or 32; divides K.
    """
    n, k = codes.shape
    meta = torch.stack((scales, minimums), -1).half().view(torch.int32).squeeze(-1)
    padded = -(-k // (1024 // bits)) * (1024 // bits)
    meta = F.pad(meta, (0, (padded - k) // group))
    if bits == 8:
        codes = codes.view(torch.uint8) ^ 0x80
    return Int4Weight(_pack_words(codes, bits), meta.contiguous(), n, k, group, None, True, bits)


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    """``[N, K]`` -> int32 ``[N, words]``, inputs padded with zeros to whole chunks."""
    n, k = codes.shape
    per_word, chunk = 32 // bits, 1024 // bits
    padded = -(-k // chunk) * chunk
    rows = F.pad(codes, (0, padded - k)).reshape(n, -1, per_word, 32)
    words = torch.zeros(n, padded // chunk, 32, dtype=torch.int32, device=codes.device)
    for j in range(per_word):
        words |= rows[:, :, j].to(torch.int32) << (bits * j)
    return words.flatten(1)


def pack_meta(scales: Tensor, zeros: Tensor) -> Tensor:
    """int32: the float32 bits of ``scales``, rounded to 16 bits of mantissa, over the 8 bits of ``zeros``."""
    bits = scales.float().contiguous().view(torch.int32)
    return ((bits + 0x80) & ~0xFF) | zeros.to(torch.int32)


def dequantize_int4_reference(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """``[n, k]`` in ``dtype``, inputs in the weight's order."""
    codes = unpack_bits(weight.words.view(-1, 32), weight.bits)
    codes = codes.permute(0, 2, 1).reshape(weight.n, -1)
    if weight.minimums:
        pairs = weight.meta.view(torch.float16).view(weight.n, -1, 2).float()
        scales, minimums = pairs.repeat_interleave(weight.group, 1).unbind(-1)
        wide = (codes.float() - (128 if weight.bits == 8 else 0)) * scales + minimums
        return wide[:, : weight.k].to(dtype).contiguous()
    scales = (weight.meta & ~0xFF).view(torch.float32).repeat_interleave(weight.group, 1)
    zeros = (weight.meta & 0xFF).repeat_interleave(weight.group, 1)
    wide = (codes.float() - zeros.float()) * scales
    return wide[:, : weight.k].to(dtype).contiguous()


def dequantize_int4(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """``[n, k]`` in ``dtype``, inputs in the weight's order."""
    if weight.words.is_cuda:
        from kubeinfer.kernels.triton_int4_dot import dequantize_int4_triton

        return dequantize_int4_triton(weight, dtype)
    return dequantize_int4_reference(weight, dtype)


def int4_linear(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """``rms_norm(x) @ weight.T + bias``, through ``silu(gate) * up`` where ``gated``, added to ``residual`` where given.

    Args:
        x: ``[T, k]``, 16-bit.
        bias: ``[n]``.
        norm_weight: ``[k]``; None: ``x`` as it is.
        gated: gates are the first half of the weight's rows; the result is ``[T, n / 2]``.
        residual: ``[T, n]``, written in place and returned.
    """
    if x.is_cuda and x.shape[0] <= MAX_FUSED_ROWS and x.dtype in (torch.bfloat16, torch.float16):
        from kubeinfer.kernels.triton_int4 import MAX_VECTOR_ROWS, int4_vector_triton
        from kubeinfer.kernels.triton_int4_dot import int4_dot_triton

        if 0 < x.shape[0] <= MAX_VECTOR_ROWS:
            if weight.order is None:
                return int4_vector_triton(x, weight, bias, norm_weight, eps, gated, residual)
            if norm_weight is not None:
                x = rms_norm(x, norm_weight, eps)
            x = x.index_select(1, weight.order)
            return int4_vector_triton(x, weight, bias, None, 0.0, gated, residual)
        if x.shape[0] > 0:
            y = int4_dot_triton(_prepared(x, weight, norm_weight, eps), weight, bias)
            return _finished(y, gated, residual)
    y = F.linear(_prepared(x, weight, norm_weight, eps), dequantize_int4(weight, x.dtype), bias)
    return _finished(y, gated, residual)


def _prepared(x: Tensor, weight: Int4Weight, norm_weight: Tensor | None, eps: float) -> Tensor:
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    return x if weight.order is None else x.index_select(1, weight.order)


def _finished(y: Tensor, gated: bool, residual: Tensor | None) -> Tensor:
    if gated:
        y = silu_and_mul(y)
    return y if residual is None else residual.add_(y)
