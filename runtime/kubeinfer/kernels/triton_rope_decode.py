# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernel of `kubeinfer.kernels.attention.rope_and_decode`: few rows of one query token, from the projection's output on.

With few rows nothing is large, and a step's time is that of one kernel waiting for the next. So each program norms and rotates
the queries that it needs itself, and the one that has a row's newest position its key too, which it writes to the cache beside
the value. All older keys and values were written in earlier steps: a program has its first tile of them in registers when the
projection, the kernel before, ends.

Programs, splits and what they leave for the merging kernel are those of `kubeinfer.kernels.triton_decode_attention`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.triton_attention_tiles import attend_keys, capped, paged_rows
from kubeinfer.kernels.triton_decode_attention import merge_splits, num_splits, span
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches

if TYPE_CHECKING:
    from kubeinfer.kernels.attention import DecodeWorkspace


@triton.jit
def _rotated(
    rows_ptr, inside, norm_ptr, cos, sin, eps, D: tl.constexpr, D_PAD: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr
):  # fmt: skip
    """Heads at ``rows_ptr [R]`` -> ``[R, D_PAD]``, normed and rotated, rounded where `rope_and_cache`'s kernel rounds."""
    dims = tl.arange(0, D_PAD)
    mask = inside[:, None] & (dims < D)[None, :]
    kind = rows_ptr.dtype.element_ty
    x = tl.load(rows_ptr[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    if HALF > 0:
        # A dimension's partner is half of the rotated ones away. The others keep their value: cosine 1, sine 0.
        partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
        y_mask = inside[:, None] & (dims < 2 * HALF)[None, :]
        y = tl.load(rows_ptr[:, None] + partner[None, :], mask=y_mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = (x * factor * tl.load(norm_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]).to(kind)
        x = x.to(tl.float32)
        if HALF > 0:
            weight = tl.load(norm_ptr + partner, mask=dims < 2 * HALF, other=0.0).to(tl.float32)
            y = (y * factor * weight[None, :]).to(kind).to(tl.float32)
    if HALF > 0:
        x = x * cos[None, :] + y * tl.where(dims < HALF, -sin, sin)[None, :]
    return x.to(kind)


@triton.jit(do_not_specialize=["num_blocks", "stride_table", "eps"])
def _rope_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_sin_ptr,
    slots_ptr,
    kv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    block_table_ptr,
    seq_lens_ptr,
    partial_ptr,
    lse_ptr,
    num_blocks,
    stride_table,
    eps,
    qk_scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    HK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + seq)
    first, keys_per_split, _ = span(seq_len, seq_lens_ptr, seq, SPLITS, 0, BLOCK_N, WINDOW, False)
    begin = first + split * keys_per_split
    end = tl.minimum(seq_len, begin + keys_per_split)
    # A program without keys leaves at once; but a row's first split always waits, so that this kernel ends after the one before.
    if (begin >= end) & (split > 0):
        return
    newest = seq_len - 1
    cached = tl.minimum(end, newest)  # where the split's older keys end

    # Before the wait: tables are written at the step's start, many kernels before this one, and older keys in steps before.
    dims = tl.arange(0, D_PAD)
    cos = tl.full([D_PAD], 1.0, tl.float32)
    sin = tl.zeros([D_PAD], tl.float32)
    if HALF > 0:
        position = tl.load(positions_ptr + seq).to(tl.int64)
        angle = cos_sin_ptr + position * (2 * HALF) + tl.where(dims < HALF, dims, dims - HALF)
        cos = tl.load(angle, mask=dims < 2 * HALF, other=1.0)
        sin = tl.load(angle + HALF, mask=dims < 2 * HALF, other=0.0)
    slot = tl.load(slots_ptr + seq).to(tl.int64)
    table = block_table_ptr + seq.to(tl.int64) * stride_table
    keys_ptr = kv_ptr + head * (BLOCK_SIZE * D)
    values_ptr = keys_ptr + num_blocks.to(tl.int64) * (HK * BLOCK_SIZE * D)
    keys = begin + tl.arange(0, BLOCK_N)
    inside = keys < cached
    k, v = paged_rows(keys_ptr, values_ptr, table, keys, inside, HK, D, D_PAD, BLOCK_SIZE)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if begin >= end:
        return

    # The newest key and value, which are in no cache yet, are read beside the queries: they come at the same time.
    rows = tl.arange(0, GROUP_PAD)
    one = tl.arange(0, 1)
    q_rows = q_ptr + seq.to(tl.int64) * STRIDE_Q + (head * GROUP + rows) * D
    k_row = k_ptr + seq.to(tl.int64) * STRIDE_K + head * D + one
    v_row = v_ptr + seq.to(tl.int64) * STRIDE_V + head * D + dims
    q = _rotated(q_rows, rows < GROUP, q_norm_ptr, cos, sin, eps, D, D_PAD, HALF, HAS_NORM)
    new_k = _rotated(k_row, one < 1, k_norm_ptr, cos, sin, eps, D, D_PAD, HALF, HAS_NORM)
    new_v = tl.load(v_row, mask=dims < D, other=0.0)[None, :]
    m = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    if end > newest:
        place = (slot // BLOCK_SIZE) * (HK * BLOCK_SIZE * D) + (slot % BLOCK_SIZE) * D + dims[None, :]
        kept = (dims < D)[None, :] & (slot >= 0)
        tl.store(keys_ptr + place, new_k, mask=kept)
        tl.store(values_ptr + place, new_v, mask=kept)
        m = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * qk_scale
        if SOFT_CAP > 0:
            m = capped(m, SOFT_CAP)
        total += 1.0
        acc += new_v.to(tl.float32)
    acc, total, m = attend_keys(
        acc, total, m, q, k, v, keys, inside, seq_len, qk_scale, WINDOW, SOFT_CAP, PRECISION
    )
    for start in range(begin + BLOCK_N, cached, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < cached
        k, v = paged_rows(keys_ptr, values_ptr, table, keys, inside, HK, D, D_PAD, BLOCK_SIZE)
        acc, total, m = attend_keys(
            acc, total, m, q, k, v, keys, inside, seq_len, qk_scale, WINDOW, SOFT_CAP, PRECISION
        )

    row = ((seq * HK + head) * GROUP + rows) * SPLITS + split
    mask = (rows < GROUP)[:, None] & (dims < D)[None, :]
    tl.store(partial_ptr + row[:, None] * D + dims[None, :], acc / total[:, None], mask=mask)
    tl.store(lse_ptr + row, m + tl.log2(total), mask=rows < GROUP)


_ROPE_DECODE = Kernel(_rope_decode_kernel)

# Rows that are cut in fewer splits fill the GPU with the two kernels' smaller programs, which then are as fast or faster.
_LEAST_SPLITS = 32


def _config(head_dim: int, wide: bool) -> tuple[int, int, int]:
    """``BLOCK_N``, warps and pipeline stages: many warps, as no program has much to do and its own pace is what counts."""
    if wide:  # fp32: for tests and exactness, not for speed
        return 32, 4, 2
    return (64 if head_dim <= 128 else 32), (4 if head_dim <= 64 else 8), 2


def takes_rope_decode(q: Tensor, kv_cache: Tensor) -> bool:
    """Whether this kernel is for so many rows ``q [T, Hq, D]``, and such a cache."""
    if batch_invariant() or q.dtype != kv_cache.dtype or not q.shape[0]:
        return False
    splits, least = num_splits(q.shape[0], kv_cache.shape[2])
    return not least and splits >= _LEAST_SPLITS


def rope_decode_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    workspace: DecodeWorkspace | None,
) -> None:
    """`kubeinfer.kernels.attention.rope_and_decode` on CUDA tensors, where `takes_rope_decode`."""
    num_rows, num_heads, head_dim = q.shape
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    wide = q.dtype == torch.float32
    splits, _ = num_splits(num_rows, num_kv_heads)
    block_n, num_warps, num_stages = _config(head_dim, wide)
    if workspace is not None:
        partial, lse = workspace.partial, workspace.lse
    else:
        partial = torch.empty(num_rows * num_heads * splits, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_rows * num_heads * splits, dtype=torch.float32, device=q.device)
    pdl = overlaps_launches()
    _ROPE_DECODE.launch(
        (num_kv_heads, splits, num_rows),
        (
            q, k, v, positions, q if cos_sin is None else cos_sin, slot_mapping, kv_cache,
            q if q_norm_weight is None else q_norm_weight, q if k_norm_weight is None else k_norm_weight, block_table,
            seq_lens, partial, lse, num_blocks, block_table.stride(0), eps, scale * math.log2(math.e),
        ),
        (
            q.stride(0), k.stride(0), v.stride(0), num_kv_heads, group, max(16, triton.next_power_of_2(group)), head_dim,
            triton.next_power_of_2(head_dim), 0 if cos_sin is None else cos_sin.shape[1] // 2, block_size, block_n, splits,
            sliding_window, soft_cap, "ieee" if wide else "tf32", q_norm_weight is not None, pdl,
        ),
        num_warps,
        num_stages,
        pdl,
    )  # fmt: skip
    merge_splits(partial, lse, seq_lens, seq_lens, out, block_n, splits, sliding_window, False)
