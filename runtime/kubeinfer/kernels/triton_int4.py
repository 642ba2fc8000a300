# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc,var-annotated"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Triton kernel of `kubeinfer.kernels.int4` for few tokens, on tensor cores.

On a fast memory such a kernel must spare instructions. Here a code costs seven eighths of a logic instruction: two codes
a time are put into the mantissas of two 16-bit numbers, which are then multiplied by the tensor cores. In bfloat16 these are
128 + q; what that and the group's zero add up to leaves at the group's end, as so many times the sum of the inputs, which is a
product on the tensor cores as well. (float16 would lose bits to its 1,024, which are subtracted before.) Weights are the
left operand and the tokens, padded to eight, the right one. The blocks of `kubeinfer.kernels.int4` are such that every thread
reads its own part of the operands and nothing is moved between threads before the sums at the end.

For that the kernel is written thread by thread: all tensors before the end are ``[32 warps]``, an element a thread, and the
tensor cores are called with inline assembly. The warps of a program share its rows and take the chunks of inputs in turns.

A thread's place in its warp is ``4 g + t``: of the weights it holds rows ``g`` and ``g + 8`` of a tile, of the inputs those of
token ``g``, of the sums rows ``g`` and ``g + 8`` for the tokens ``2 t`` and ``2 t + 1``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels import tuned
from kubeinfer.kernels.int4 import ROWS, Int4Weight
from kubeinfer.kernels.norm import NormBegun, rms_norm
from kubeinfer.kernels.triton_int4_bulk import Int4BulkConfig, find_bulk_config, int4_bulk_triton
from kubeinfer.kernels.triton_int4_bulk import serves as bulk_serves
from kubeinfer.kernels.triton_int4_tile import norm_factors, store_tiles
from kubeinfer.kernels.triton_launch import Kernel, multiplies_thread_by_thread, overlaps_launches
from kubeinfer.kernels.triton_mma import (
    add_squares,
    codes,
    from_thread,
    load2,
    load4,
    mma,
    sum_of_warps,
    times,
)

MAX_ROWS = 32
# Warps that keep the memory of a large GPU busy.
_ENOUGH_WARPS = 2000
# Tiles and groups that a warp takes in a program without a loop: of more the compiler asks for too many at once.
_MOST_UNROLLED = 16


