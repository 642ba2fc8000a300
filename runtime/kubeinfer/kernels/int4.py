"""Products with weights of 4-bit integers in groups, ``w = (q - zero) * scale``; or ``w = q * scale + minimum``, 4 bits or 8.

AWQ's and GPTQ's layouts are taken apart once, at load, into plain codes, and put together again in one of ours, made for the
left operand of the tensor cores' 16 x 8 x 16 product. A block is 16 rows of 128 inputs: 16 words of eight codes a row. Word
``4 t + j`` of a row is for the thread that holds columns ``2 t``, ``2 t + 1`` and these plus 8 of two such products: code
``4 h + 2 b + c`` (its bits ``4 (4 h + 2 b + c)``) is that of input ``32 j + 16 b + 4 t + 2 c + h``. So a warp reads a block as
1 KiB in a row, a thread's words become its part of the operand with two codes an instruction (those 16 bits apart), and it needs
four neighbouring inputs for a product of 16.

A group's scale and zero share a word: a float32 scale whose low 8 bits (which scales stored in 16 bits do not use) are the zero.
Weights with minimums (GGUF's) keep the scale and the minimum as float16 in that word. Their codes may have 8 bits, stored with
128 added: a block of the high four bits, then one of the low.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels.activation import silu_and_mul
from kubeinfer.kernels.norm import NormBegun, rms_norm

ROWS, CHUNK = 16, 128  # rows and inputs of a block
# AutoAWQ's order: where in a run of eight outputs the code of each bit position belongs.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(slots=True)
class Int4Weight:
    """A weight ``[n, k]`` in T tiles of 16 rows and C chunks of 128 inputs, both rounded up.

    ``words`` int32 ``[T, C, bits / 4, 16, 16]``: blocks. ``meta`` int32 ``[T, 128 C / group, 16]``: scales and zeros of a tile's
    rows, ``2 g + h`` that of row ``g + 8 h``.
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
    meta = pack_meta(scales.t(), zeros.t()).repeat_interleave(repeats, 1)
    return Int4Weight(_pack_words(codes.t(), 4), _pack_groups(meta, k, own), n, k, own, order)


def pack_with_minimums(codes: Tensor, scales: Tensor, minimums: Tensor, group: int, bits: int) -> Int4Weight:
    """Our layout of ``codes * scales + minimums``, these rounded to float16.

    Args:
        codes: ``[N, K]``; uint8 of 4 bits, or int8 (``bits`` 8).
        scales, minimums: ``[N, K / group]`` float.
        group: 32, or of 8 bits 16 or 32; divides K.
    """
    n, k = codes.shape
    meta = torch.stack((scales, minimums), -1).half().view(torch.int32).squeeze(-1)
    if bits == 8:
        codes = codes.view(torch.uint8) ^ 0x80
    return Int4Weight(_pack_words(codes, bits), _pack_groups(meta, k, group), n, k, group, None, True, bits)


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[N, K]`` -> int32 ``[T, C, bits / 4, 16, 16]``, rows and inputs padded with zeros to whole blocks."""
    n, k = codes.shape
    tiles, chunks = -(-n // ROWS), -(-k // CHUNK)
    blocks = F.pad(codes, (0, chunks * CHUNK - k, 0, tiles * ROWS - n)).view(
        tiles, ROWS, chunks, 4, 2, 4, 2, 2
    )
    words = torch.zeros(tiles, chunks, bits // 4, ROWS, 4, 4, dtype=torch.int32, device=codes.device)
    for plane in range(bits // 4):
        for b, c, h in itertools.product(range(2), repeat=3):
            part = blocks[:, :, :, :, b, :, c, h].permute(0, 2, 1, 4, 3).to(torch.int32)  # [T, C, row, t, j]
            part = part >> (bits - 4 - 4 * plane) & 15
            words[:, :, plane] |= part << (4 * (4 * h + 2 * b + c))
    return words.flatten(4)


def _unpack_words(words: Tensor) -> Tensor:
    """The inverse: uint8 ``[16 T, 128 C]``."""
    tiles, chunks, planes = words.shape[:3]
    codes = torch.zeros(tiles * ROWS, chunks * CHUNK, dtype=torch.uint8, device=words.device)
    for plane in range(planes):
        split = unpack_bits(words[:, :, plane].reshape(-1, 1), 4)
        split = split.view(tiles, chunks, ROWS, 4, 4, 2, 2, 2)  # t, j, h, b, c
        part = split.permute(0, 2, 1, 4, 6, 3, 7, 5).reshape(codes.shape)
        codes = codes << 4 | part
    return codes


def _pack_groups(meta: Tensor, k: int, group: int) -> Tensor:
    """int32 ``[N, G]`` -> ``[T, 128 C / group, 16]``; what is padded is zero, and so are its weights."""
    n, found = meta.shape
    tiles, wanted = -(-n // ROWS), -(-k // CHUNK) * (CHUNK // group)
    meta = F.pad(meta[:, :wanted], (0, max(0, wanted - found), 0, tiles * ROWS - n))
    return meta.view(tiles, 2, 8, wanted).permute(0, 3, 2, 1).reshape(tiles, wanted, ROWS).contiguous()


def _unpack_groups(meta: Tensor) -> Tensor:
    """The inverse: int32 ``[16 T, G]``."""
    tiles, groups = meta.shape[:2]
    return meta.view(tiles, groups, 8, 2).permute(0, 3, 2, 1).reshape(tiles * ROWS, groups)


def pack_meta(scales: Tensor, zeros: Tensor) -> Tensor:
    """int32: the float32 bits of ``scales``, rounded to 16 bits of mantissa, over the 8 bits of ``zeros``."""
    bits = scales.float().contiguous().view(torch.int32)
    return ((bits + 0x80) & ~0xFF) | zeros.to(torch.int32)


def dequantize_int4_reference(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """``[n, k]`` in ``dtype``, inputs in the weight's order."""
    codes, meta = _unpack_words(weight.words)[: weight.n], _unpack_groups(weight.meta)[: weight.n]
    if weight.minimums:
        pairs = meta.contiguous().view(torch.float16).view(weight.n, -1, 2).float()
        scales, minimums = pairs.repeat_interleave(weight.group, 1).unbind(-1)
        wide = (codes.float() - (128 if weight.bits == 8 else 0)) * scales + minimums
        return wide[:, : weight.k].to(dtype).contiguous()
    scales = (meta & ~0xFF).view(torch.float32).repeat_interleave(weight.group, 1)
    zeros = (meta & 0xFF).repeat_interleave(weight.group, 1)
    wide = (codes.float() - zeros.float()) * scales
    return wide[:, : weight.k].to(dtype).contiguous()


