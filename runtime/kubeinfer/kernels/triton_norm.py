# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernel of `kubeinfer.kernels.norm`: whole rows in registers, one pass over memory."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    eps,
    STRIDE_X: tl.constexpr,
    STRIDE_RESIDUAL: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, H_PAD)
    mask = (rows < num_rows)[:, None] & (columns < H)[None, :]
    weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
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
    factor = tl.rsqrt(tl.sum(wide * wide, 1) / H + eps)
    result = wide * factor[:, None] * weight[None, :]
    tl.store(
        out_ptr + rows[:, None] * STRIDE_OUT + columns[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


_RMS_NORM = Kernel(_rms_norm_kernel)


@functools.cache
def _config(width: int, few_rows: bool) -> tuple[int, int, int]:
    """Padded width, rows a program and warps."""
    padded = triton.next_power_of_2(width)
    if few_rows:
        return padded, 1, min(16, max(1, padded // 512))
    return padded, max(1, 2048 // padded), min(16, max(4, padded // 1024))


def rms_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor | None
) -> Tensor:
    """RMSNorm of ``x``, or of ``residual += x`` where ``residual`` is given."""
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.dim() != 2:
        rms_norm_triton(
            x.view(-1, x.shape[-1]),
            residual.view(-1, x.shape[-1]) if residual is not None else None,
            weight,
            eps,
            out.view(-1, x.shape[-1]),
        )
        return out
    num_rows, width = x.shape
    if num_rows == 0:
        return out
    padded, rows, num_warps = _config(width, num_rows <= 512 or batch_invariant())
    other = residual if residual is not None else x
    pdl = overlaps_launches()
    _RMS_NORM.launch(
        (triton.cdiv(num_rows, rows), 1, 1),
        (x, other, weight, out, num_rows, eps),
        (x.stride(0), other.stride(0), out.stride(0), width, padded, rows, residual is not None, pdl),
        num_warps,
        pdl=pdl,
    )
    return out
