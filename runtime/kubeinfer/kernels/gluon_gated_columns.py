# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Gluon kernel of `kubeinfer.kernels.fused_linear` for some tens of tokens on Hopper: a gated product as fast as its weights are read.

The outputs are shared out evenly: a program has its own, of all tokens, and sums whole rows. So no sums go from one program to
another, and all end together. A warp has the copy engine (TMA) bring the operands of the steps to come into a ring in shared memory;
a warpgroup for each 64 tokens multiplies what is there. An even share is seldom a power of two, which the language wants: it is the
sum of two of them, each with sums of its own.

An RMS norm that the product before began is ended here, as in `kubeinfer.kernels.triton_stream_linear`.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kubeinfer.kernels.gluon_bulk import wait_for_kernel_before
from kubeinfer.kernels.gluon_gate import activated, halves, with_bias
from kubeinfer.kernels.linear import MAX_TENS_ROWS
from kubeinfer.kernels.triton_launch import Kernel, processors, shared_memory
from kubeinfer.kernels.triton_linear import ColumnsConfig

_ROWS = 64  # tokens of a warpgroup
_BLOCK_K = 64
_OTHER_BYTES = 2048  # of shared memory: barriers, and the compiler's own
# A thread's, by warpgroups that multiply: shared out evenly when the kernel starts, but then the producer gives up most of its own.
_REGISTERS = {1: 160, 2: 168}


@gluon.jit
def _fetch_both(w_rows, place, barrier, column, k, N: gl.constexpr):
    """Gates from ``column`` on, and behind them theirs ups."""
    COUNT: gl.constexpr = place.shape[0] // 2
    tma.async_copy_global_to_shared(w_rows, [column, k], barrier, place.slice(0, COUNT))
    tma.async_copy_global_to_shared(w_rows, [N + column, k], barrier, place.slice(COUNT, COUNT))


