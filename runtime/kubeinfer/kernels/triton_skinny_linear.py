# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc"
"""Triton kernel of `kubeinfer.kernels.fused_linear` for some tens of tokens: tensor cores at the speed of the weights.

`kubeinfer.kernels.triton_linear` multiplies lane by lane and ends at a few tokens; cuBLAS needs hundreds to be fast, and
leaves norm, activation and addition to kernels of their own. Here a program owns some outputs for all tokens. Where the
outputs alone make too few programs to draw the memory's full speed, the inputs are split as well (``SPLIT_K``): the last
program of an output to end adds the others' sums, in a fixed order, so that the result does not depend on who was last.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.triton_launch import Kernel, fetch_ahead, overlaps_launches
from kubeinfer.kernels.triton_split import MAX_PROGRAMS, scratch


@triton.jit(do_not_specialize=["m", "n", "eps"])
def _skinny_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sums_ptr,
    squares_ptr,
    counter_ptr,
    m,
    n,
    eps,
    K: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_W: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_N: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    STEPS: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)  # of one split
    EVEN_K: tl.constexpr = K % (BLOCK_K * SPLIT_K) == 0
    tile = tl.program_id(0)
    split = tl.program_id(1)
    begin = split * (STEPS * BLOCK_K)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n
    rows = tl.arange(0, BLOCK_M)
    real = rows < m
    lanes = tl.arange(0, BLOCK_K)
    if EVEN_N:
        safe = columns
    else:  # rows past the end are read again from row 0 and never written
        safe = tl.where(inside, columns, 0)
    w_base = weight_ptr + safe.to(tl.int64)[:, None] * STRIDE_W
    up_base = w_base + n.to(tl.int64) * STRIDE_W
    if PDL:
        # Weights do not depend on the kernel before this one: bring the first ones near while it ends.
        if AHEAD > 0:
            lines = begin + tl.arange(0, AHEAD) * 64
            fetch_ahead(w_base + lines[None, :])
            if GATED:
                fetch_ahead(up_base + lines[None, :])
        gdc_wait()
        gdc_launch_dependents()

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        ks = begin + step * BLOCK_K + lanes
        if EVEN_K:
            x = tl.load(x_ptr + rows[:, None] * STRIDE_X + ks[None, :], mask=real[:, None], other=0.0)
            w = tl.load(w_base + ks[None, :], eviction_policy="evict_first")
        else:
            x = tl.load(
                x_ptr + rows[:, None] * STRIDE_X + ks[None, :],
                mask=real[:, None] & (ks < K)[None, :],
                other=0.0,
            )
            w = tl.load(
                w_base + ks[None, :], mask=(ks < K)[None, :], other=0.0, eviction_policy="evict_first"
            )
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            if EVEN_K:
                scale = tl.load(norm_ptr + ks).to(tl.float32)
            else:
                scale = tl.load(norm_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
            x = (wide * scale[None, :]).to(x.dtype)
        acc = tl.dot(x, tl.trans(w), acc)
        if GATED:
            if EVEN_K:
                up = tl.load(up_base + ks[None, :], eviction_policy="evict_first")
            else:
                up = tl.load(
                    up_base + ks[None, :], mask=(ks < K)[None, :], other=0.0, eviction_policy="evict_first"
                )
            acc_up = tl.dot(x, tl.trans(up), acc_up)

    if SPLIT_K > 1:
        SUMS: tl.constexpr = 2 if GATED else 1
        own = (tile * SPLIT_K + split) * (SUMS * BLOCK_M * BLOCK_N)
        within = rows[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(sums_ptr + own + within, acc)
        if GATED:
            tl.store(sums_ptr + own + BLOCK_M * BLOCK_N + within, acc_up)
        if NORM:
            tl.store(squares_ptr + (tile * SPLIT_K + split) * BLOCK_M + rows, squares)
        tl.debug_barrier()  # all of this program's sums are stored before one of its threads counts it
        ended = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        if ended < SPLIT_K - 1:
            return
        tl.store(counter_ptr + tile, 0)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_M], tl.float32)
        for i in tl.static_range(SPLIT_K):
            other = (tile * SPLIT_K + i) * (SUMS * BLOCK_M * BLOCK_N)
            acc += tl.load(sums_ptr + other + within, cache_modifier=".cg")
            if GATED:
                acc_up += tl.load(sums_ptr + other + BLOCK_M * BLOCK_N + within, cache_modifier=".cg")
            if NORM:
                squares += tl.load(squares_ptr + (tile * SPLIT_K + i) * BLOCK_M + rows, cache_modifier=".cg")

    if NORM:
        factor = tl.rsqrt(squares / K + eps)
        acc = acc * factor[:, None]
        acc_up = acc_up * factor[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc_up += tl.load(bias_ptr + n + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    target = out_ptr + rows[:, None] * STRIDE_OUT + columns[None, :]
    mask = real[:, None] & inside[None, :]
    if ADD:
        acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=mask)


_SKINNY = Kernel(_skinny_kernel)


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """Outputs and inputs of a tile, warps, tiles in flight, and how many programs share an output's inputs."""

    block_n: int
    block_k: int
    num_warps: int
    stages: int
    split_k: int


def skinny_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: SkinnyConfig,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add: bool = False,
) -> Tensor:
    """As `kubeinfer.kernels.triton_linear.linear_triton`, for up to 64 tokens: ``x [M, K]`` of 16-bit numbers."""
    m, k = x.shape
    n = out.shape[1]
    tiles = triton.cdiv(n, config.block_n)
    block_m = max(16, triton.next_power_of_2(m))
    if config.split_k > 1:
        parts = scratch(x.device)
        sums, squares, counters = parts.sums, parts.squares, parts.counters
        needed = tiles * config.split_k * block_m * config.block_n * (2 if gated else 1)
        if needed > sums.numel() or tiles * config.split_k > MAX_PROGRAMS:
            raise ValueError(f"{config} needs more scratch memory than there is for {n} outputs.")
    else:
        sums = squares = counters = out
    pdl = overlaps_launches()
    args = (
        x, norm_weight if norm_weight is not None else x, weight, bias if bias is not None else x, out, sums, squares,
        counters, m, n, eps,
    )  # fmt: skip
    # About 32 KiB a program: what the first steps of a full multiprocessor read.
    ahead = max(1, min(16384 // config.block_n, triton.cdiv(k, config.split_k)) // 64)
    ahead = 1 << (ahead.bit_length() - 1)
    constants = (
        k, x.stride(0), weight.stride(0), out.stride(0), norm_weight is not None, gated, bias is not None, add,
        block_m, config.block_n, config.block_k, config.split_k, config.stages, n % config.block_n == 0, ahead, pdl,
    )  # fmt: skip
    _SKINNY.launch((tiles, config.split_k, 1), args, constants, config.num_warps, config.stages, pdl=pdl)
    return out
