# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Triton kernel of `kubeinfer.kernels.int4` that dequantizes whole weights, for products of many tokens.

Constants: inputs a GROUP, PLANES of four bits a code, MINIMUMS instead of zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.int4 import Int4Weight
from kubeinfer.kernels.triton_int4 import layout, split_meta
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches

_BLOCK_N = 64  # rows a program


@triton.jit
def _scale_and_shift(meta, PLANES: tl.constexpr, MINIMUMS: tl.constexpr):
    """What `_value` needs of numbers that are codes plus 128, or bytes plus 256."""
    if MINIMUMS:
        scale, minimum = split_meta(meta)
        if PLANES == 1:
            shift = minimum - 128.0 * scale
        else:
            shift = minimum - (256.0 + 128.0) * scale
    else:
        scale = (meta & -256).to(tl.float32, bitcast=True)
        shift = (((meta & 255) << 16) | 0x43000000).to(tl.float32, bitcast=True)
    return scale, shift


@triton.jit
def _value(number, scale, shift, MINIMUMS: tl.constexpr):
    if MINIMUMS:
        value = number * scale + shift
    else:
        value = (number - shift) * scale
    return value


@triton.jit
def _unpacked(
    words_ptr, meta_ptr, rows, tiles, chunk, dtype: tl.constexpr,
    CHUNKS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, MINIMUMS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_N, 128]``: a chunk of ``rows``."""
    PER: tl.constexpr = 128 // GROUP  # groups a chunk
    # Words are read twice, for their two runs of four inputs: so these come in the inputs' order.
    runs = tl.arange(0, 32)
    tile = tl.minimum(rows // 16, tiles - 1).to(tl.int64)
    block = words_ptr + (tile * CHUNKS + chunk) * (PLANES * 256) + rows % 16 * 16
    at = block[:, None] + (runs % 4 * 4 + runs // 8)[None, :]
    shift = (runs // 4 % 2 * 8)[None, :]
    high = tl.load(at) >> shift
    if PLANES == 2:
        low = tl.load(at + 256) >> shift
    beside = meta_ptr + (tile * CHUNKS + chunk) * (PER * 16) + rows % 8 * 2 + rows % 16 // 8
    if PER == 1:
        meta = tl.load(beside)[:, None]
    else:
        meta = tl.load(beside[:, None] + (runs // 4 * PER // 8 * 16)[None, :])
    scale, other = _scale_and_shift(meta, PLANES, MINIMUMS)
    values = ()
    for i in tl.static_range(4):
        code = (high >> (i // 2 * 4 + i % 2 * 16)) & 15
        if PLANES == 1:
            number = ((code << 16) | 0x43000000).to(tl.float32, bitcast=True)
        else:
            below = (low >> (i // 2 * 4 + i % 2 * 16)) & 15
            number = ((code << 19) | (below << 15) | 0x43800000).to(tl.float32, bitcast=True)
        values = values + (_value(number, scale, other, MINIMUMS).to(dtype),)
    pairs = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
    return tl.reshape(pairs, [BLOCK_N, 128])


@triton.jit(do_not_specialize=["n"])
def _dequantize_kernel(
    words_ptr,
    meta_ptr,
    out_ptr,
    n,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    MINIMUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(0)
    wide = _unpacked(
        words_ptr, meta_ptr, rows, (n + 15) // 16, chunk, out_ptr.dtype.element_ty,
        CHUNKS, GROUP, PLANES, MINIMUMS, BLOCK_N,
    )  # fmt: skip
    k = chunk * 128 + tl.arange(0, 128)
    at = out_ptr + rows.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(at, wide, mask=(rows < n)[:, None] & (k < K)[None, :])


_DEQUANTIZE = Kernel(_dequantize_kernel)


def dequantize_int4_triton(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """`kubeinfer.kernels.int4.dequantize_int4` on CUDA tensors."""
    out = torch.empty(weight.n, weight.k, dtype=dtype, device=weight.words.device)
    pdl = overlaps_launches()
    _DEQUANTIZE.launch(
        (weight.words.shape[1], triton.cdiv(weight.n, _BLOCK_N), 1),
        (weight.words, weight.meta, out, weight.n),
        (weight.k, *layout(weight), _BLOCK_N, pdl),
        4,
        pdl=pdl,
    )
    return out
