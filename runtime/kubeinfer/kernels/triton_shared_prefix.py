# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernels of `kubeinfer.kernels.shared_prefix`.

One program a (KV head, tile of query heads, split of the prefix). The tiles' rows are the query heads of one KV head of
all members, one row after the other. The grid depends on the number of decode rows only; where nothing is shared every
program returns at once. Its results are joined by the decode kernel itself, so they cost no launch of their own.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels import tuned
from kubeinfer.kernels.triton_attention_tiles import attend_tiles, cut
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches

if TYPE_CHECKING:
    from kubeinfer.kernels.shared_prefix import SharedPrefix

MAX_PREFIX_SPLITS = 8
# Programs the grid aims at (two on each of 132 multiprocessors), and the tile that its size is reckoned with.
_PROGRAMS = 264
_NOMINAL_TILE = 64


@triton.jit(do_not_specialize=["num_blocks", "stride_table", "num_rows"])
def _prefix_kernel(
    q_ptr,
    kv_ptr,
    block_table_ptr,
    members_ptr,
    tokens_ptr,
    partial_ptr,
    lse_ptr,
    num_blocks,
    stride_table,
    num_rows,
    qk_scale,
    v_scale,
    STRIDE_Q: tl.constexpr,
    HK: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    # Before the wait: who shares what is written at the step's start, many kernels before this one.
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(members_ptr + index // GROUP, mask=index // GROUP < num_rows, other=-1)
    used = tl.load(members_ptr + tile * BLOCK_M // GROUP) >= 0
    first = tl.maximum(tl.load(members_ptr), 0)
    shared = tl.load(tokens_ptr + first)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    keys_per_split, _ = cut(shared, splits, BLOCK_N)
    begin = split * keys_per_split
    end = tl.minimum(shared, begin + keys_per_split)
    if (begin >= end) | (not used):
        return

    dims = tl.arange(0, D_PAD)
    mask = (row >= 0)[:, None] & (dims < D)[None, :]
    columns = ((head * GROUP + index % GROUP) * D)[:, None] + dims[None, :]
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * STRIDE_Q + columns, mask=mask, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    table = block_table_ptr + first.to(tl.int64) * stride_table
    k_source = kv_ptr + head * (BLOCK_SIZE * D)
    v_source = k_source + num_blocks.to(tl.int64) * (HK * BLOCK_SIZE * D)
    last = tl.zeros([BLOCK_M], tl.int32) + (end - 1)
    full_end = end // BLOCK_N * BLOCK_N
    acc, total, m = attend_tiles(
        acc, total, m, q, k_source, v_source, table, 0, last, begin, full_end, end, qk_scale,
        HK, D, D_PAD, BLOCK_SIZE, BLOCK_N, 0, SOFT_CAP, PRECISION, False, False,
    )  # fmt: skip
    acc, total, m = attend_tiles(
        acc, total, m, q, k_source, v_source, table, 0, last, full_end, end, end, qk_scale,
        HK, D, D_PAD, BLOCK_SIZE, BLOCK_N, 0, SOFT_CAP, PRECISION, True, False,
    )  # fmt: skip
    acc = acc * (v_scale / total)[:, None]
    at = ((row * HK + head) * GROUP + index % GROUP) * splits + split
    tl.store(partial_ptr + at.to(tl.int64)[:, None] * D + dims[None, :], acc, mask=mask)
    tl.store(lse_ptr + at, m + tl.log2(total), mask=row >= 0)


@triton.jit
def join_prefix(
    acc,
    lse,
    partial_ptr,
    lse_ptr,
    at,
    inside,
    shared,
    splits,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PREFIX_N: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """``acc, lse`` of query heads (numbers ``at``, where ``inside``) joined with those of their prefix's splits."""
    _, used = cut(shared, splits, PREFIX_N)
    which = tl.arange(0, MAX_SPLITS)
    found = tl.load(
        lse_ptr + at[:, None] * splits + which[None, :],
        mask=inside[:, None] & (which < used)[None, :],
        other=float("-inf"),
    )
    largest = tl.maximum(lse, tl.max(found, 1))
    weight = tl.exp2(lse - largest)
    total = weight + tl.sum(tl.exp2(found - largest[:, None]), 1)
    acc = acc * weight[:, None]
    dims = tl.arange(0, D_PAD)
    mask = inside[:, None] & (dims < D)[None, :]
    for split in tl.range(0, used, loop_unroll_factor=4):
        source = at * splits + split
        weight = tl.exp2(tl.load(lse_ptr + source, mask=inside, other=float("-inf")) - largest)
        part = tl.load(partial_ptr + source.to(tl.int64)[:, None] * D + dims[None, :], mask=mask, other=0.0)
        acc += part * weight[:, None]
    return acc / total[:, None], largest + tl.log2(total)


_PREFIX = Kernel(_prefix_kernel)


def prefix_splits(num_rows: int, num_heads: int, num_kv_heads: int) -> int:
    """Splits of the prefix; a power of two that depends on the (padded) number of decode rows only."""
    tiles = triton.cdiv(num_rows * (num_heads // num_kv_heads), _NOMINAL_TILE)
    wanted = max(1, _PROGRAMS // max(1, tiles * num_kv_heads))
    return int(min(MAX_PREFIX_SPLITS, 1 << (wanted.bit_length() - 1)))


def prefix_workspace_rows(max_seqs: int, num_heads: int, num_kv_heads: int) -> int:
    """Partial outputs of the prefix for up to ``max_seqs`` rows."""
    return max(
        n * num_heads * prefix_splits(n, num_heads, num_kv_heads) for n in range(1, max(1, max_seqs) + 1)
    )


@functools.cache
def prefix_config(head_dim: int, wide: bool, fp8: bool) -> tuple[int, int, int, int]:
    """``BLOCK_M``, ``BLOCK_N``, warps and pipeline stages of the prefix kernel."""
    if wide:  # fp32: for tests and exactness, not for speed
        return 32, 32, 4, 1
    found = tuned.lookup("attention", f"prefix/d{head_dim}/{'fp8' if fp8 else '16bit'}")
    if found is not None:
        return found["block_m"], found["block_n"], found["num_warps"], found["num_stages"]
    return (64, 64, 4, 2) if head_dim <= 128 else (64, 32, 4, 2)


def prefix_attention_triton(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    shared: SharedPrefix,
    partial: Tensor,
    lse: Tensor,
    qk_scale: float,
    v_scale: float,
    soft_cap: float,
) -> None:
    """Attention of the members' queries over the shared prefix.

    ``partial`` and ``lse`` (fp32, as `DecodeWorkspace`'s for the prefix) take, for each row, query head and split of
    `prefix_splits`, the output and the log2 of the softmax denominator; ``qk_scale`` is for powers of two.
    """
    num_rows = shared.members.shape[0]
    _, num_heads, head_dim = q.shape
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    wide = q.dtype == torch.float32
    block_m, block_n, num_warps, num_stages = prefix_config(
        head_dim, wide, kv_cache.dtype == torch.float8_e4m3fn
    )
    pdl = overlaps_launches()
    _PREFIX.launch(
        (
            num_kv_heads,
            triton.cdiv(num_rows * group, block_m),
            prefix_splits(num_rows, num_heads, num_kv_heads),
        ),
        (
            q, kv_cache, block_table, shared.members, shared.tokens, partial, lse, num_blocks,
            block_table.stride(0), num_rows, qk_scale, v_scale,
        ),
        (
            q.stride(0), num_kv_heads, group, head_dim, triton.next_power_of_2(head_dim), block_size, block_m,
            block_n, soft_cap, "ieee" if wide else "tf32", pdl,
        ),
        num_warps,
        num_stages,
        pdl,
    )  # fmt: skip