@gluon.jit
def _fetch_weights(large_rows, small_rows, ring, at, column, k, N: gl.constexpr, SMALL: gl.constexpr):
    _, large, small, ready, _ = ring
    _fetch_both(large_rows, large.index(at), ready.index(at), column, k, N)
    if SMALL > 0:
        _fetch_both(small_rows, small.index(at), ready.index(at), column + large.shape[1] // 2, k, N)


@gluon.jit
def _fetch_tokens(x_rows, ring, at, k, GROUPS: gl.constexpr):
    x, _, _, ready, _ = ring
    for group in gl.static_range(GROUPS):
        place = x.index(at * GROUPS + group)
        tma.async_copy_global_to_shared(x_rows, [group * x.shape[1], k], ready.index(at), place)


@gluon.jit
def _produce(
    x_rows, large_rows, small_rows, ring, N: gl.constexpr, STEPS: gl.constexpr, TILES: gl.constexpr,
    SMALL: gl.constexpr,
):  # fmt: skip
    x, large, _, ready, free = ring
    STAGES: gl.constexpr = large.shape[0]
    GROUPS: gl.constexpr = x.shape[0] // STAGES
    BLOCK_K: gl.constexpr = x.shape[2]
    WIDTH: gl.constexpr = large.shape[1] // 2 + SMALL
    SMALL_BYTES: gl.constexpr = 2 * small_rows.block_type.nbytes if SMALL > 0 else 0
    BYTES: gl.constexpr = GROUPS * x_rows.block_type.nbytes + 2 * large_rows.block_type.nbytes + SMALL_BYTES
    AHEAD: gl.constexpr = min(STEPS, STAGES)
    # Weights do not depend on the kernel before this one.
    for i in gl.static_range(AHEAD):
        mbarrier.expect(ready.index(i), BYTES)
        _fetch_weights(large_rows, small_rows, ring, i, gl.program_id(0) * WIDTH, i * BLOCK_K, N, SMALL)
    wait_for_kernel_before(gl.program_id(0))
    for i in gl.static_range(AHEAD):
        _fetch_tokens(x_rows, ring, i, i * BLOCK_K, GROUPS)
    count = 0
    for tile in range(gl.program_id(0), TILES, gl.num_programs(0)):
        for step in range(STEPS):
            if count >= AHEAD:
                at = count % STAGES
                # The first round waits for the phase before a barrier's first, which counts as over.
                mbarrier.wait(free.index(at), (count // STAGES & 1) ^ 1)
                mbarrier.expect(ready.index(at), BYTES)
                _fetch_weights(large_rows, small_rows, ring, at, tile * WIDTH, step * BLOCK_K, N, SMALL)
                _fetch_tokens(x_rows, ring, at, step * BLOCK_K, GROUPS)
            count += 1


@gluon.jit
def _zeros(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    return gl.zeros([ROWS, COLUMNS], gl.float32, L)


@gluon.jit
def _gate_and_store(
    sums, out_ptr, bias_ptr, factor, column, row, m, N: gl.constexpr, STRIDE_OUT: gl.constexpr, HAS_BIAS: gl.constexpr,
    NORMED: gl.constexpr,
):  # fmt: skip
    """Of ``sums`` the left half is gates from ``column`` on, the right half theirs ups."""
    ROWS: gl.constexpr = sums.shape[0]
    WIDTH: gl.constexpr = sums.shape[1] // 2
    gate, up = halves(sums)
    L: gl.constexpr = gate.type.layout
    columns = column + gl.arange(0, WIDTH, gl.SliceLayout(0, L))
    tokens = row + gl.arange(0, ROWS, gl.SliceLayout(1, L))
    if NORMED:
        scale = gl.convert_layout(factor, gl.SliceLayout(1, L), assert_trivial=True)[:, None]
        gate *= scale
        up *= scale
    if HAS_BIAS:
        gate = with_bias(gate, bias_ptr, column, N)
        up = with_bias(up, bias_ptr + N, column, N)
    result = activated(gate, up)
    at = out_ptr + tokens[:, None] * STRIDE_OUT + columns[None, :]
    gl.store(at, result.to(out_ptr.dtype.element_ty), mask=(tokens < m)[:, None] & (columns < N)[None, :])


@gluon.jit
def _consume(
    out_ptr, bias_ptr, squares_ptr, m, eps, ring, N: gl.constexpr, K: gl.constexpr, STEPS: gl.constexpr, TILES: gl.constexpr,
    SMALL: gl.constexpr, STRIDE_OUT: gl.constexpr, HAS_BIAS: gl.constexpr, NORM_PARTS: gl.constexpr,
    STRIDE_SQUARES: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """The tokens of one warpgroup."""
    x, large, small, ready, free = ring
    STAGES: gl.constexpr = large.shape[0]
    GROUPS: gl.constexpr = x.shape[0] // STAGES
    ROWS: gl.constexpr = x.shape[1]
    LARGE: gl.constexpr = large.shape[1] // 2
    wait_for_kernel_before(gl.program_id(0))
    zeros = _zeros(ROWS, 2 * LARGE)
    zeros_small = _zeros(ROWS, 2 * SMALL if SMALL > 0 else 16)
    factor = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, zeros.type.layout))
    if NORM_PARTS > 0:
        token = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, zeros.type.layout))
        for part in range(NORM_PARTS):
            factor += gl.load(squares_ptr + part * STRIDE_SQUARES + token, mask=token < m, other=0.0)
        factor = gl.rsqrt(factor / K + eps)
    count = 0
    for tile in range(gl.program_id(0), TILES, gl.num_programs(0)):
        sums = zeros
        sums_small = zeros_small
        for step in range(STEPS):
            at = count % STAGES
            mbarrier.wait(ready.index(at), count // STAGES & 1)
            tokens = x.index(at * GROUPS + PART)
            sums = warpgroup_mma(tokens, large.index(at).permute((1, 0)), sums, is_async=True)
            if SMALL > 0:
                sums_small = warpgroup_mma(tokens, small.index(at).permute((1, 0)), sums_small, is_async=True)
                sums, sums_small = warpgroup_mma_wait(2, deps=(sums, sums_small))
            else:
                sums = warpgroup_mma_wait(1, deps=(sums,))
            # The step before has been multiplied.
            mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), pred=step > 0)
            count += 1
        if SMALL > 0:
            sums, sums_small = warpgroup_mma_wait(0, deps=(sums, sums_small))
        else:
            sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index((count + STAGES - 1) % STAGES))
        column = tile * (LARGE + SMALL)
        row = PART * ROWS
        NORMED: gl.constexpr = NORM_PARTS > 0
        _gate_and_store(sums, out_ptr, bias_ptr, factor, column, row, m, N, STRIDE_OUT, HAS_BIAS, NORMED)
        if SMALL > 0:
            _gate_and_store(
                sums_small, out_ptr, bias_ptr, factor, column + LARGE, row, m, N, STRIDE_OUT, HAS_BIAS, NORMED
            )


