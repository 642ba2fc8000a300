# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc"
"""Triton kernel of `kubeinfer.kernels.fused_linear` for 3 to 32 tokens of large layers: weights stream through all processors.

The work is cut evenly, whatever the number of outputs (stream-K: Osama et al., arXiv 2301.03598): tiles of outputs times steps
over the inputs are one long list, of which each program takes an equal run. The copy engine (TMA) fetches the weights of the
steps to come, across the ends of tiles too, so that the memory never waits. A tile that several programs have parts of is
finished by the first of them, at the end of its run; the others had their parts of it at the beginning of theirs, so it hardly
waits for them (all programs are on the GPU at once). Parts are added in a fixed order.

An RMS norm between two such products has no kernel: the first leaves its result times the norm's weight, and sums of squares of
its tiles, and the second divides its own result by the rows' root mean square.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from kubeinfer.kernels.norm import NormBegun
from kubeinfer.kernels.triton_launch import (
    Kernel,
    all_threads,
    fetch_ahead,
    has_tensor_memory_accelerator,
    overlaps_launches,
    processors,
    shared_memory,
    wait_for_count,
)
from kubeinfer.kernels.triton_split import MAX_TILES, scratch

# Of weights that a program asks for before the kernel before it has ended.
_AHEAD_BYTES = 16 << 10
_AHEAD_BYTES_GATED = 64 << 10
_SHARED_BYTES = 200 << 10  # that a program of the tuned configurations may need


@triton.jit(do_not_specialize=["m", "eps"])
def _stream_kernel(
    x_rows,
    weight_rows,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sums_ptr,
    counter_ptr,
    squares_ptr,
    next_norm_ptr,
    next_scaled_ptr,
    next_squares_ptr,
    m,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_W: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    NORM_PARTS: tl.constexpr,
    NEXT_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNITS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    # A tile's steps are parts of at most so many programs' runs.
    MOST_PARTS: tl.constexpr = (
        1 if STEPS % UNITS == 0 and UNITS == STEPS else (STEPS - 2 + UNITS) // UNITS + 1
    )
    SUMS: tl.constexpr = 2 if GATED else 1
    program = tl.program_id(0)
    begin = program * UNITS
    end = tl.minimum(begin + UNITS, TILES * STEPS)
    first_tile = begin // STEPS
    outputs = tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    if PDL:
        # Weights do not depend on the kernel before this one: bring the first ones near while it ends.
        if AHEAD > 0:
            lines = (begin % STEPS) * BLOCK_K + tl.arange(0, AHEAD) * 64
            near = tl.minimum(first_tile * BLOCK_N + outputs, N - 1).to(tl.int64)[:, None] * STRIDE_W
            near += tl.minimum(lines, K - 64)[None, :]
            fetch_ahead(weight_ptr + near)
            if GATED:
                fetch_ahead(weight_ptr + near + N * STRIDE_W)
        gdc_wait()
        gdc_launch_dependents()
    if NORM_PARTS > 0:
        PADDED: tl.constexpr = triton.next_power_of_2(NORM_PARTS)
        part = tl.arange(0, PADDED)[:, None]
        squares = tl.load(squares_ptr + part * BLOCK_M + tokens[None, :], mask=part < NORM_PARTS, other=0.0)
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for unit in tl.range(begin, end, num_stages=STAGES):
        tile = unit // STEPS
        step = unit % STEPS
        x = x_rows.load([0, step * BLOCK_K])
        w = weight_rows.load([tile * BLOCK_N, step * BLOCK_K])
        acc = tl.dot(w, tl.trans(x), acc)
        if GATED:
            up = weight_rows.load([N + tile * BLOCK_N, step * BLOCK_K])
            acc_up = tl.dot(up, tl.trans(x), acc_up)

        if (step == STEPS - 1) | (unit == end - 1):
            low = tile * STEPS // UNITS  # programs that have parts of this tile
            high = (tile * STEPS + STEPS - 1) // UNITS
            within = outputs[:, None] * BLOCK_M + tokens[None, :]
            if program > low:
                slot = sums_ptr + program * (SUMS * BLOCK_M * BLOCK_N) + within
                tl.store(slot, acc)
                if GATED:
                    tl.store(slot + BLOCK_M * BLOCK_N, acc_up)
                all_threads()  # all of this program's sums are stored before one of its threads counts it
                tl.atomic_add(counter_ptr + tile, 1, sem="release")
            else:
                if MOST_PARTS > 1:  # noqa: SIM102 - the first is known when the kernel is compiled
                    if high > low:
                        wait_for_count(counter_ptr + tile, high - low)
                        all_threads()
                        tl.store(counter_ptr + tile, 0)
                        for i in tl.static_range(1, MOST_PARTS):
                            slot = sums_ptr + (low + i) * (SUMS * BLOCK_M * BLOCK_N) + within
                            mask = (within >= 0) & (low + i <= high)
                            acc += tl.load(slot, mask=mask, other=0.0, cache_modifier=".cg")
                            if GATED:
                                acc_up += tl.load(
                                    slot + BLOCK_M * BLOCK_N, mask=mask, other=0.0, cache_modifier=".cg"
                                )
                columns = tile * BLOCK_N + outputs
                inside = columns < N
                result = acc
                if NORM_PARTS > 0:
                    result *= factor[None, :]
                    acc_up *= factor[None, :]
                if HAS_BIAS:
                    result += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
                    if GATED:
                        acc_up += tl.load(bias_ptr + N + columns, mask=inside, other=0.0).to(tl.float32)[
                            :, None
                        ]
                if GATED:
                    result = result / (1.0 + tl.exp(-result)) * acc_up
                result = tl.trans(result)
                target = out_ptr + tokens[:, None] * STRIDE_OUT + columns[None, :]
                mask = (tokens < m)[:, None] & inside[None, :]
                if ADD:
                    result += tl.load(target, mask=mask, other=0.0).to(tl.float32)
                rounded = result.to(out_ptr.dtype.element_ty)
                tl.store(target, rounded, mask=mask)
                if NEXT_NORM:
                    kept = tl.where(mask, rounded.to(tl.float32), 0.0)
                    scale = tl.load(next_norm_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
                    scaled = next_scaled_ptr + tokens[:, None] * N + columns[None, :]
                    tl.store(scaled, (kept * scale).to(out_ptr.dtype.element_ty), mask=mask)
                    tl.store(next_squares_ptr + tile * BLOCK_M + tokens, tl.sum(kept * kept, 1))
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            acc_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)


_STREAM = Kernel(_stream_kernel)


def streams() -> bool:
    """Whether this GPU has the copy engine, and as much shared memory as the steps in flight take."""
    return has_tensor_memory_accelerator() and shared_memory() >= _SHARED_BYTES


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """Outputs and inputs of a step, warps, steps in flight, and programs a multiprocessor."""

    block_n: int
    block_k: int
    num_warps: int
    stages: int
    per_processor: int


def stream_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: StreamConfig,
    gated: bool = False,
    add: bool = False,
    squares: Tensor | None = None,
    eps: float = 0.0,
    next_norm: Tensor | None = None,
) -> NormBegun | None:
    """As `kubeinfer.kernels.triton_linear.linear_triton` without norm, for up to 64 tokens: ``x [M, K]`` of 16-bit numbers.

    With ``squares``, those of a `NormBegun` whose ``scaled`` is ``x``, of the normed rows. With the weight ``next_norm [N]`` of
    a norm to come, that is begun.
    """
    m, k = x.shape
    n = out.shape[1]
    block_m = max(16, triton.next_power_of_2(m))
    tiles, steps = triton.cdiv(n, config.block_n), triton.cdiv(k, config.block_k)
    units = triton.cdiv(tiles * steps, processors(x.device) * config.per_processor)
    programs = triton.cdiv(tiles * steps, units)
    parts = scratch(x.device)
    needed = programs * block_m * config.block_n * (2 if gated else 1)
    if needed > parts.sums.numel() or tiles > MAX_TILES:
        raise ValueError(f"{config} needs more scratch memory than there is for {n} outputs.")
    pdl = overlaps_launches()
    block = [config.block_n, config.block_k]
    begun = None if next_norm is None else NormBegun.empty(out, tiles, block_m)
    args = (
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [block_m, config.block_k]),
        TensorDescriptor(weight, list(weight.shape), [weight.stride(0), 1], block),
        weight, bias if bias is not None else x, out, parts.sums, parts.counters,
        parts.squares if squares is None else squares, x if next_norm is None else next_norm,
        x if begun is None else begun.scaled, parts.squares if begun is None else begun.squares, m, eps,
    )  # fmt: skip
    rows = config.block_n * (2 if gated else 1)
    ahead = 1 << (max(1, (_AHEAD_BYTES_GATED if gated else _AHEAD_BYTES) // rows // 128).bit_length() - 1)
    constants = (
        n, k, weight.stride(0), out.stride(0), gated, bias is not None, add,
        0 if squares is None else squares.shape[0], begun is not None, block_m, config.block_n, config.block_k, units,
        config.stages, ahead, pdl,
    )  # fmt: skip
    _STREAM.launch((programs, 1, 1), args, constants, config.num_warps, config.stages, pdl=pdl)
    return begun
