# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernels of `kubeinfer.kernels.attention` for rows of one query token.

One program a (sequence, KV head, split). The grid depends on the number of rows only, so a CUDA graph replays it for any
context: each program divides its sequence's tiles by the fixed number of splits on the device. A second kernel merges the
splits; where most rows are one split only, the last of a long row's does. What rows share of their contexts may have been attended to before, by `kubeinfer.kernels.triton_shared_prefix`: a
row's first split then begins after it, and joins its result to its own.
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
from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.triton_attention_tiles import attend_keys, cut, joined, paged_rows
from kubeinfer.kernels.triton_decode_runs import (
    decode_runs_triton,
    list_tiles,
    runs_workspace_rows,
    takes_runs,
    takes_streams,
)
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches
from kubeinfer.kernels.triton_shared_prefix import (
    MAX_PREFIX_SPLITS,
    join_prefix,
    prefix_attention_triton,
    prefix_config,
    prefix_splits,
)

if TYPE_CHECKING:
    from kubeinfer.kernels.attention import DecodeWorkspace
    from kubeinfer.kernels.shared_prefix import SharedPrefix

_MAX_SPLITS = 64
# Programs that few rows are cut into: about what 132 multiprocessors hold at once.
_DECODE_PROGRAMS = 528
# Up to so many rows and KV heads: splits of each at least. Contexts are uneven, and the longest row should not be waited for.
_FEW_ROWS = ((64, 16), (132, 8))
# Of more than those, up to so many: splits of a row, and the keys from which it is cut. A program that finds nothing to do takes
# about half a microsecond.
_MANY_ROWS = ((1056, 8, 256), (2112, 4, 512))
_MOST_ROWS = (2, 1024)
# Under batch invariance: splits of any row, and rows of a launch (which bounds the scratch memory).
_FIXED_SPLITS = 16
FIXED_ROWS = 512


@triton.jit
def span(
    seq_len,
    shared_ptr,
    seq,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Of a row's own keys (after its shared prefix, within its window): the first, how many a split, splits used."""
    first = 0
    if SHARED:
        first = tl.load(shared_ptr + seq)
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, 0) // BLOCK_N * BLOCK_N
    keys_per_split, used = cut(seq_len - first, SPLITS, BLOCK_N)
    if LEAST > 0:
        keys_per_split = tl.maximum(keys_per_split, LEAST)
        used = tl.cdiv(seq_len - first, keys_per_split)
    return first, keys_per_split, used


