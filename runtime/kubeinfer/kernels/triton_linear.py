# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Triton kernel of `kubeinfer.kernels.fused_linear`: linear layers of a few tokens, as fast as their weights are read.

A program owns a few rows of the weight and sums whole rows, so there is one launch and one fixed order of addition. The
first tiles of weights are fetched before the kernel waits for the one before it (programmatic dependent launch): weights
never depend on what that computes. What stands around the matrix product costs no launch of its own: the RMS norm before it
(the row's factor is a scalar that is applied to the sums), bias, the gated activation and the residual addition after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels import tuned
from kubeinfer.kernels.fp8 import MAX_WIDE_ROWS
from kubeinfer.kernels.norm import NormBegun, rms_norm
from kubeinfer.kernels.triton_few_linear import FewConfig, few_linear_triton
from kubeinfer.kernels.triton_launch import (
    Kernel,
    multiplies_thread_by_thread,
    overlaps_launches,
    processors,
    runs_gluon,
)
from kubeinfer.kernels.triton_skinny_linear import SkinnyConfig, skinny_linear_triton
from kubeinfer.kernels.triton_stream_linear import StreamConfig, stream_linear_triton, streams

# Loops of fewer steps are written out: no step then waits for a counter or loads past the end.
_MOST_UNROLLED = 8
# Tiles of 8-bit numbers that a loop carries are taken apart into bytes, so loops over them are written out for longer.
_MOST_UNROLLED_FP8 = 40


@triton.jit
def _load_tile(base, start, lanes, inside, K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr):
    if EVEN_K and EVEN_N:
        return tl.load(base + start, eviction_policy="evict_first")
    if EVEN_K:
        return tl.load(base + start, mask=inside, other=0.0, eviction_policy="evict_first")
    mask = start + lanes < K
    if not EVEN_N:
        mask = mask & inside
    return tl.load(base + start, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _row(x_ptr, start, lanes, K: tl.constexpr, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(x_ptr + start + lanes).to(tl.float32)
    return tl.load(x_ptr + start + lanes, mask=start + lanes < K, other=0.0).to(tl.float32)


@triton.jit
def _by_thread(x, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of the eight neighbours that one thread holds: a sum then takes one register where products would take eight."""
    return tl.sum(tl.reshape(x, [ROWS, BLOCK_K // 8, 8]), 2)


@triton.jit(do_not_specialize=["n", "eps"])
def _linear_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    n,
    eps,
    M: tl.constexpr,
    K: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_W: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    DEPTH: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    # Of a gated layer a tile holds gate and up rows in turns, BLOCK_N of each.
    ROWS: tl.constexpr = BLOCK_N * 2 if GATED else BLOCK_N
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    own = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.arange(0, ROWS)
    if GATED:
        column = tl.program_id(0) * BLOCK_N + tile // 2
        rows = column + (tile % 2) * n
    else:
        column = tl.program_id(0) * BLOCK_N + tile
        rows = column
    # A thread takes eight numbers at a time, of 8-bit weights too: as many as of the 16-bit inputs.
    lanes = tl.max_contiguous(tl.arange(0, BLOCK_K), 8)[None, :]
    inside = (column < n)[:, None]
    base = weight_ptr + rows.to(tl.int64)[:, None] * STRIDE_W + lanes

    tiles = ()
    for i in tl.static_range(DEPTH):
        tiles = tiles + (_load_tile(base, i * BLOCK_K, lanes, inside, K, EVEN_K, EVEN_N),)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask=column < n, other=0.0).to(tl.float32)
    if SCALED:
        weight_scale = tl.load(scale_ptr + rows, mask=column < n, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    sums = ()
    squares = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros([ROWS, BLOCK_K // 8], tl.float32),)
        squares = squares + (tl.zeros([1, BLOCK_K // 8], tl.float32),)
    if UNROLL:
        for i in tl.static_range(STEPS):
            w = tiles[0].to(tl.float32)
            if i + DEPTH < STEPS:
                ahead = _load_tile(base, (i + DEPTH) * BLOCK_K, lanes, inside, K, EVEN_K, EVEN_N)
                tiles = tiles[1:] + (ahead,)
            else:
                tiles = tiles[1:]
            if NORM:
                scale = _row(norm_ptr, i * BLOCK_K, lanes, K, EVEN_K)
            for m in tl.static_range(M):
                x = _row(x_ptr + m * STRIDE_X, i * BLOCK_K, lanes, K, EVEN_K)
                if NORM:
                    squares = squares[:m] + (squares[m] + _by_thread(x * x, 1, BLOCK_K),) + squares[m + 1 :]
                    x = x * scale
                sums = sums[:m] + (sums[m] + _by_thread(w * x, ROWS, BLOCK_K),) + sums[m + 1 :]
    else:
        for start in range(0, K, BLOCK_K):
            w = tiles[0].to(tl.float32)
            # Past the end nothing is fetched.
            fetch = start + DEPTH * BLOCK_K + lanes < K
            if not EVEN_N:
                fetch = fetch & inside
            ahead = tl.load(
                base + (start + DEPTH * BLOCK_K), mask=fetch, other=0.0, eviction_policy="evict_first"
            )
            tiles = tiles[1:] + (ahead,)
            if NORM:
                scale = _row(norm_ptr, start, lanes, K, EVEN_K)
            for m in tl.static_range(M):
                x = _row(x_ptr + m * STRIDE_X, start, lanes, K, EVEN_K)
                if NORM:
                    squares = squares[:m] + (squares[m] + _by_thread(x * x, 1, BLOCK_K),) + squares[m + 1 :]
                    x = x * scale
                sums = sums[:m] + (sums[m] + _by_thread(w * x, ROWS, BLOCK_K),) + sums[m + 1 :]

    for m in tl.static_range(M):
        result = tl.sum(sums[m], 1)
        if NORM:
            result = result * tl.rsqrt(tl.sum(tl.sum(squares[m], 1), 0) / K + eps)
        if SCALED:
            result = result * weight_scale
        if HAS_BIAS:
            result += bias
        if GATED:
            gate, up = tl.split(tl.reshape(result, [BLOCK_N, 2]))
            result = gate / (1.0 + tl.exp(-gate)) * up
        target = out_ptr + m * STRIDE_OUT + own
        if ADD:
            result += tl.load(target, mask=own < n, other=0.0).to(tl.float32)
        tl.store(target, result.to(out_ptr.dtype.element_ty), mask=own < n)


_LINEAR = Kernel(_linear_kernel)


@dataclass(frozen=True, slots=True)
class Config:
    """Weight rows and columns a tile, warps, and tiles fetched ahead."""

    block_n: int
    block_k: int
    num_warps: int
    depth: int


@dataclass(frozen=True, slots=True)
class ColumnsConfig:
    """Steps whose operands are under way at a time, in the gated product of some tens of tokens."""

    in_flight: int


AnyConfig = Config | ColumnsConfig | FewConfig | SkinnyConfig | StreamConfig

# The kernels for large layers leave norms to each other, or to a kernel before them.
_LARGE: dict[type, Callable[..., NormBegun | None]] = {
    FewConfig: few_linear_triton,
    StreamConfig: stream_linear_triton,
}


@functools.cache
def find_config(m: int, n: int, k: int, kind: str) -> AnyConfig | None:
    """The configuration for ``m`` tokens, of this kernel or of one for more tokens; None where cuBLAS is as fast, or
    nothing is known.

    Tuned entries are for an exact shape, else for all of a ``kind`` (``plain``, ``gated``) whose K rounds up to the same power
    of two; ``block_n`` 0 says that cuBLAS won.
    """
    m = 1 << (m - 1).bit_length()
    any_n = f"k{triton.next_power_of_2(k)}/m{m}"
    if kind == "gated" and runs_gluon():
        # There each program reads all tokens: where these are more than its weights, only what was measured is taken.
        keys = [f"gated_columns/{n}x{k}/m{m}"]
        if m * processors(torch.device("cuda")) <= 2 * n:
            keys.append(f"gated_columns/{any_n}")
        columns = tuned.lookup("linear", *keys)
        if columns is not None:
            return ColumnsConfig(**columns)
    found = tuned.lookup("linear", f"{kind}/{n}x{k}/m{m}", f"{kind}/{any_n}")
    if found is not None and "ahead" in found:
        return FewConfig(**found) if multiplies_thread_by_thread() else None
    if found is None or found["block_n"] == 0:
        return None
    if "per_processor" in found:
        return StreamConfig(**found) if streams() else None
    return SkinnyConfig(**found) if "split_k" in found else Config(**found)


@functools.cache
def find_fp8_config(m: int, n: int, k: int, kind: str) -> Config | None:
    """`find_config` for weights of 8 bits; where nothing is tuned, a guess from what is in flight with 16 bits."""
    if k % 16:
        return None
    m = 1 << (m - 1).bit_length()
    found = tuned.lookup(
        "linear", f"fp8/{kind}/{n}x{k}/m{m}", f"fp8/{kind}/k{triton.next_power_of_2(k)}/m{m}"
    )
    if found is not None:
        return None if found["block_n"] == 0 else Config(**found)
    if m > MAX_WIDE_ROWS:
        return None
    warps = (8 if k > 8192 and m > 1 else 4) if k > 2048 else 2 if k > 512 else 1
    steps = triton.cdiv(k, 256 * warps)
    return Config(4 if kind == "gated" or m > 1 else 8, 256 * warps, warps, min(4 if m == 1 else 2, steps))


def linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: AnyConfig,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add: bool = False,
    weight_scale: Tensor | None = None,
    begun: NormBegun | None = None,
) -> Tensor:
    """``out = norm(x) @ (weight * weight_scale).T + bias``, through the gate where ``gated``, added to ``out`` where ``add``.

    Args:
        x: ``[M, K]`` of 16-bit numbers, rows contiguous and aligned to 16 bytes; M is small (for this kernel compiled in).
        weight: ``[N, K]``, or ``[2 N, K]`` where ``gated`` (gates first); K a multiple of 8.
        bias: ``[N]`` or ``[2 N]``.
        out: ``[M, N]``.
        norm_weight: ``[K]``; None: ``x`` as it is.
        begun: that norm, if the product before began it.
        weight_scale: fp32, one a row of a float8_e4m3fn ``weight`` (K a multiple of 16); None: ``weight`` is of 16 bits.
    """
    if isinstance(config, ColumnsConfig | FewConfig | StreamConfig):
        squares = None
        if begun is not None:
            x, squares = begun.scaled, begun.squares
        elif norm_weight is not None:
            x = rms_norm(x, norm_weight, eps)
        if isinstance(config, ColumnsConfig):
            from kubeinfer.kernels.gluon_gated_columns import gated_columns_gluon

            return gated_columns_gluon(x, weight, bias, out, config, squares, eps)
        _LARGE[type(config)](x, weight, bias, out, config, gated, add, squares, eps)
        return out
    if isinstance(config, SkinnyConfig):
        return skinny_linear_triton(x, weight, bias, out, config, norm_weight, eps, gated, add)
    m, k = x.shape
    n = out.shape[1]
    steps = triton.cdiv(k, config.block_k)
    unroll = steps * m <= (_MOST_UNROLLED if weight_scale is None else _MOST_UNROLLED_FP8)
    pdl = overlaps_launches()
    args = (
        x, norm_weight if norm_weight is not None else x, weight, bias if bias is not None else x,
        weight_scale if weight_scale is not None else x, out, n, eps,
    )  # fmt: skip
    constants = (
        m, k, x.stride(0), weight.stride(0), out.stride(0), norm_weight is not None, gated, bias is not None, add,
        weight_scale is not None, config.block_n, config.block_k, n % config.block_n == 0, min(config.depth, steps), unroll, pdl,
    )  # fmt: skip
    grid = (triton.cdiv(n, config.block_n), 1, 1)
    _LINEAR.launch(grid, args, constants, config.num_warps, pdl=pdl)
    return out


def add_linear_triton(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: AnyConfig,
    next_norm: Tensor | None,
) -> NormBegun | None:
    """`linear_triton` added to ``residual``; the norm of the sum whose weight is ``next_norm [N]`` is begun, if the kernel can."""
    if isinstance(config, FewConfig | StreamConfig):
        return _LARGE[type(config)](x, weight, bias, residual, config, add=True, next_norm=next_norm)
    linear_triton(x, weight, bias, residual, config, add=True)
    return None
