# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernels of `kubeinfer.kernels.fp8`: activations to 8 bits, with what stands before in the same pass.

A program holds whole rows, so that a row's largest number costs no second pass over memory.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.fp8 import FP8, FP8_MAX, MIN_SCALE, QuantizedRows
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches

_MAX = tl.constexpr(FP8_MAX)
_LEAST = tl.constexpr(MIN_SCALE)


@triton.jit
def _store_rows(
    values,
    rows,
    columns,
    mask,
    num_rows,
    static_ptr,
    out_ptr,
    scale_ptr,
    WIDTH: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Quantize fp32 ``values [ROWS, PAD]`` (zeros where masked) and store them with a scale a row."""
    if STATIC:
        scale = tl.load(static_ptr).to(tl.float32) + tl.zeros_like(tl.max(values, 1))
    else:
        scale = tl.maximum(tl.max(tl.abs(values), 1) / _MAX, _LEAST)
    quantized = tl.clamp(values * (1.0 / scale)[:, None], -_MAX, _MAX)
    tl.store(out_ptr + rows[:, None] * WIDTH + columns[None, :], quantized.to(tl.float8e4nv), mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "eps"])
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    static_ptr,
    out_ptr,
    scale_ptr,
    num_rows,
    eps,
    STRIDE_X: tl.constexpr,
    STRIDE_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    STATIC: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # A thread takes eight numbers at a time, as loads of 16 bits do, for the 8-bit store too.
    columns = tl.max_contiguous(tl.arange(0, PAD), 8)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    if NORM:
        weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + rows[:, None] * STRIDE_X + columns[None, :], mask=mask, other=0.0)
    wide = x.to(tl.float32)
    if ADD:
        at = rows[:, None] * STRIDE_RESIDUAL + columns[None, :]
        # The norm is of what is stored, so that it does not matter where the sum was rounded.
        total = (wide + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + at, total, mask=mask)
        wide = total.to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
        wide = wide * factor[:, None] * weight[None, :]
    _store_rows(wide, rows, columns, mask, num_rows, static_ptr, out_ptr, scale_ptr, WIDTH, STATIC)


_NORM = Kernel(_norm_kernel)


@triton.jit(do_not_specialize=["num_rows"])
def _silu_kernel(
    x_ptr,
    static_ptr,
    out_ptr,
    scale_ptr,
    num_rows,
    STRIDE_X: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    STATIC: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # A thread takes eight numbers at a time, as loads of 16 bits do, for the 8-bit store too.
    columns = tl.max_contiguous(tl.arange(0, PAD), 8)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    at = x_ptr + rows[:, None] * STRIDE_X + columns[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    values = gate / (1.0 + tl.exp(-gate)) * up
    _store_rows(values, rows, columns, mask, num_rows, static_ptr, out_ptr, scale_ptr, WIDTH, STATIC)


_SILU = Kernel(_silu_kernel)


@triton.jit(do_not_specialize=["num_rows"])
def _blocks_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    num_rows,
    STRIDE_X: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    wide = tl.load(x_ptr + rows[:, None] * STRIDE_X + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 1) / _MAX, _LEAST)
    quantized = tl.clamp(wide * (1.0 / scale)[:, None], -_MAX, _MAX)
    tl.store(out_ptr + rows[:, None] * WIDTH + columns[None, :], quantized.to(tl.float8e4nv), mask=mask)
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    tl.store(scale_ptr + rows * blocks + block, scale, mask=rows < num_rows)


_BLOCKS = Kernel(_blocks_kernel)


@functools.cache
def _config(width: int, few_rows: bool) -> tuple[int, int, int]:
    """Padded width, rows a program and warps."""
    padded = triton.next_power_of_2(width)
    if few_rows:
        return padded, 1, min(16, max(1, padded // 512))
    return padded, max(1, 2048 // padded), min(16, max(4, padded // 1024))


def _new(num_rows: int, width: int, like: Tensor, scales: int = 1) -> QuantizedRows:
    data = torch.empty(num_rows, width, dtype=FP8, device=like.device)
    scale = torch.empty(num_rows, scales, dtype=torch.float32, device=like.device)
    return QuantizedRows(data, scale, like.dtype)


def _rows(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, static_scale: Tensor | None
) -> QuantizedRows:
    num_rows, width = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    out = _new(num_rows, width, x)
    if num_rows == 0:
        return out
    padded, rows, num_warps = _config(width, num_rows <= 512)
    other = residual if residual is not None else x
    pdl = overlaps_launches()
    _NORM.launch(
        (triton.cdiv(num_rows, rows), 1, 1),
        (
            x, other, weight if weight is not None else x, static_scale if static_scale is not None else x, out.data,
            out.scale, num_rows, eps,
        ),
        (
            x.stride(0), other.stride(0), width, padded, rows, residual is not None, weight is not None,
            static_scale is not None, pdl,
        ),
        num_warps,
        pdl=pdl,
    )  # fmt: skip
    return out


def quantize_rows_triton(x: Tensor, static_scale: Tensor | None) -> QuantizedRows:
    """`kubeinfer.kernels.fp8.quantize_rows` on CUDA tensors."""
    return _rows(x, None, None, 0.0, static_scale)


def rms_norm_quantize_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, static_scale: Tensor | None
) -> QuantizedRows:
    """`kubeinfer.kernels.fp8.rms_norm_quantize` on CUDA tensors."""
    return _rows(x, residual, weight, eps, static_scale)


def silu_and_mul_quantize_triton(x: Tensor, static_scale: Tensor | None) -> QuantizedRows:
    """`kubeinfer.kernels.fp8.silu_and_mul_quantize` on CUDA tensors."""
    num_rows, width = x.shape[0], x.shape[1] // 2
    out = _new(num_rows, width, x)
    if num_rows == 0:
        return out
    padded, rows, num_warps = _config(width, num_rows <= 512)
    pdl = overlaps_launches()
    _SILU.launch(
        (triton.cdiv(num_rows, rows), 1, 1),
        (x, static_scale if static_scale is not None else x, out.data, out.scale, num_rows),
        (x.stride(0), width, padded, rows, static_scale is not None, pdl),
        num_warps,
        pdl=pdl,
    )
    return out


def quantize_blocks_triton(x: Tensor, block: int) -> QuantizedRows:
    """`kubeinfer.kernels.fp8.quantize_rows` with a scale for each ``block`` columns, on CUDA tensors."""
    num_rows, width = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    blocks = triton.cdiv(width, block)
    out = _new(num_rows, width, x, blocks)
    if num_rows == 0:
        return out
    rows = 1 if num_rows < 64 else 16
    pdl = overlaps_launches()
    _BLOCKS.launch(
        (triton.cdiv(num_rows, rows), blocks, 1),
        (x, out.data, out.scale, num_rows),
        (x.stride(0), width, block, rows, pdl),
        1 if rows == 1 else 4,
        pdl=pdl,
    )
    return out
