# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernel of `kubeinfer.kernels.fp8.block_fp8_linear`: a scale for each 128 inputs of weights and of activations.

Each step of the loop is one block of inputs: its product is summed by the tensor cores alone, then scaled into the total. A
few tokens split the loop over programs, and read the weights once; their parts are summed by a second kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.triton_fp8 import quantize_blocks_triton
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches
from kubeinfer.kernels.triton_split import sum_parts

_ENOUGH_PROGRAMS = 256


@triton.jit(do_not_specialize=["m", "n"])
def _block_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    PER: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_K)
    first = tl.program_id(2) * PER
    weight_base = weight_ptr + rows.to(tl.int64)[:, None] * K + lanes[None, :]
    x_base = x_ptr + tokens.to(tl.int64)[None, :] * K + lanes[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(first, min(first + PER, BLOCKS)):
        k = block * BLOCK_K
        weight = tl.load(weight_base + k, mask=(rows < n)[:, None] & (k + lanes < K)[None, :], other=0.0)
        x = tl.load(x_base + k, mask=(tokens < m)[None, :] & (k + lanes < K)[:, None], other=0.0)
        scale = tl.load(scale_ptr + block * n + rows, mask=rows < n, other=0.0)
        x_scale = tl.load(x_scale_ptr + tokens * BLOCKS + block, mask=tokens < m, other=0.0)
        total += tl.dot(weight, x) * (scale[:, None] * x_scale[None, :])
    at = tokens.to(tl.int64)[None, :] * n + rows[:, None]
    mask = (rows < n)[:, None] & (tokens < m)[None, :]
    if SPLITS == 1:
        if HAS_BIAS:
            total += tl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + tl.program_id(2).to(tl.int64) * m * n + at, total, mask=mask)


_BLOCK = Kernel(_block_kernel)


def block_fp8_linear_triton(
    x: Tensor, weight: Tensor, scale: Tensor, block: int, bias: Tensor | None
) -> Tensor:
    """`kubeinfer.kernels.fp8.block_fp8_linear` on CUDA tensors; ``block`` is a power of two of at least 32."""
    m, k = x.shape
    n = weight.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    rows = quantize_blocks_triton(x, block)
    block_m = min(64, max(16, triton.next_power_of_2(m)))
    block_n, num_warps, num_stages = (64, 4, 4) if block_m < 64 else (128, 8, 3)
    tiles = triton.cdiv(n, block_n) * triton.cdiv(m, block_m)
    blocks = triton.cdiv(k, block)
    splits = 1
    while splits < 16 and tiles * splits < _ENOUGH_PROGRAMS and blocks >= 4 * splits:
        splits *= 2
    splits = triton.cdiv(blocks, triton.cdiv(blocks, splits))  # none is empty
    target = out if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    pdl = overlaps_launches()
    _BLOCK.launch(
        (triton.cdiv(n, block_n), triton.cdiv(m, block_m), splits),
        (rows.data, rows.scale, weight, scale, bias if bias is not None else x, target, m, n),
        (k, block, bias is not None, splits, block_m, block_n, pdl),
        num_warps,
        num_stages,
        pdl=pdl,
    )
    return out if splits == 1 else sum_parts(target, bias, out)
