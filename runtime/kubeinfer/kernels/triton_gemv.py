# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernel of `kubeinfer.kernels.gemv`: a few weight rows a program, each thread many wide loads in flight.

The first tile of weights is fetched before the kernel waits for the one before it (programmatic dependent launch):
weights never depend on what that computes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels import tuned
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches


@triton.jit(do_not_specialize=["n"])
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    n,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    inside = (rows < n)[:, None]
    base = weight_ptr + rows.to(tl.int64)[:, None] * STRIDE + lanes[None, :]
    w = tl.load(base, mask=inside & (lanes < K)[None, :], other=0.0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        x = tl.load(x_ptr + start + lanes, mask=start + lanes < K, other=0.0).to(tl.float32)
        wide = w.to(tl.float32)
        if start + BLOCK_K < K:
            ahead = start + BLOCK_K
            mask = inside & (ahead + lanes < K)[None, :]
            w = tl.load(base + ahead, mask=mask, other=0.0, eviction_policy="evict_first")
        acc += wide * x[None, :]
    result = tl.sum(acc, 1)
    if HAS_BIAS:
        result += tl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, result.to(out_ptr.dtype.element_ty), mask=rows < n)


_GEMV = Kernel(_gemv_kernel)


@functools.cache
def _config(n: int, k: int) -> tuple[int, int, int]:
    """``BLOCK_N``, ``BLOCK_K`` and warps."""
    found = tuned.lookup("gemv", f"{n}x{k}")
    if found is not None:
        return found["block_n"], found["block_k"], found["num_warps"]
    if k <= 1024:
        return (2, 1024, 4) if n < 1024 else (4, 1024, 4)
    if k > 8192:
        return 1, 4096, 4
    return 4, 1024, 2


def gemv_triton(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """`kubeinfer.kernels.gemv.gemv` on CUDA tensors."""
    n, k = weight.shape
    if out is None:
        out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    block_n, block_k, num_warps = _config(n, k)
    pdl = overlaps_launches()
    _GEMV.launch(
        (triton.cdiv(n, block_n), 1, 1),
        (x, weight, bias if bias is not None else x, out, n),
        (k, weight.stride(0), block_n, block_k, bias is not None, pdl),
        num_warps,
        pdl=pdl,
    )
    return out