@triton.jit
def split_meta(meta):
    """fp32 scale and minimum."""
    scale = (meta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    minimum = (meta >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def _fetch(
    words_at, meta_at, step, inside, GROUP: tl.constexpr, PLANES: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Words (of each tile: of each plane, four of row g and four of row g + 8) and scales of a chunk."""
    words = ()
    metas = ()
    for r in tl.static_range(len(words_at)):
        at = words_at[r] + step * (WARPS * PLANES * 256)
        for half in tl.static_range(2 * PLANES):
            words = words + load4(at + half * 128, inside, EVEN)
    for r in tl.static_range(len(words_at)):
        at = meta_at[r] + step * (WARPS * (128 // GROUP) * 16)
        for i in tl.static_range(128 // GROUP):
            metas = metas + load2(at + i * 16, inside, EVEN)
    return words, metas


@triton.jit
def _inputs(
    at, step, p: tl.constexpr, left, inside, K: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr
):
    """Of a chunk's product ``p`` of 16: of each of the pointers ``at`` two words of two inputs; zeros past the ``left`` ones."""
    if K % 128 != 0:
        inside = (step * (WARPS * 128) + p * 16 < left).to(tl.int32)
    found = ()
    for i in tl.static_range(len(at)):
        found = found + load2(at[i] + step * (WARPS * 128) + p * 16, inside, EVEN)
    return found


@triton.jit
def _chunk(
    words, metas, xs, norms, x_at, norm_at, step, left, inside, totals, squares,
    K: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, MINIMUMS: tl.constexpr, NORM: tl.constexpr,
    TILES: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, BF16: tl.constexpr, AHEAD: tl.constexpr,
    MORE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add a chunk's products to ``totals`` (four of each tile and eight tokens) and its inputs' to ``squares``.

    Where AHEAD, ``xs`` and ``norms`` are the chunk's inputs, and if there is MORE those of the chunk ``step`` are returned; else
    they are empty, and the chunk is ``step``.
    """
    PER: tl.constexpr = GROUP // 16  # products a group
    # How much the numbers that are multiplied exceed the codes: 128 each in bfloat16, and 128 those of a high and a low plane.
    OFFSET: tl.constexpr = (128.0 if BF16 else 0.0) * (17 if PLANES == 2 else 1) + (
        128.0 if PLANES == 2 else 0.0
    )
    nothing = tl.zeros([words[0].shape[0]], tl.float32)
    one = tl.full([words[0].shape[0]], 0x3F803F80 if BF16 else 0x3C003C00, tl.int32)
    for group in tl.static_range(8 // PER):
        sums = ()
        accs = ()
        for _ in tl.static_range(TOKENS):
            sums = sums + (nothing, nothing, nothing, nothing)
        for _ in tl.static_range(TILES * PLANES * TOKENS):
            accs = accs + (nothing, nothing, nothing, nothing)
        for p in tl.static_range(group * PER, group * PER + PER):
            if AHEAD:
                x, norm = xs[: 2 * TOKENS], norms[:2]
                xs, norms = xs[2 * TOKENS :], norms[2:]
                if MORE:
                    xs = xs + _inputs(x_at, step, p, left, inside, K, WARPS, EVEN)
                if MORE and NORM:
                    norms = norms + _inputs(norm_at, step, p, left, inside, K, WARPS, EVEN)
            else:
                x = _inputs(x_at, step, p, left, inside, K, WARPS, EVEN)
                if NORM:
                    norm = _inputs(norm_at, step, p, left, inside, K, WARPS, EVEN)
            inputs = ()
            for i in tl.static_range(TOKENS):
                b0, b1 = x[2 * i], x[2 * i + 1]
                if NORM:
                    square = add_squares(b0, b1, squares[8 * i : 8 * i + 8])
                    squares = squares[: 8 * i] + square + squares[8 * i + 8 :]
                    b0, b1 = times(b0, norm[0]), times(b1, norm[1])
                found = mma(one, one, one, one, b0, b1, sums[4 * i : 4 * i + 4], BF16)
                sums = sums[: 4 * i] + found + sums[4 * i + 4 :]
                inputs = inputs + (b0, b1)
            for r in tl.static_range(TILES * PLANES):
                word0 = words[r * 8 + p // 2]
                word1 = words[r * 8 + 4 + p // 2]
                a0 = codes(word0 >> (p % 2 * 8), BF16)
                a1 = codes(word1 >> (p % 2 * 8), BF16)
                a2 = codes(word0 >> (p % 2 * 8 + 4), BF16)
                a3 = codes(word1 >> (p % 2 * 8 + 4), BF16)
                for i in tl.static_range(TOKENS):
                    acc = accs[(r * TOKENS + i) * 4 : (r * TOKENS + i) * 4 + 4]
                    acc = mma(a0, a1, a2, a3, inputs[2 * i], inputs[2 * i + 1], acc, BF16)
                    accs = accs[: (r * TOKENS + i) * 4] + acc + accs[(r * TOKENS + i) * 4 + 4 :]
        for r in tl.static_range(TILES):
            scales = ()
            apart = ()  # what a group's inputs count besides, in the unit of the codes where these have zeros
            for half in tl.static_range(2):
                meta = metas[2 * (r * (8 // PER) + group) + half]
                if MINIMUMS:
                    scale, minimum = split_meta(meta)
                    apart = apart + (minimum - scale * OFFSET,)
                else:
                    scale = (meta & -256).to(tl.float32, bitcast=True)
                    apart = apart + (-OFFSET - (meta & 255).to(tl.float32),)
                scales = scales + (scale,)
            for i in tl.static_range(4 * TOKENS):
                acc = accs[r * PLANES * 4 * TOKENS + i]
                if PLANES == 2:
                    acc = acc * 16.0 + accs[(r * 2 + 1) * 4 * TOKENS + i]
                total = totals[r * 4 * TOKENS + i]
                if MINIMUMS:
                    total += acc * scales[i % 4 // 2]
                    total += sums[i] * apart[i % 4 // 2]
                else:
                    total += (acc + sums[i] * apart[i % 4 // 2]) * scales[i % 4 // 2]
                totals = totals[: r * 4 * TOKENS + i] + (total,) + totals[r * 4 * TOKENS + i + 1 :]
    return totals, squares, xs, norms


@triton.jit(do_not_specialize=["m", "n", "eps"])
def _few_kernel(
    x_ptr,
    norm_ptr,
    words_ptr,
    meta_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    eps,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    MINIMUMS: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    # A program has TILES tiles of rows, of a gated layer first TILES / 2 of gates and then theirs of the other half.
    OWN: tl.constexpr = TILES // 2 if GATED else TILES
    STEPS: tl.constexpr = (CHUNKS + WARPS - 1) // WARPS
    EVEN: tl.constexpr = CHUNKS % WARPS == 0
    EVEN_K: tl.constexpr = EVEN and K % 128 == 0
    # Inputs are asked for a chunk ahead, but of many tokens, for which there are no registers; weights DEPTH chunks.
    AHEAD: tl.constexpr = TOKENS <= 2
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    threads = tl.arange(0, 32 * WARPS)
    warp = threads // 32
    place = threads % 32
    last = (n + 15) // 16 - 1
    words_at = ()
    meta_at = ()
    for r in tl.static_range(TILES):
        # Past the last tile it is read again, and nothing of it is kept.
        tile = tl.minimum(tl.program_id(0) * OWN + r % OWN, last)
        if r >= OWN:
            tile += n // 16
        tile = tile.to(tl.int64)
        words_at = words_at + (
            words_ptr + tile * (CHUNKS * PLANES * 256) + warp * (PLANES * 256) + place * 4,
        )
        meta_at = meta_at + (
            meta_ptr + tile * (CHUNKS * (128 // GROUP) * 16) + warp * (128 // GROUP * 16) + place // 4 * 2,
        )
    first = warp * 128 + place % 4 * 4  # of the thread's inputs
    x_at = ()
    for i in tl.static_range(TOKENS):
        token = tl.minimum(place // 4 + 8 * i, m - 1).to(tl.int64)
        x_at = x_at + (x_ptr + token * STRIDE_X + first,)
    norm_at = (norm_ptr + first,)

    words = ()
    metas = ()
    for s in tl.static_range(DEPTH):
        inside = (warp + s * WARPS < CHUNKS).to(tl.int32)
        fetched = _fetch(words_at, meta_at, s, inside, GROUP, PLANES, WARPS, EVEN and s < STEPS)
        words = words + (fetched[0],)
        metas = metas + (fetched[1],)
    xs = ()
    norms = ()
    inside = (warp < CHUNKS).to(tl.int32)
    left = K - first
    if NORM and AHEAD:
        for p in tl.static_range(8):
            norms = norms + _inputs(norm_at, 0, p, left, inside, K, WARPS, EVEN_K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if AHEAD:
        for p in tl.static_range(8):
            xs = xs + _inputs(x_at, 0, p, left, inside, K, WARPS, EVEN_K)

    nothing = tl.zeros([32 * WARPS], tl.float32)
    totals = ()
    squares = ()
    for _ in tl.static_range(4 * TOKENS):
        squares = squares + (nothing, nothing)
        for _ in tl.static_range(TILES):
            totals = totals + (nothing,)
    if UNROLL:
        for s in tl.static_range(STEPS):
            inside = (warp + (s + AHEAD) * WARPS < CHUNKS).to(tl.int32)
            totals, squares, xs, norms = _chunk(
                words[0], metas[0], xs, norms, x_at, norm_at, s + AHEAD, left, inside, totals, squares,
                K, GROUP, PLANES, MINIMUMS, NORM, TILES, TOKENS, WARPS, BF16, AHEAD, s + 1 < STEPS, EVEN_K,
            )  # fmt: skip
            words, metas = words[1:], metas[1:]
            if s + DEPTH < STEPS:
                inside = (warp + (s + DEPTH) * WARPS < CHUNKS).to(tl.int32)
                fetched = _fetch(words_at, meta_at, s + DEPTH, inside, GROUP, PLANES, WARPS, EVEN)
                words = words + (fetched[0],)
                metas = metas + (fetched[1],)
    else:
        for start in range(0, STEPS, DEPTH):
            for d in tl.static_range(DEPTH):
                step = start + d
                if AHEAD:
                    step += 1
                inside = (warp + step * WARPS < CHUNKS).to(tl.int32)
                totals, squares, xs, norms = _chunk(
                    words[d], metas[d], xs, norms, x_at, norm_at, step, left, inside, totals, squares,
                    K, GROUP, PLANES, MINIMUMS, NORM, TILES, TOKENS, WARPS, BF16, AHEAD, True, False,
                )  # fmt: skip
                inside = (warp + (start + d + DEPTH) * WARPS < CHUNKS).to(tl.int32)
                fetched = _fetch(words_at, meta_at, start + d + DEPTH, inside, GROUP, PLANES, WARPS, False)
                words = words[:d] + (fetched[0],) + words[d + 1 :]
                metas = metas[:d] + (fetched[1],) + metas[d + 1 :]

    for i in tl.static_range(TOKENS):
        factors = ()
        if NORM:
            even = from_thread(squares[8 * i] + squares[8 * i + 6], place % 4 * 9)
            odd = from_thread(squares[8 * i + 1] + squares[8 * i + 7], place % 4 * 9 + 4)
            factors = norm_factors(even, odd, eps, K, WARPS)
        sums = ()
        for r in tl.static_range(TILES):
            sums = sums + sum_of_warps(totals[(r * TOKENS + i) * 4 : (r * TOKENS + i) * 4 + 4], WARPS)
        store_tiles(
            sums, factors, bias_ptr, out_ptr, m, n, i * 8, STRIDE_OUT, NORM, GATED, HAS_BIAS, ADD, OWN
        )  # fmt: skip


_FEW = Kernel(_few_kernel)


@dataclass(frozen=True, slots=True)
class Int4Config:
    """Tiles of 16 rows a program (of a gated layer's halves together), warps, chunks of a warp fetched ahead, most registers."""

    tiles: int
    num_warps: int
    depth: int
    registers: int = 0


def layout(weight: Int4Weight) -> tuple[int, int, int, bool]:
    """The kernels' CHUNKS, GROUP, PLANES and MINIMUMS."""
    return weight.words.shape[1], weight.group, weight.bits // 4, weight.minimums


AnyConfig = Int4Config | Int4BulkConfig


def few_config(x: Tensor, weight: Int4Weight, gated: bool) -> AnyConfig | None:
    """How `int4_few_triton` computes it; None where it has no kernel, or cuBLAS on the dequantized weight is faster."""
    if (
        x.shape[0] > MAX_ROWS
        or weight.k % 4
        or (gated and weight.n // 2 % ROWS)
        or not multiplies_thread_by_thread()
    ):
        return None
    n, kind = (weight.n // 2, "gated") if gated else (weight.n, "plain")
    if bulk_serves(x, weight):
        bulk = find_bulk_config(x.shape[0], n, weight.k, kind)
        if bulk is not None:
            return bulk
    config = find_config(x.shape[0], n, weight.k, kind, weight.bits // 4, weight.group)
    return config if config.tiles else None


@functools.cache
def find_config(m: int, n: int, k: int, kind: str, planes: int = 1, group: int = 128) -> Int4Config:
    """``kind`` is ``plain`` or ``gated`` (two rows an output). No tiles: cuBLAS on the dequantized weight is faster."""
    tokens = triton.next_power_of_2(triton.cdiv(m, 8))
    plain = planes == 1 and group == 128
    form = "" if plain else f"/{4 * planes}-{group}"
    found = tuned.lookup("int4", f"{kind}/{n}x{k}/m{8 * tokens}{form}")
    if found is not None:
        return Int4Config(**found)
    if tokens > 2:
        return Int4Config(0, 0, 0)
    chunks = triton.cdiv(k, 128)
    tiles = 2 if kind == "gated" else 1
    # More groups or planes in a chunk take more registers, of which a thread of 16 warps has fewest.
    warps = 4
    while warps < (16 if plain else 8) and triton.cdiv(n, 16) * warps < _ENOUGH_WARPS and chunks > warps:
        warps *= 2
    depth = 4 if plain and tiles * tokens == 1 and warps < 16 else 2
    if planes * tokens > 1 and not plain:
        depth = 1
    return Int4Config(tiles, warps, min(depth, triton.cdiv(chunks, warps)))


def int4_few_triton(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    gated: bool,
    residual: Tensor | None,
    config: AnyConfig,
    begun: NormBegun | None = None,
) -> Tensor:
    """`kubeinfer.kernels.int4.int4_linear` where `few_config` finds a configuration; the weight's order is the inputs'.

    ``norm_weight`` only with bfloat16.
    """
    m, k = x.shape
    n = weight.n // 2 if gated else weight.n
    out = residual if residual is not None else torch.empty(m, n, dtype=x.dtype, device=x.device)
    if isinstance(config, Int4BulkConfig):
        squares = None
        if begun is not None:
            x, squares = begun.scaled, begun.squares
        elif norm_weight is not None:
            x = rms_norm(x, norm_weight, eps)
        int4_bulk_triton(_aligned(x), weight, bias, gated, residual is not None, out, config, squares, eps)
        return out
    x = _aligned(x)
    chunks = weight.words.shape[1]
    steps = triton.cdiv(chunks, config.num_warps)
    tokens = triton.next_power_of_2(triton.cdiv(m, 8))
    pieces = steps * config.tiles * tokens * (128 // weight.group) * (weight.bits // 4)
    pdl = overlaps_launches()
    args = (
        x, norm_weight if norm_weight is not None else x, weight.words, weight.meta, bias if bias is not None else x, out,
        m, n, eps,
    )  # fmt: skip
    constants = (
        k, *layout(weight), x.stride(0), out.stride(0), norm_weight is not None, gated, bias is not None,
        residual is not None, config.tiles, tokens, config.num_warps, min(config.depth, steps), pieces <= _MOST_UNROLLED, pdl,
    )  # fmt: skip
    programs = triton.cdiv(n, ROWS * (config.tiles // 2 if gated else config.tiles))
    _FEW.launch((programs, 1, 1), args, constants, config.num_warps, pdl=pdl, max_registers=config.registers)
    return out


def int4_add_triton(
    residual: Tensor, x: Tensor, weight: Int4Weight, bias: Tensor | None, config: AnyConfig, next_norm: Tensor
) -> NormBegun | None:
    """`int4_few_triton` added to ``residual``; the norm of the sum whose weight is ``next_norm [N]`` is begun, if the kernel can."""
    if isinstance(config, Int4BulkConfig):
        return int4_bulk_triton(_aligned(x), weight, bias, False, True, residual, config, next_norm=next_norm)
    int4_few_triton(x, weight, bias, None, 0.0, False, residual, config)
    return None


def _aligned(x: Tensor) -> Tensor:
    """Rows that are read 8 bytes at a time."""
    if x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 8:
        return x.clone(memory_format=torch.contiguous_format)
    return x
