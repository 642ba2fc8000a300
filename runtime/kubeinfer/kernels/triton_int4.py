# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc,var-annotated"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Triton kernel of `kubeinfer.kernels.int4` for few tokens, on tensor cores; weights on their way wait in registers.

Products and places of threads are those of `kubeinfer.kernels.triton_int4_chunk`.
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
from kubeinfer.kernels.norm import rms_norm
from kubeinfer.kernels.triton_int4_chunk import add_chunk, inputs_of, sum_of_warps
from kubeinfer.kernels.triton_int4_stream import int4_stream_triton, stream_bytes
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches
from kubeinfer.kernels.triton_mma import from_thread, load2, load4

MAX_ROWS = 32
# Warps that keep the memory of a large GPU busy.
_ENOUGH_WARPS = 2000
# Tiles and groups that a warp takes in a program without a loop: of more the compiler asks for too many at once.
_MOST_UNROLLED = 16


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
            norms = norms + inputs_of(norm_at, 0, p, left, inside, K, WARPS, EVEN_K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if AHEAD:
        for p in tl.static_range(8):
            xs = xs + inputs_of(x_at, 0, p, left, inside, K, WARPS, EVEN_K)

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
            totals, squares, xs, norms = add_chunk(
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
                totals, squares, xs, norms = add_chunk(
                    words[d], metas[d], xs, norms, x_at, norm_at, step, left, inside, totals, squares,
                    K, GROUP, PLANES, MINIMUMS, NORM, TILES, TOKENS, WARPS, BF16, AHEAD, True, False,
                )  # fmt: skip
                inside = (warp + (start + d + DEPTH) * WARPS < CHUNKS).to(tl.int32)
                fetched = _fetch(words_at, meta_at, start + d + DEPTH, inside, GROUP, PLANES, WARPS, False)
                words = words[:d] + (fetched[0],) + words[d + 1 :]
                metas = metas[:d] + (fetched[1],) + metas[d + 1 :]

    lanes = tl.arange(0, 32)
    for i in tl.static_range(TOKENS):
        factors = ()
        if NORM:
            even = from_thread(squares[8 * i] + squares[8 * i + 6], place % 4 * 9)
            odd = from_thread(squares[8 * i + 1] + squares[8 * i + 7], place % 4 * 9 + 4)
            both = sum_of_warps((even, odd), WARPS)
            factors = (tl.rsqrt(both[0] / K + eps), tl.rsqrt(both[1] / K + eps))
        sums = ()
        for r in tl.static_range(TILES):
            sums = sums + sum_of_warps(totals[(r * TOKENS + i) * 4 : (r * TOKENS + i) * 4 + 4], WARPS)
        for r in tl.static_range(OWN):
            for e in tl.static_range(4):
                row = (tl.program_id(0) * OWN + r) * 16 + e // 2 * 8 + lanes // 4
                token = i * 8 + lanes % 4 * 2 + e % 2
                inside = (row < n) & (token < m)
                result = sums[r * 4 + e]
                if NORM:
                    result *= factors[e % 2]
                if HAS_BIAS:
                    result += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)
                if GATED:
                    up = sums[(OWN + r) * 4 + e]
                    if NORM:
                        up *= factors[e % 2]
                    if HAS_BIAS:
                        up += tl.load(bias_ptr + n + row, mask=row < n, other=0.0).to(tl.float32)
                    result = result / (1.0 + tl.exp(-result)) * up
                target = out_ptr + token.to(tl.int64) * STRIDE_OUT + row
                if ADD:
                    result += tl.load(target, mask=inside, other=0.0).to(tl.float32)
                tl.store(target, result.to(out_ptr.dtype.element_ty), mask=inside)


_FEW = Kernel(_few_kernel)


@dataclass(frozen=True, slots=True)
class Int4Config:
    """Tiles of 16 rows a program (of a gated layer's halves together), warps, chunks of a warp fetched ahead, most registers.

    Of up to eight tokens, with ``stages`` the weights on their way wait in shared memory, of so many steps less one
    (`kubeinfer.kernels.triton_int4_stream`); inputs are asked for a step ahead with ``depth`` 2, and ``per_processor`` programs a multiprocessor
    share the work evenly (0: each has tiles of its own). With ``norm_apart`` (1) another kernel makes the norm; with
    ``subnormal`` (1) codes are multiplied as subnormal bfloat16 numbers, which takes fewer instructions.
    """

    tiles: int
    num_warps: int
    depth: int
    registers: int = 0
    stages: int = 0
    per_processor: int = 0
    norm_apart: int = 0
    subnormal: int = 0


def layout(weight: Int4Weight) -> tuple[int, int, int, bool]:
    """The kernels' CHUNKS, GROUP, PLANES and MINIMUMS."""
    return weight.words.shape[1], weight.group, weight.bits // 4, weight.minimums


@functools.cache
def _has_tensor_cores() -> bool:
    """Those whose product of 16 x 8 x 16 is used here, of Ampere and later. (In the interpreter there is no GPU to ask.)"""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


def few_config(x: Tensor, weight: Int4Weight, gated: bool) -> Int4Config | None:
    """How `int4_few_triton` computes it; None where it has no kernel, or cuBLAS on the dequantized weight is faster."""
    if x.shape[0] > MAX_ROWS or weight.k % 4 or (gated and weight.n // 2 % ROWS) or not _has_tensor_cores():
        return None
    n, kind = (weight.n // 2, "gated") if gated else (weight.n, "plain")
    config = find_config(x.shape[0], n, weight.k, kind, weight.bits // 4, weight.group)
    return config if config.tiles else None


@functools.cache
def _shared_memory() -> int:
    """Bytes that a program may have; those of the GPU that the configurations are tuned on where there is none to ask."""
    if not torch.cuda.is_available():
        return 227 << 10
    return int(torch.cuda.get_device_properties("cuda").shared_memory_per_block_optin)


@functools.cache
def find_config(m: int, n: int, k: int, kind: str, planes: int = 1, group: int = 128) -> Int4Config:
    """``kind`` is ``plain`` or ``gated`` (two rows an output). No tiles: cuBLAS on the dequantized weight is faster."""
    tokens = triton.next_power_of_2(triton.cdiv(m, 8))
    plain = planes == 1 and group == 128
    form = "" if plain else f"/{4 * planes}-{group}"
    found = tuned.lookup("int4", f"{kind}/{n}x{k}/m{8 * tokens}{form}")
    if found is not None:
        config = Int4Config(**found)
        if stream_bytes(config.tiles, config.num_warps, config.stages, planes, group) <= _shared_memory():
            return config
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
    config: Int4Config,
) -> Tensor:
    """`kubeinfer.kernels.int4.int4_linear` where `few_config` finds a configuration; the weight's order is the inputs'.

    ``norm_weight`` only with bfloat16.
    """
    m, k = x.shape
    n = weight.n // 2 if gated else weight.n
    if x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 8:
        x = x.clone(memory_format=torch.contiguous_format)
    if norm_weight is not None and config.norm_apart:
        x, norm_weight = rms_norm(x, norm_weight, eps), None
    out = residual if residual is not None else torch.empty(m, n, dtype=x.dtype, device=x.device)
    if config.stages:
        int4_stream_triton(
            x, weight, bias, norm_weight, eps, gated, out, residual is not None,
            config.tiles, config.num_warps, config.stages, config.per_processor, config.registers,
            bool(config.subnormal) and x.dtype == torch.bfloat16, config.depth > 1,
        )  # fmt: skip
        return out
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
