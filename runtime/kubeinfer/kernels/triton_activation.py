# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernel of `kubeinfer.kernels.activation`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches


@triton.jit
def _silu_and_mul_kernel(
    x_ptr,
    out_ptr,
    STRIDE_X: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(x_ptr + row * STRIDE_X + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * STRIDE_X + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * STRIDE_OUT + columns, result.to(out_ptr.dtype.element_ty), mask=mask)


_SILU_AND_MUL = Kernel(_silu_and_mul_kernel)


def silu_and_mul_triton(x: Tensor, out: Tensor | None) -> Tensor:
    """`kubeinfer.kernels.activation.silu_and_mul` on CUDA tensors."""
    width = x.shape[-1] // 2
    if out is None:
        out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    if x.dim() != 2:
        silu_and_mul_triton(x.view(-1, 2 * width), out.view(-1, width))
        return out
    num_rows = x.shape[0]
    if num_rows == 0:
        return out
    block, num_warps = (512, 2) if num_rows <= 64 or batch_invariant() else (2048, 8)
    pdl = overlaps_launches()
    _SILU_AND_MUL.launch(
        (num_rows, triton.cdiv(width, block), 1),
        (x, out),
        (x.stride(0), out.stride(0), width, block, pdl),
        num_warps,
        pdl=pdl,
    )
    return out