@triton.jit
def _joined(
    partial_ptr,
    lse_ptr,
    first_row,
    inside,
    used,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Result and log-sum-exp of a row's splits, which lie from ``first_row`` on."""
    dims = tl.arange(0, D_PAD)
    m = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    for split in tl.static_range(SPLITS):
        there = inside & (split < used)
        row = first_row + split
        lse = tl.load(lse_ptr + row, mask=there, other=float("-inf"), cache_modifier=".cg")
        mask = there[:, None] & (dims < D)[None, :]
        part = tl.load(
            partial_ptr + row[:, None] * D + dims[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
        acc, total, m = joined(acc, total, m, part, lse)
    return acc / tl.where(total > 0, total, 1.0)[:, None], m + tl.log2(total)


@triton.jit(do_not_specialize=["num_blocks", "stride_table", "num_prefix_splits"])
def _decode_kernel(
    q_ptr,
    kv_ptr,
    block_table_ptr,
    seq_lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    shared_ptr,
    prefix_partial_ptr,
    prefix_lse_ptr,
    counter_ptr,
    num_blocks,
    stride_table,
    num_prefix_splits,
    qk_scale,
    v_scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    HK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    PREFIX_N: tl.constexpr,
    MAX_PREFIX: tl.constexpr,
    PDL: tl.constexpr,
):
    SHARED: tl.constexpr = PREFIX_N > 0
    head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2)
    # Before the wait: contexts are written at the step's start, many kernels before this one.
    seq_len = tl.load(seq_lens_ptr + seq)
    first, keys_per_split, used = span(seq_len, shared_ptr, seq, SPLITS, LEAST, BLOCK_N, WINDOW, SHARED)
    begin = first + split * keys_per_split
    end = tl.minimum(seq_len, begin + keys_per_split)
    # A row without keys is its first split's, which writes zeros.
    nothing = (begin >= end) & ((LEAST == 0) | (split > 0))
    if SHARED:
        # The kernel before this one is the prefix's; queries and cache are those before it wrote. A row's own keys are
        # attended to while the prefix's are.
        if nothing:
            if PDL:
                gdc_wait()
                gdc_launch_dependents()
            return
    else:
        # A program without keys leaves at once; but a row's first split always waits, so that this kernel ends after the one before.
        if nothing & (split > 0):
            return
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        if nothing:
            return

    rows = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, D_PAD)
    q_mask = (rows < GROUP)[:, None] & (dims < D)[None, :]
    q_offsets = (head * GROUP + rows)[:, None] * D + dims[None, :]
    q = tl.load(q_ptr + seq.to(tl.int64) * STRIDE_Q + q_offsets, mask=q_mask, other=0.0)

    m = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    table = block_table_ptr + seq.to(tl.int64) * stride_table
    k_ptr = kv_ptr + head * (BLOCK_SIZE * D)
    v_ptr = k_ptr + num_blocks.to(tl.int64) * (HK * BLOCK_SIZE * D)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < end
        k, v = paged_rows(k_ptr, v_ptr, table, keys, inside, HK, D, D_PAD, BLOCK_SIZE)
        acc, total, m = attend_keys(
            acc, total, m, q, k, v, keys, inside, seq_len, qk_scale, WINDOW, SOFT_CAP, PRECISION
        )
    acc = acc * (v_scale / tl.where(total > 0, total, 1.0))[:, None]
    lse = m + tl.log2(total)
    if SHARED:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        if (first > 0) & (split == 0):
            acc, lse = join_prefix(
                acc, lse, prefix_partial_ptr, prefix_lse_ptr, (seq * HK + head) * GROUP + rows, rows < GROUP, first,
                num_prefix_splits, D, D_PAD, PREFIX_N, MAX_PREFIX,
            )  # fmt: skip

    row = ((seq * HK + head) * GROUP + rows) * SPLITS + split
    whole = False
    if LEAST > 0:
        # Most rows are one split: for the others a kernel of its own to merge them would be a launch too many.
        whole = used <= 1
        if used > 1:
            tl.store(partial_ptr + row[:, None] * D + dims[None, :], acc, mask=q_mask)
            tl.store(lse_ptr + row, lse, mask=rows < GROUP)
            tl.debug_barrier()  # all of this split is stored before one of its threads counts it
            whole = tl.atomic_add(counter_ptr + seq * HK + head, 1, sem="acq_rel") == used - 1
            if whole:
                tl.store(counter_ptr + seq * HK + head, 0)
                acc, lse = _joined(
                    partial_ptr, lse_ptr, row - split, rows < GROUP, used, GROUP_PAD, D, D_PAD, SPLITS
                )
    if LEAST == 0:
        tl.store(partial_ptr + row[:, None] * D + dims[None, :], acc, mask=q_mask)
        tl.store(lse_ptr + row, lse, mask=rows < GROUP)
    elif whole:
        out_offsets = seq.to(tl.int64) * STRIDE_OUT + q_offsets
        tl.store(out_ptr + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def _merge_kernel(
    partial_ptr,
    lse_ptr,
    seq_lens_ptr,
    shared_ptr,
    out_ptr,
    STRIDE_OUT: tl.constexpr,
    HQ: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARED: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    seq = tl.program_id(1)
    # Before the wait: contexts are written at the step's start, many kernels before this one.
    seq_len = tl.load(seq_lens_ptr + seq)
    _, _, used = span(seq_len, shared_ptr, seq, SPLITS, 0, BLOCK_N, WINDOW, SHARED)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, D_PAD)
    row = (seq * HQ + head) * SPLITS + splits
    lse = tl.load(lse_ptr + row, mask=splits < used, other=float("-inf"))
    largest = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    mask = (splits < used)[:, None] & (dims < D)[None, :]
    part = tl.load(partial_ptr + row[:, None] * D + dims[None, :], mask=mask, other=0.0)
    total = tl.sum(weight, 0)
    result = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    out_offsets = seq.to(tl.int64) * STRIDE_OUT + head * D + dims
    tl.store(out_ptr + out_offsets, result.to(out_ptr.dtype.element_ty), mask=dims < D)


_DECODE = Kernel(_decode_kernel)
_MERGE = Kernel(_merge_kernel)


def num_splits(num_seqs: int, num_kv_heads: int) -> tuple[int, int]:
    """Splits of each decode row, a power of two that depends on the (padded) batch only, and the least keys of one.

    Rows enough to fill the GPU are cut only where they are long: else the longest would keep the others waiting.
    """
    if batch_invariant():
        return _FIXED_SPLITS, 0
    rows = max(1, num_seqs * num_kv_heads)
    for most, splits in _FEW_ROWS:
        if rows <= most:
            wanted = _DECODE_PROGRAMS // rows
            return max(splits, min(_MAX_SPLITS, 1 << (wanted.bit_length() - 1))), 0
    for most, splits, least in _MANY_ROWS:
        if rows <= most:
            return splits, least
    return _MOST_ROWS


def workspace_rows(
    max_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> int:
    """Partial outputs the largest grid of up to ``max_seqs`` rows writes."""
    if batch_invariant():
        return FIXED_ROWS * num_heads * _FIXED_SPLITS
    return max(
        runs_workspace_rows(num_heads, num_kv_heads, head_dim, device),
        *(n * num_heads * num_splits(n, num_kv_heads)[0] for n in range(1, max(1, max_seqs) + 1)),
    )


@functools.cache
def _decode_config(head_dim: int, splits: int, wide: bool, fp8: bool) -> tuple[int, int, int]:
    """``BLOCK_N``, warps and pipeline stages of the decode kernel; ``splits`` of most rows."""
    if wide:  # fp32: for tests and exactness, not for speed
        return 32, 4, 2
    kind = "fp8" if fp8 else "16bit"
    cut = "whole" if splits == 1 else "few" if splits <= 16 else "many"
    found = tuned.lookup("attention", f"decode/d{head_dim}/{kind}/{cut}")
    if found is not None:
        return found["block_n"], found["num_warps"], found["num_stages"]
    return (64, 4, 3) if head_dim <= 128 else (32, 4, 3)


def plan_decodes_triton(seq_lens: Tensor, max_seq_len: int, kv_cache: Tensor) -> Tensor | None:
    """`kubeinfer.kernels.attention.plan_decodes`: None where there are so few rows that each is cut in as many as pays."""
    if not num_splits(seq_lens.shape[0], kv_cache.shape[2])[1] or not takes_runs(kv_cache):
        return None
    return list_tiles(seq_lens, max_seq_len)


def decode_attention_triton(
    q: Tensor,
    kv_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    qk_scale: float,
    sliding_window: int,
    soft_cap: float,
    num_decodes: int,
    workspace: DecodeWorkspace | None,
    v_scale: float,
    shared: SharedPrefix | None = None,
    units: Tensor | None = None,
) -> None:
    """Attention of the first ``num_decodes`` sequences, one query token each; ``qk_scale`` is for powers of two.

    ``shared`` is of these rows; it goes with no sliding window. ``units`` is of `plan_decodes`.
    """
    _, num_heads, head_dim = q.shape
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    head_dim_pad = triton.next_power_of_2(head_dim)
    wide = q.dtype == torch.float32
    fp8 = kv_cache.dtype == torch.float8_e4m3fn
    precision = "ieee" if wide else "tf32"
    stride_q, stride_out, stride_table = q.stride(0), out.stride(0), block_table.stride(0)
    pdl = overlaps_launches()
    splits, least = num_splits(num_decodes, num_kv_heads)
    block_n, num_warps, num_stages = _decode_config(head_dim, 1 if least else splits, wide, fp8)
    if workspace is not None:
        partial, lse, counters = workspace.partial, workspace.lse, workspace.counters
    else:
        rows = num_decodes * num_heads * splits
        counters = torch.zeros(num_decodes * num_kv_heads, dtype=torch.int32, device=q.device)
        partial = torch.empty(rows, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    if units is not None and shared is None and sliding_window <= 0 and q.dtype == kv_cache.dtype:
        if workspace is None:
            rows = runs_workspace_rows(num_heads, num_kv_heads, head_dim, q.device)
            partial = torch.empty(rows, head_dim, dtype=torch.float32, device=q.device)
            lse = torch.empty(rows, dtype=torch.float32, device=q.device)
        parts = (partial, lse, counters)
        if takes_streams(kv_cache, num_decodes, num_heads, soft_cap):
            from kubeinfer.kernels.gluon_decode_streams import decode_streams_gluon

            decode_streams_gluon(q, kv_cache, seq_lens, block_table, out, units, qk_scale, v_scale, parts)
        else:
            decode_runs_triton(
                q, kv_cache, seq_lens, block_table, out, units, qk_scale, v_scale, soft_cap, parts
            )
        return
    prefix_partial, prefix_lse, shared_tokens, prefix_n, cuts = out, out, seq_lens, 0, 0
    if shared is not None:
        cuts = prefix_splits(num_decodes, num_heads, num_kv_heads)
        prefix_n = prefix_config(head_dim, wide, fp8)[1]
        shared_tokens = shared.tokens
        if workspace is not None:
            prefix_partial, prefix_lse = workspace.prefix_partial, workspace.prefix_lse
        else:
            rows = num_decodes * num_heads * cuts
            prefix_partial = torch.empty(rows, head_dim, dtype=torch.float32, device=q.device)
            prefix_lse = torch.empty(rows, dtype=torch.float32, device=q.device)
        prefix_attention_triton(
            q, kv_cache, block_table, shared, prefix_partial, prefix_lse, qk_scale, v_scale, soft_cap
        )
    _DECODE.launch(
        (num_kv_heads, splits, num_decodes),
        (
            q, kv_cache, block_table, seq_lens, out, partial, lse, shared_tokens, prefix_partial, prefix_lse, counters,
            num_blocks, stride_table, cuts, qk_scale, v_scale,
        ),
        (
            stride_q, stride_out, num_kv_heads, group, max(16, triton.next_power_of_2(group)), head_dim,
            head_dim_pad, block_size, block_n, splits, least, sliding_window, soft_cap, precision, prefix_n,
            MAX_PREFIX_SPLITS, pdl,
        ),
        num_warps,
        num_stages,
        pdl,
    )  # fmt: skip
    if not least:
        rows = out[:num_decodes]
        merge_splits(
            partial, lse, seq_lens, shared_tokens, rows, block_n, splits, sliding_window, prefix_n > 0
        )


def merge_splits(
    partial: Tensor,
    lse: Tensor,
    seq_lens: Tensor,
    shared_tokens: Tensor,
    out: Tensor,
    block_n: int,
    splits: int,
    sliding_window: int,
    shared: bool,
) -> None:
    """``out [B, Hq, D]`` of what the splits of rows left, of their keys after ``shared_tokens [B]`` where ``shared``."""
    num_rows, num_heads, head_dim = out.shape
    pdl = overlaps_launches()
    _MERGE.launch(
        (num_heads, num_rows, 1),
        (partial, lse, seq_lens, shared_tokens, out),
        (
            out.stride(0), num_heads, head_dim, triton.next_power_of_2(head_dim), block_n, splits, sliding_window, shared,
            pdl,
        ),
        4 if splits > 16 else 1,
        pdl=pdl,
    )  # fmt: skip