@gluon.jit(do_not_specialize=["m", "eps"])
def _columns_kernel(
    x_rows,
    large_rows,
    small_rows,
    out_ptr,
    bias_ptr,
    squares_ptr,
    m,
    eps,
    N: gl.constexpr,
    K: gl.constexpr,
    STRIDE_OUT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NORM_PARTS: gl.constexpr,
    STRIDE_SQUARES: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    LARGE: gl.constexpr,
    SMALL: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    DTYPE: gl.constexpr = x_rows.dtype
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILES: gl.constexpr = (N + LARGE + SMALL - 1) // (LARGE + SMALL)
    LAYOUT: gl.constexpr = x_rows.layout
    x = gl.allocate_shared_memory(DTYPE, [STAGES * GROUPS, ROWS, BLOCK_K], LAYOUT)
    large = gl.allocate_shared_memory(DTYPE, [STAGES, 2 * LARGE, BLOCK_K], LAYOUT)
    # Where a share is one power of two, this is never used.
    small = gl.allocate_shared_memory(
        DTYPE, [STAGES if SMALL > 0 else 1, 2 * SMALL if SMALL > 0 else 8, BLOCK_K], LAYOUT
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()
    ring = (x, large, small, ready, free)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        out_ptr, bias_ptr, squares_ptr, m, eps, ring, N, K, STEPS, TILES, SMALL, STRIDE_OUT, HAS_BIAS,
                        NORM_PARTS, STRIDE_SQUARES, 0,
                    ),
                ),
                (_produce, (x_rows, large_rows, small_rows, ring, N, STEPS, TILES, SMALL)),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        out_ptr, bias_ptr, squares_ptr, m, eps, ring, N, K, STEPS, TILES, SMALL, STRIDE_OUT, HAS_BIAS,
                        NORM_PARTS, STRIDE_SQUARES, 0,
                    ),
                ),
                (
                    _consume,
                    (
                        out_ptr, bias_ptr, squares_ptr, m, eps, ring, N, K, STEPS, TILES, SMALL, STRIDE_OUT, HAS_BIAS,
                        NORM_PARTS, STRIDE_SQUARES, 1,
                    ),
                ),
                (_produce, (x_rows, large_rows, small_rows, ring, N, STEPS, TILES, SMALL)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


_COLUMNS = Kernel(_columns_kernel)


@functools.cache
def share(n: int, programs: int) -> tuple[int, int]:
    """Outputs of a program as a sum of two powers of two, the second possibly 0; the fewest that are enough for ``n``."""
    rounds = triton.cdiv(n, programs * 160)
    least = triton.cdiv(n, programs * rounds)
    sums = [(a, b) for a in (8, 16, 32, 64, 128) for b in (0, 8, 16, 32) if b < a and a + b >= least]
    return min(sums, key=lambda pair: (sum(pair), pair[1]), default=(128, 32))


def fits(n: int, m: int, config: ColumnsConfig) -> bool:
    """Whether a program's shared memory holds the steps under way, of ``n`` outputs and ``m`` tokens."""
    if m > MAX_TENS_ROWS:
        return False
    step = (
        2 * _BLOCK_K * (2 * sum(share(n, processors(torch.device("cuda")))) + _ROWS * triton.cdiv(m, _ROWS))
    )
    return config.in_flight * step + _OTHER_BYTES <= shared_memory()


def gated_columns_gluon(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: ColumnsConfig,
    squares: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """``out = silu(gate) * up`` of ``x @ weight.T + bias``, summed and gated in fp32; returns ``out``.

    Args:
        x: ``[T, K]`` of 16-bit numbers, T from 1 to 128.
        weight: ``[2 N, K]`` in ``x``'s dtype, gates first; N and K multiples of 8.
        bias: ``[2 N]`` in ``x``'s dtype.
        out: ``[T, N]`` in ``x``'s dtype.
        squares: those of a `NormBegun` whose ``scaled`` is ``x``, of rows that are normed.

    Rows of ``x`` and ``weight`` are contiguous and begin at multiples of 16 bytes.
    """
    m, k = x.shape
    n = out.shape[1]
    if m > MAX_TENS_ROWS:
        raise ValueError(f"{m} tokens: this kernel takes up to {MAX_TENS_ROWS}.")
    if config.in_flight < 2:  # a step's place is free when the next has been multiplied
        raise ValueError(f"{config}: at least two steps are under way.")
    groups = triton.cdiv(m, _ROWS)
    programs = processors(x.device)
    large, small = share(n, programs)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    args = (
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [_ROWS, _BLOCK_K], layout),
        TensorDescriptor(weight, [2 * n, k], [weight.stride(0), 1], [large, _BLOCK_K], layout),
        TensorDescriptor(weight, [2 * n, k], [weight.stride(0), 1], [small or 8, _BLOCK_K], layout),
        out, x if bias is None else bias, x if squares is None else squares, m, eps,
    )  # fmt: skip
    constants = (
        n, k, out.stride(0), bias is not None, 0 if squares is None else squares.shape[0],
        0 if squares is None else squares.stride(0), groups, _ROWS, large, small, _BLOCK_K, config.in_flight,
    )  # fmt: skip
    grid = (min(programs, triton.cdiv(n, large + small)), 1, 1)
    _COLUMNS.launch(grid, args, constants, num_warps=4, pdl=True, max_registers=_REGISTERS[groups])
    return out
