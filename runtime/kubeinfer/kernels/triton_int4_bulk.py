# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Products of `kubeinfer.kernels.int4` for up to eight tokens in bfloat16 with weights that bulk copies bring into shared memory.

The kernel (`kubeinfer.kernels.gluon_int4`) is in Gluon, which is experimental: it is imported only where it can run. An RMS norm
between two products has no kernel of its own, as in `kubeinfer.kernels.triton_stream_linear`: one begins it, the next ends it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kubeinfer.kernels import tuned
from kubeinfer.kernels.int4 import CHUNK, ROWS, Int4Weight
from kubeinfer.kernels.norm import NormBegun
from kubeinfer.kernels.triton_launch import processors, runs_gluon
from kubeinfer.kernels.triton_split import scratch

MAX_TOKENS = 8
_MOST_SHARED = 227 << 10  # bytes that a program may have on Hopper


@dataclass(frozen=True, slots=True)
class Int4BulkConfig:
    """Tiles of 16 rows that a program takes at a time (of a gated layer's halves together), warps, pieces of weights that a warp
    has in shared memory, chunks a piece, programs a multiprocessor (0: one for each time), and whether inputs are held there too.
    """

    tiles: int
    num_warps: int
    slots: int
    piece: int
    per_processor: int
    held: int


def layout_of(k: int, tokens: int, config: Int4BulkConfig, once: bool = False) -> tuple[int, ...]:
    """Where in shared memory things are (weights, inputs, their sums, the tiles' sums, squares, which tiles are next, barriers), and
    its size.

    ``once``: programs take tiles only once.
    """
    chunks, warps = k // CHUNK, config.num_warps
    held = chunks + (chunks % (warps * config.piece) != 0)  # the last, if more, is of zeros
    groups = triton.cdiv(triton.cdiv(held * tokens, 8), warps) * warps
    sizes = (
        warps * config.slots * config.piece * config.tiles * 1088,
        held * 256 * tokens if config.held else 0,
        groups * 32 if config.held else 0,
        (1 if once else 2) * warps * config.tiles * 16 * (8 * triton.cdiv(tokens, 2) + 1),
        warps * 32,
        8,
        warps * config.slots * 8,
    )
    found, at = [], 16
    for size in sizes:
        found.append(at)
        at += triton.cdiv(size, 16) * 16
    return (*found, at)


def fits(m: int, n: int, k: int, gated: bool, config: Int4BulkConfig) -> bool:
    """Whether whole tiles and pieces come out, which have room in shared memory; and where programs take several tiles, that they
    have asked for no more than one."""
    own = config.tiles // 2 if gated else config.tiles
    pieces = triton.cdiv(k // CHUNK, config.num_warps * config.piece)  # of a warp, in a tile
    return (
        0 < m <= MAX_TOKENS
        and k % CHUNK == 0
        and config.tiles in (1, 2)
        and own > 0
        and n % (ROWS * own) == 0
        and k // CHUNK % config.piece == 0
        and config.num_warps >= 4
        and config.slots <= (pieces if config.per_processor else 32)
        and layout_of(k, triton.next_power_of_2(m), config)[-1] <= _MOST_SHARED
    )


def serves(x: Tensor, weight: Int4Weight) -> bool:
    """Whether this kernel is for such inputs, such a weight and this GPU."""
    plain = weight.bits == 4 and weight.group == CHUNK and not weight.minimums
    few = plain and x.dtype == torch.bfloat16 and x.shape[0] <= MAX_TOKENS
    return few and weight.words.numel() < 1 << 31 and runs_gluon()


@functools.cache
def find_bulk_config(m: int, n: int, k: int, kind: str) -> Int4BulkConfig | None:
    """The tuned configuration for ``m`` tokens, ``n`` outputs of ``k`` inputs, if this kernel is the fastest; ``kind`` as of the
    other's."""
    found = tuned.lookup("int4", f"{kind}/{n}x{k}/m{1 if m == 1 else MAX_TOKENS}/bulk")
    return None if found is None else Int4BulkConfig(**found)


def int4_bulk_triton(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None,
    gated: bool,
    add: bool,
    out: Tensor,
    config: Int4BulkConfig,
    squares: Tensor | None = None,
    eps: float = 0.0,
    next_norm: Tensor | None = None,
) -> NormBegun | None:
    """As `kubeinfer.kernels.triton_int4.int4_few_triton`, without norm. Written to ``out``, or added to it where ``add``.

    With ``squares``, those of a `NormBegun` whose ``scaled`` is ``x``, of the normed rows. With the weight ``next_norm [N]`` of
    a norm to come, that is begun.
    """
    from kubeinfer.kernels.gluon_int4 import BULK

    m, k = x.shape
    n = out.shape[1]
    if not fits(m, n, k, gated, config):
        raise ValueError(f"{config} is not for {m} tokens in {x.dtype} and {n} outputs of {k} inputs.")
    tokens = triton.next_power_of_2(m)
    own = config.tiles // 2 if gated else config.tiles
    units = n // (ROWS * own)
    programs = units
    if config.per_processor:
        programs = min(units, processors(x.device) * config.per_processor)
    begun = None if next_norm is None else NormBegun.empty(out, n // ROWS, 16)
    args = (
        x, weight.words, weight.meta, bias if bias is not None else x, out, x if squares is None else squares,
        x if next_norm is None else next_norm, x if begun is None else begun.scaled, x if begun is None else begun.squares,
        scratch(x.device).counters, m, eps,
    )  # fmt: skip
    constants = (
        n, k, x.stride(0), out.stride(0), gated, bias is not None, add, 0 if squares is None else squares.shape[0],
        0 if squares is None else squares.stride(0), begun is not None, 0 if begun is None else begun.squares.stride(0),
        programs, tokens, config.tiles, config.num_warps, config.slots, config.piece, bool(config.held),
        *layout_of(k, tokens, config, programs >= units),
    )  # fmt: skip
    BULK.launch((programs, 1, 1), args, constants, config.num_warps, pdl=True)
    return begun
