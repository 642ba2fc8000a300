# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc,var-annotated"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Triton kernel of `kubeinfer.kernels.fused_linear` for 2 to 8 tokens: small programs that flow from kernel to kernel.

A program owns a tile of 16 rows of the weight for all tokens and sums whole rows on the tensor cores; of a gated layer that is 8
rows of gates and theirs of the other half. Programs are small and many, and hold their first weights in registers before they
wait for the kernel before them: when that ends, the memory is already busy for this one.

The kernel is written thread by thread (`kubeinfer.kernels.triton_mma`): weights are the left operand, and tokens, padded to
eight, the right one. A thread's place in its warp is ``4 g + t``: of the weights it holds rows ``g`` and ``g + 8`` of the tile, of
the inputs those of token ``g``, of the sums rows ``g`` and ``g + 8`` for the tokens ``2 t`` and ``2 t + 1``. The order of the
inputs within a product is free if both operands have the same: of a block of 32 inputs thread ``t`` takes the 8 from ``8 t`` on,
which are 16 bytes of a row as it lies in memory, and nothing is moved between threads before the sums at the end. The warps of a
program take chunks of two such blocks in turns.

Norms between products are begun and ended as in `kubeinfer.kernels.triton_stream_linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.norm import NormBegun
from kubeinfer.kernels.triton_launch import Kernel, fetch_ahead, overlaps_launches
from kubeinfer.kernels.triton_mma import from_thread, load2, mma, read4, stream4, sum_of_warps

MAX_TOKENS = 8


@triton.jit
def _fetch(
    bases, step, left, ALWAYS: tl.constexpr, STRIDE_W: tl.constexpr, GATED: tl.constexpr, EVEN_N: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Weights of a chunk: of each block of 32 inputs four words of row g and four of row g + 8; zeros past the end."""
    moved = ()
    for i in tl.static_range(len(bases)):
        moved = moved + (bases[i] + step * WIDTH,)
    words = ()
    for b in tl.static_range(2):
        for half in tl.static_range(2):
            if GATED or not EVEN_N:
                at = moved[half] + b * 32
            else:  # rows of whole tiles are at a distance known here, so that the second needs no pointer of its own
                at = moved[0] + (half * 8 * STRIDE_W + b * 32)
            inside = (step * WIDTH + b * 32 < left).to(tl.int32)
            words = words + stream4(at, inside, ALWAYS)
    return words


@triton.jit
def _inputs(at, step, left, ALWAYS: tl.constexpr, WIDTH: tl.constexpr):
    """Inputs of a chunk: of each block four words; zeros past the end."""
    found = ()
    for b in tl.static_range(2):
        inside = (step * WIDTH + b * 32 < left).to(tl.int32)
        found = found + read4(at + step * WIDTH + b * 32, inside, ALWAYS)
    return found


@triton.jit
def _add_products(words, x, sums, BF16: tl.constexpr):
    """``sums`` (four a thread) plus a chunk's products."""
    for b in tl.static_range(2):
        for p in tl.static_range(2):
            low = words[b * 8 : b * 8 + 4]
            high = words[b * 8 + 4 : b * 8 + 8]
            b0, b1 = x[b * 4 + 2 * p], x[b * 4 + 2 * p + 1]
            sums = mma(low[2 * p], high[2 * p], low[2 * p + 1], high[2 * p + 1], b0, b1, sums, BF16)
    return sums


@triton.jit
def _squares(at, threads, PARTS: tl.constexpr, STRIDE: tl.constexpr, WARPS: tl.constexpr):
    """Of the tokens 2 t and 2 t + 1 the sums of the parts of a thread's turn: together the rows' sums of squares."""
    even = tl.zeros([32 * WARPS], tl.float32)
    odd = even
    for turn in tl.static_range((PARTS + WARPS * 8 - 1) // (WARPS * 8)):
        part = turn * (WARPS * 8) + threads // 4
        inside = (part < PARTS).to(tl.int32)
        # The last turn may be of fewer.
        pair = load2(at + part * STRIDE + threads % 4 * 2, inside, (turn + 1) * (WARPS * 8) <= PARTS)
        even += pair[0].to(tl.float32, bitcast=True)
        odd += pair[1].to(tl.float32, bitcast=True)
    return even, odd


@triton.jit
def _over_rows(values, place):
    """The sum of a warp's threads of the same tokens, in each of them."""
    for i in tl.static_range(3):
        values += from_thread(values, place ^ (4 << i))
    return values


@triton.jit
def _outputs(out_ptr, program, lanes, m, n, STRIDE_OUT: tl.constexpr, OWN: tl.constexpr):
    """What the outputs were before: of each eight rows of the tile those of tokens 2 t and 2 t + 1."""
    found = ()
    for half in tl.static_range(OWN // 8):
        for e in tl.static_range(2):
            column = program * OWN + half * 8 + lanes // 4
            token = lanes % 4 * 2 + e
            at = out_ptr + token.to(tl.int64) * STRIDE_OUT + column
            inside = (column < n) & (token < m)
            found = found + (tl.load(at, mask=inside, other=0.0).to(tl.float32),)
    return found


@triton.jit(do_not_specialize=["m", "n", "eps"])
def _few_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    squares_ptr,
    next_norm_ptr,
    next_scaled_ptr,
    next_squares_ptr,
    m,
    n,
    eps,
    K: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_W: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    NORM_PARTS: tl.constexpr,
    STRIDE_SQUARES: tl.constexpr,
    NEXT_NORM: tl.constexpr,
    STRIDE_NEXT_SQUARES: tl.constexpr,
    EVEN_N: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    WIDTH: tl.constexpr = WARPS * 64  # inputs of a step
    STEPS: tl.constexpr = (K + WIDTH - 1) // WIDTH
    FULL: tl.constexpr = K // WIDTH  # whole steps
    # The loop's steps, DEPTH in an iteration, all of which fetch whole steps; the others are written out.
    LOOPED: tl.constexpr = 0 if FULL < 2 * DEPTH else (FULL - DEPTH) // DEPTH * DEPTH
    OWN: tl.constexpr = 8 if GATED else 16  # outputs of a tile
    HALVES: tl.constexpr = OWN // 8
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    program = tl.program_id(0)
    threads = tl.arange(0, 32 * WARPS)
    warp = threads // 32
    place = threads % 32
    first = warp * 64 + place % 4 * 8  # of the thread's inputs
    left = K - first
    bases = ()
    if EVEN_N:
        row = (program * OWN + place // 4).to(tl.int64)
        bases = bases + (weight_ptr + row * STRIDE_W + first,)
        if GATED:
            bases = bases + (weight_ptr + (row + n) * STRIDE_W + first,)
    else:
        for half in tl.static_range(2):
            # Past the last row that is read again, and nothing of it is kept.
            row = program * OWN + place // 4
            if GATED:
                row = tl.minimum(row, n - 1) + half * n
            else:
                row = tl.minimum(row + half * 8, n - 1)
            bases = bases + (weight_ptr + row.to(tl.int64) * STRIDE_W + first,)
    x_at = x_ptr + tl.minimum(place // 4, m - 1).to(tl.int64) * STRIDE_X + first

    words = ()
    for s in tl.static_range(DEPTH):
        words = words + (_fetch(bases, s, left, s < FULL, STRIDE_W, GATED, EVEN_N, WIDTH),)
    if PDL:
        if HAS_BIAS:
            own = tl.minimum(program * OWN, n - 1)
            fetch_ahead(bias_ptr + own)
            if GATED:
                fetch_ahead(bias_ptr + n + own)
        gdc_wait()
        gdc_launch_dependents()
    xs = _inputs(x_at, 0, left, FULL > 0, WIDTH)
    nothing = tl.zeros([32 * WARPS], tl.float32)
    squares = ()
    if NORM_PARTS > 0:
        squares = _squares(squares_ptr, threads, NORM_PARTS, STRIDE_SQUARES, WARPS)

    # Inputs are asked for a step ahead, weights DEPTH steps.
    sums = (nothing, nothing, nothing, nothing)
    for start in range(0, LOOPED, DEPTH):
        for d in tl.static_range(DEPTH):
            x = xs
            xs = _inputs(x_at, start + d + 1, left, True, WIDTH)
            sums = _add_products(words[d], x, sums, BF16)
            fetched = _fetch(bases, start + d + DEPTH, left, True, STRIDE_W, GATED, EVEN_N, WIDTH)
            words = words[:d] + (fetched,) + words[d + 1 :]
    for s in tl.static_range(LOOPED, STEPS):
        x = xs
        if s + 1 < STEPS:
            xs = _inputs(x_at, s + 1, left, s + 1 < FULL, WIDTH)
        sums = _add_products(words[0], x, sums, BF16)
        words = words[1:]
        if s + DEPTH < STEPS:
            words = words + (
                _fetch(bases, s + DEPTH, left, s + DEPTH < FULL, STRIDE_W, GATED, EVEN_N, WIDTH),
            )

    # Of a thread's place: outputs in rows g and, unless these are the other half of a gated layer, g + 8. What is added to them is
    # asked for before the warps meet.
    lanes = tl.arange(0, 32)
    biases = ()
    scales = ()
    for half in tl.static_range(2):
        column = program * OWN + lanes // 4
        if HAS_BIAS:
            row = column + half * (n if GATED else 8)
            inside = (column if GATED else row) < n
            biases = biases + (tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32),)
        if half < HALVES:
            column += half * 8
            if NEXT_NORM:
                scale = tl.load(next_norm_ptr + column, mask=column < n, other=0.0)
                scales = scales + (scale.to(tl.float32),)
    if ADD:
        before = _outputs(out_ptr, program, lanes, m, n, STRIDE_OUT, OWN)
    if NORM_PARTS > 0:
        sums = sums + (_over_rows(squares[0], place), _over_rows(squares[1], place))
    results = sum_of_warps(sums, WARPS)
    for e in tl.static_range(2):
        token = lanes % 4 * 2 + e
        if NORM_PARTS > 0:
            factor = tl.rsqrt(results[4 + e] / K + eps)
        square = tl.zeros([32], tl.float32)
        for half in tl.static_range(HALVES):
            result = results[half * 2 + e]
            if NORM_PARTS > 0:
                result *= factor
            if HAS_BIAS:
                result += biases[half]
            if GATED:
                up = results[2 + e]
                if NORM_PARTS > 0:
                    up *= factor
                if HAS_BIAS:
                    up += biases[1]
                result = result / (1.0 + tl.exp(-result)) * up
            if ADD:
                result += before[half * 2 + e]
            column = program * OWN + half * 8 + lanes // 4
            inside = (column < n) & (token < m)
            rounded = result.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + token.to(tl.int64) * STRIDE_OUT + column, rounded, mask=inside)
            if NEXT_NORM:
                kept = tl.where(inside, rounded.to(tl.float32), 0.0)
                square += kept * kept
                kept = (kept * scales[half]).to(out_ptr.dtype.element_ty)
                tl.store(next_scaled_ptr + token.to(tl.int64) * n + column, kept, mask=inside)
        if NEXT_NORM:
            square = _over_rows(square, lanes)
            tl.store(next_squares_ptr + program * STRIDE_NEXT_SQUARES + token, square, mask=lanes < 4)


_FEW_LINEAR = Kernel(_few_linear_kernel)


@dataclass(frozen=True, slots=True)
class FewConfig:
    """Warps a program, and chunks of 64 inputs that a warp fetches ahead."""

    num_warps: int
    ahead: int


def _aligned(x: Tensor) -> Tensor:
    """Rows that are read 16 bytes at a time."""
    if x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(1) != 1:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def few_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: FewConfig,
    gated: bool = False,
    add: bool = False,
    squares: Tensor | None = None,
    eps: float = 0.0,
    next_norm: Tensor | None = None,
) -> NormBegun | None:
    """As `kubeinfer.kernels.triton_linear.linear_triton` without norm, for up to 8 tokens: ``x [M, K]`` of 16-bit numbers.

    With ``squares``, those of a `NormBegun` whose ``scaled`` is ``x``, of the normed rows. With the weight ``next_norm [N]`` of
    a norm to come, that is begun.
    """
    m, k = x.shape
    n = out.shape[1]
    if m > MAX_TOKENS or k % 8:
        raise ValueError(
            f"{m} tokens of {k} inputs: this kernel takes up to {MAX_TOKENS}, and multiples of 8."
        )
    x, weight = _aligned(x), _aligned(weight)
    outputs = 8 if gated else 16
    programs = triton.cdiv(n, outputs)
    # Of as many columns as the kernel that takes runs of tiles expects.
    begun = None if next_norm is None else NormBegun.empty(out, programs, 16)
    pdl = overlaps_launches()
    args = (
        x, weight, bias if bias is not None else x, out, x if squares is None else squares,
        x if next_norm is None else next_norm, x if begun is None else begun.scaled, x if begun is None else begun.squares,
        m, n, eps,
    )  # fmt: skip
    constants = (
        k, x.stride(0), weight.stride(0), out.stride(0), gated, bias is not None, add,
        0 if squares is None else squares.shape[0], 0 if squares is None else squares.stride(0), begun is not None,
        0 if begun is None else begun.squares.stride(0), n % outputs == 0, config.num_warps,
        min(config.ahead, triton.cdiv(k, 64 * config.num_warps)), pdl,
    )  # fmt: skip
    _FEW_LINEAR.launch((programs, 1, 1), args, constants, config.num_warps, pdl=pdl)
    return begun
