# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc"
"""Triton kernels of `kubeinfer.kernels.int4` that dequantize: for products on the tensor cores, or whole weights.

Constants of both: as those of `kubeinfer.kernels.triton_int4`.
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
def _scale_and_shift(meta, CODES: tl.constexpr, MINIMUMS: tl.constexpr):
    """What `_value` needs of numbers that are codes plus 128, or bytes plus 256."""
    if MINIMUMS:
        scale, minimum = split_meta(meta)
        if CODES == 8:
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
def _unpacked(words_ptr, meta_ptr, rows, inside, chunk, WORDS: tl.constexpr, CODES: tl.constexpr, GROUPS: tl.constexpr,
              MINIMUMS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """fp32 ``[BLOCK_N, 32 CODES]``: a chunk of ``rows``."""
    lanes = tl.arange(0, 32)
    codes = tl.arange(0, CODES)
    words = tl.load(
        words_ptr + rows.to(tl.int64)[:, None] * WORDS + chunk * 32 + lanes[None, :],
        mask=inside[:, None],
        other=0,
    )
    base = meta_ptr + rows * (WORDS // 32 * GROUPS) + chunk * GROUPS
    if GROUPS <= CODES:
        where = base[:, None] + (codes // (CODES // GROUPS))[None, :]
        meta = tl.load(where, mask=inside[:, None], other=0)[:, :, None]
    else:
        where = base[:, None, None] + (codes * 2)[None, :, None] + (lanes // 16)[None, None, :]
        meta = tl.load(where, mask=inside[:, None, None], other=0)
    scale, shift = _scale_and_shift(meta, CODES, MINIMUMS)
    if CODES == 8:
        bits = (((words[:, None, :] >> (codes * 4)[None, :, None]) & 15) << 16) | 0x43000000
    else:
        bits = (((words[:, None, :] >> (codes * 8)[None, :, None]) & 255) << 15) | 0x43800000
    value = _value(bits.to(tl.float32, bitcast=True), scale, shift, MINIMUMS)
    return tl.reshape(value, [BLOCK_N, CODES * 32])


@triton.jit(do_not_specialize=["n"])
def _dequantize_kernel(
    words_ptr,
    meta_ptr,
    out_ptr,
    n,
    K: tl.constexpr,
    WORDS: tl.constexpr,
    CODES: tl.constexpr,
    GROUPS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(0)
    wide = _unpacked(words_ptr, meta_ptr, rows, rows < n, chunk, WORDS, CODES, GROUPS, MINIMUMS, BLOCK_N)
    k = chunk * (32 * CODES) + tl.arange(0, 32 * CODES)
    at = out_ptr + rows.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(at, wide.to(out_ptr.dtype.element_ty), mask=(rows < n)[:, None] & (k < K)[None, :])


_DEQUANTIZE = Kernel(_dequantize_kernel)


@triton.jit
def _placed(words, J: tl.constexpr, exponent, CODES: tl.constexpr):
    """fp32 of code ``J`` of each word, plus the number (128, or 256 of bytes) whose bits are ``exponent``."""
    PLACE: tl.constexpr = (16 if CODES == 8 else 15) - J * (32 // CODES)
    MASK: tl.constexpr = 0xF0000 if CODES == 8 else 0x7F8000
    if PLACE >= 0:
        bits = words << PLACE
    else:
        bits = words >> -PLACE
    return ((bits & MASK) | exponent).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["m", "n", "exponent"])
def _dot_kernel(
    x_ptr,
    words_ptr,
    meta_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    exponent,
    K: tl.constexpr,
    WORDS: tl.constexpr,
    CODES: tl.constexpr,
    GROUPS: tl.constexpr,
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
    CHUNKS: tl.constexpr = WORDS // 32
    PER: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    SETS: tl.constexpr = min(CODES, GROUPS)
    first = tl.program_id(2) * PER
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    lanes = tl.arange(0, 32)
    base = x_ptr + tokens.to(tl.int64)[None, :] * STRIDE_X + lanes[:, None]
    words_base = words_ptr + rows.to(tl.int64)[:, None] * WORDS + lanes[None, :]
    meta_base = meta_ptr + rows * (CHUNKS * GROUPS)
    for chunk in range(first, min(first + PER, CHUNKS)):
        words = tl.load(words_base + chunk * 32, mask=inside[:, None], other=0)
        for h in tl.static_range(SETS):
            beside = meta_base + chunk * GROUPS + h * (GROUPS // SETS)
            scale, shift = _scale_and_shift(tl.load(beside, mask=inside, other=0)[:, None], CODES, MINIMUMS)
            if GROUPS > CODES:  # each half of a code's 32 inputs is a group
                other, apart = _scale_and_shift(
                    tl.load(beside + 1, mask=inside, other=0)[:, None], CODES, MINIMUMS
                )
                half = (lanes < 16)[None, :]
                scale, shift = tl.where(half, scale, other), tl.where(half, shift, apart)
            for i in tl.static_range(CODES // SETS):
                k = chunk * (32 * CODES) + (h * (CODES // SETS) + i) * 32
                number = _placed(words, h * (CODES // SETS) + i, exponent, CODES)
                weight = _value(number, scale, shift, MINIMUMS)
                mask = (tokens < m)[None, :]
                if K % (32 * CODES) != 0:
                    mask = mask & (k + lanes < K)[:, None]
                x = tl.load(base + k, mask=mask, other=0.0)
                total = tl.dot(weight.to(x.dtype), x, total)
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
    n, words = weight.n, weight.words.shape[1]
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block_m = min(128, max(16, triton.next_power_of_2(m)))
    block_n, num_warps = (64, 4) if block_m <= 32 else (128, 8)
    tiles = triton.cdiv(n, block_n) * triton.cdiv(m, block_m)
    chunks = words // 32
    splits = 1
    while splits < 16 and tiles * splits < _ENOUGH_PROGRAMS and chunks >= 4 * splits:
        splits *= 2
    splits = triton.cdiv(chunks, triton.cdiv(chunks, splits))  # none is empty
    target = out if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    pdl = overlaps_launches()
    exponent = 0x43000000 if weight.bits == 4 else 0x43800000  # of 128 and of 256
    _DOT.launch(
        (triton.cdiv(n, block_n), triton.cdiv(m, block_m), splits),
        (x, weight.words, weight.meta, bias if bias is not None else x, target, m, n, exponent),
        (k, words, *layout(weight), x.stride(0), bias is not None, splits, block_m, block_n, pdl),
        num_warps,
        2,  # a chunk is eight products: their inputs, in three stages, would not fit into shared memory
        pdl=pdl,
    )
    return out if splits == 1 else sum_parts(target, bias, out)


def dequantize_int4_triton(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """`kubeinfer.kernels.int4.dequantize_int4` on CUDA tensors."""
    out = torch.empty(weight.n, weight.k, dtype=dtype, device=weight.words.device)
    words, block_n = weight.words.shape[1], 16
    pdl = overlaps_launches()
    _DEQUANTIZE.launch(
        (words // 32, triton.cdiv(weight.n, block_n), 1),
        (weight.words, weight.meta, out, weight.n),
        (weight.k, words, *layout(weight), block_n, pdl),
        4,
        pdl=pdl,
    )
    return out