def dequantize_int4(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """``[n, k]`` in ``dtype``, inputs in the weight's order."""
    if weight.words.is_cuda:
        from kubeinfer.kernels.triton_int4_dequantize import dequantize_int4_triton

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
    begun: NormBegun | None = None,
) -> Tensor:
    """``rms_norm(x) @ weight.T + bias``, through ``silu(gate) * up`` where ``gated``, added to ``residual`` where given.

    Args:
        x: ``[T, k]``, 16-bit.
        bias: ``[n]``.
        norm_weight: ``[k]``; None: ``x`` as it is.
        gated: gates are the first half of the weight's rows; the result is ``[T, n / 2]``.
        residual: ``[T, n]``, written in place and returned.
        begun: that norm, if the product before began it.
    """
    if x.is_cuda and x.shape[0] and x.dtype in (torch.bfloat16, torch.float16):
        from kubeinfer.kernels.triton_int4 import few_config, int4_few_triton

        config = few_config(x, weight, gated)
        if config is not None:
            # In float16 the norm's weights times inputs that are not yet normed could overflow.
            if norm_weight is not None and weight.order is None and x.dtype == torch.bfloat16:
                return int4_few_triton(x, weight, bias, norm_weight, eps, gated, residual, config, begun)
            x = _prepared(x, weight, norm_weight, eps)
            return int4_few_triton(x, weight, bias, None, 0.0, gated, residual, config)
    y = F.linear(_prepared(x, weight, norm_weight, eps), dequantize_int4(weight, x.dtype), bias)
    return _finished(y, gated, residual)


def int4_add_before_norm(
    residual: Tensor, x: Tensor, weight: Int4Weight, bias: Tensor | None, norm_weight: Tensor
) -> NormBegun | None:
    """`int4_linear` added to ``residual``; the RMS norm of the sum, whose weight is ``norm_weight [n]``, is begun if that costs no
    kernel."""
    if x.is_cuda and x.shape[0] and x.dtype in (torch.bfloat16, torch.float16):
        from kubeinfer.kernels.triton_int4 import few_config, int4_add_triton

        config = few_config(x, weight, False)
        if config is not None:
            return int4_add_triton(
                residual, _prepared(x, weight, None, 0.0), weight, bias, config, norm_weight
            )
    int4_linear(x, weight, bias, residual=residual)
    return None


def _prepared(x: Tensor, weight: Int4Weight, norm_weight: Tensor | None, eps: float) -> Tensor:
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    return x if weight.order is None else x.index_select(1, weight.order)


def _finished(y: Tensor, gated: bool, residual: Tensor | None) -> Tensor:
    if gated:
        y = silu_and_mul(y)
    return y if residual is None else residual.add_(y)
