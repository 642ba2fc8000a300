# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Triton kernels of `kubeinfer.kernels.int4` that dequantize: for products of many tokens, or whole weights.

Constants of both: inputs a GROUP, PLANES of four bits a code, MINIMUMS instead of zeros.
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
from kubeinfer.kernels.triton_split import sum_parts

_ENOUGH_PROGRAMS = 256


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


@triton.jit(do_not_specialize=["m", "n"])
def _dot_kernel(
    x_ptr,
    words_ptr,
    meta_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    MINIMUMS: tl.constexpr,
    STRIDE_X: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    # Weights stand on the left, so that few tokens fill the narrow side of the tensor cores' tiles.
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    PER: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    first = tl.program_id(2) * PER
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    columns = tl.arange(0, 128)
    base = x_ptr + tokens.to(tl.int64)[None, :] * STRIDE_X + columns[:, None]
    for chunk in range(first, min(first + PER, CHUNKS)):
        wide = _unpacked(
            words_ptr, meta_ptr, rows, (n + 15) // 16, chunk, x_ptr.dtype.element_ty,
            CHUNKS, GROUP, PLANES, MINIMUMS, BLOCK_N,
        )  # fmt: skip
        mask = (tokens < m)[None, :]
        if K % 128 != 0:
            mask = mask & (chunk * 128 + columns < K)[:, None]
        x = tl.load(base + chunk * 128, mask=mask, other=0.0)
        total = tl.dot(wide, x, total)
    at = tokens.to(tl.int64)[None, :] * n + rows[:, None]
    mask = inside[:, None] & (tokens < m)[None, :]
    if SPLITS == 1:
        if HAS_BIAS:
            total += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + tl.program_id(2).to(tl.int64) * m * n + at, total, mask=mask)


_DOT = Kernel(_dot_kernel)


def int4_dot_triton(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` on the tensor cores, weights dequantized on the way; inputs in the weight's order."""
    m, k = x.shape
    n, chunks = weight.n, weight.words.shape[1]
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block_m = min(128, max(16, triton.next_power_of_2(m)))
    block_n, num_warps = (64, 4) if block_m <= 32 else (128, 8)
    tiles = triton.cdiv(n, block_n) * triton.cdiv(m, block_m)
    splits = 1
    while splits < 16 and tiles * splits < _ENOUGH_PROGRAMS and chunks >= 8 * splits:
        splits *= 2
    splits = triton.cdiv(chunks, triton.cdiv(chunks, splits))  # none is empty
    target = out if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    pdl = overlaps_launches()
    _DOT.launch(
        (triton.cdiv(n, block_n), triton.cdiv(m, block_m), splits),
        (x, weight.words, weight.meta, bias if bias is not None else x, target, m, n),
        (k, *layout(weight), x.stride(0), bias is not None, splits, block_m, block_n, pdl),
        num_warps,
        2,
        pdl=pdl,
    )
    return out if splits == 1 else sum_parts(target, bias, out)


def dequantize_int4_triton(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """`kubeinfer.kernels.int4.dequantize_int4` on CUDA tensors."""
    out = torch.empty(weight.n, weight.k, dtype=dtype, device=weight.words.device)
    block_n = 16
    pdl = overlaps_launches()
    _DEQUANTIZE.launch(
        (weight.words.shape[1], triton.cdiv(weight.n, block_n), 1),
        (weight.words, weight.meta, out, weight.n),
        (weight.k, *layout(weight), block_n, pdl),
        4,
        pdl=pdl,
    )
    return out
