# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernels of `kubeinfer.kernels.attention`.

Rows of one query token are `kubeinfer.kernels.triton_decode_attention`'s.

Prefill rows: the query heads of one KV head are packed into the rows of one tile (``row = token * group + head``), so
keys and values are read once for the group. Programs find their sequence by bisection over ``query_start``; the grid's
size needs host integers only. Heaviest tiles (latest tokens) are launched first. Where prompts are long, keys and values are
first gathered from their pages into contiguous rows, which the copy engine (TMA) then fetches whole tiles of: the gather
costs a few percent of what the loads by address cost.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kubeinfer.kernels import tuned
from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.triton_attention_tiles import attend_tiles
from kubeinfer.kernels.triton_decode_attention import FIXED_ROWS, decode_attention_triton
from kubeinfer.kernels.triton_launch import Kernel, has_tensor_memory_accelerator, runs_gluon

if TYPE_CHECKING:
    from kubeinfer.kernels.attention import DecodeWorkspace
    from kubeinfer.kernels.gluon_prefill import GluonConfig
    from kubeinfer.kernels.shared_prefix import SharedPrefix

_LOG2E = 1.4426950408889634
_TMA_HEAD_DIMS = (64, 128)
# Below this the loads by address hide as well, and the gather's launch would cost more than it saves.
_TMA_MIN_CONTEXT = 512
_SEARCHED = 128  # sequences at a time
_GATHER_TILE = 128
_GATHER_SEQS = 128  # the most, and what the kernel is compiled for


@triton.jit(do_not_specialize=["num_blocks", "rows_per_head", "stride_table", "first_seq", "num_seqs"])
def _prefill_kernel(
    q_ptr,
    kv_ptr,
    k_rows,
    v_rows,
    row_starts_ptr,
    block_table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    out_ptr,
    num_blocks,
    rows_per_head,
    stride_table,
    first_seq,
    num_seqs,
    qk_scale,
    v_scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    HK: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    SEARCHED: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(0)
    # Later tiles see more keys: launched first, they leave no long tail.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    # Sequence i owns tiles from its first token // BLOCK_Q + i on, at least one more than it needs at most.
    base = tl.load(query_start_ptr + first_seq)
    # All at once: a bisection's loads would wait for one another.
    before = 0
    for start in range(0, num_seqs, SEARCHED):
        index = start + tl.arange(0, SEARCHED)
        begins = tl.load(query_start_ptr + first_seq + index, mask=index < num_seqs, other=0)
        before += tl.sum(((index < num_seqs) & ((begins - base) // BLOCK_Q + index <= tile)).to(tl.int32), 0)
    low = before - 1
    seq = first_seq + low
    query_begin = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_begin
    first_token = (tile - ((query_begin - base) // BLOCK_Q + low)) * BLOCK_Q
    if first_token >= query_len:
        return
    seq_len = tl.load(seq_lens_ptr + seq)
    context = seq_len - query_len

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D_PAD)
    token = first_token + rows // GROUP
    row_inside = (rows < BLOCK_Q * GROUP) & (token < query_len)
    mask = row_inside[:, None] & (dims < D)[None, :]
    columns = ((head * GROUP + rows % GROUP) * D)[:, None] + dims[None, :]
    token_row = (query_begin + token).to(tl.int64)
    q = tl.load(q_ptr + token_row[:, None] * STRIDE_Q + columns, mask=mask, other=0.0)
    positions = context + token

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    table = block_table_ptr + seq.to(tl.int64) * stride_table
    row_start = 0
    if TMA:
        row_start = head * rows_per_head + tl.load(row_starts_ptr + low)
        k_source = k_rows
        v_source = v_rows
    else:
        k_source = kv_ptr + head * (BLOCK_SIZE * D)
        v_source = k_source + num_blocks.to(tl.int64) * (HK * BLOCK_SIZE * D)
    first_position = context + first_token
    end = tl.minimum(first_position + BLOCK_Q, seq_len)
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        full_end = begin
    else:
        begin = 0
        full_end = (first_position + 1) // BLOCK_N * BLOCK_N
        acc, total, m = attend_tiles(
            acc, total, m, q, k_source, v_source, table, row_start, positions, begin, full_end, seq_len, qk_scale,
            HK, D, D_PAD, BLOCK_SIZE, BLOCK_N, WINDOW, SOFT_CAP, PRECISION, False, TMA,
        )  # fmt: skip
    acc, total, m = attend_tiles(
        acc, total, m, q, k_source, v_source, table, row_start, positions, full_end, end, seq_len, qk_scale,
        HK, D, D_PAD, BLOCK_SIZE, BLOCK_N, WINDOW, SOFT_CAP, PRECISION, True, TMA,
    )  # fmt: skip
    acc = acc * (v_scale / tl.where(total > 0, total, 1.0))[:, None]
    tl.store(out_ptr + token_row[:, None] * STRIDE_OUT + columns, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_blocks", "rows_per_head", "stride_table", "first_seq", "num_seqs"])
def _gather_kernel(
    kv_ptr,
    block_table_ptr,
    seq_lens_ptr,
    rows_ptr,
    row_starts_ptr,
    num_blocks,
    rows_per_head,
    stride_table,
    first_seq,
    num_seqs,
    HK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SEQS_PAD: tl.constexpr,
):
    """Copies each sequence's keys and values to rows of ``[2, HK, rows_per_head, D]``, from a multiple of TILE on."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    which = tl.program_id(2)
    seqs = tl.arange(0, SEQS_PAD)
    lens = tl.load(seq_lens_ptr + first_seq + seqs, mask=seqs < num_seqs, other=0)
    tiles = tl.cdiv(lens, TILE)
    ends = tl.cumsum(tiles, 0)
    if tile < tl.sum(tiles, 0):
        owner = tl.sum((ends <= tile).to(tl.int32), 0)
        first_tile = tl.sum(tl.where(seqs < owner, tiles, 0), 0)
        seq_len = tl.sum(tl.where(seqs == owner, lens, 0), 0)
        if (tile == first_tile) & (head == 0) & (which == 0):
            tl.store(row_starts_ptr + owner, first_tile * TILE)
        lanes = tl.arange(0, TILE)
        dims = tl.arange(0, D)
        keys = (tile - first_tile) * TILE + lanes
        inside = keys < seq_len
        table = block_table_ptr + (first_seq + owner).to(tl.int64) * stride_table
        page = tl.load(table + keys // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        source = which * num_blocks.to(tl.int64) * (HK * BLOCK_SIZE * D) + page * (HK * BLOCK_SIZE * D)
        source += head * (BLOCK_SIZE * D) + (keys % BLOCK_SIZE) * D
        # Zeros past the end: what is masked out later must not be NaN.
        x = tl.load(kv_ptr + source[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
        target = ((which * HK + head) * rows_per_head + tile * TILE + lanes).to(tl.int64) * D
        tl.store(rows_ptr + target[:, None] + dims[None, :], x)


_GATHER = Kernel(_gather_kernel)
_PREFILL = Kernel(_prefill_kernel)


@functools.cache
def _prefill_config(head_dim: int, group: int, wide: bool, fp8: bool, tma: bool) -> tuple[int, int, int, int]:
    """``BLOCK_M``, ``BLOCK_N``, warps and pipeline stages of the prefill kernel."""
    smallest = max(16, triton.next_power_of_2(group))
    if wide:
        return max(32, smallest), 32, 4, 1
    kind = "fp8" if fp8 else "tma" if tma else "16bit"
    found = tuned.lookup("attention", f"prefill/d{head_dim}/g{group}/{kind}", f"prefill/d{head_dim}/{kind}")
    if found is not None:
        return max(found["block_m"], smallest), found["block_n"], found["num_warps"], found["num_stages"]
    if head_dim <= 128:
        return max(128, smallest), 64, 8, 3
    return max(64, smallest), 32, 4, 2


@functools.cache
def _gluon_config(head_dim: int) -> GluonConfig | None:
    """How the Gluon kernel runs in place of the prefill kernel over gathered rows; ``None``: it does not."""
    found = tuned.lookup("attention", f"prefill/d{head_dim}/gluon") if runs_gluon() else None
    if found is None:
        return None
    from kubeinfer.kernels.gluon_prefill import GluonConfig

    return GluonConfig(**found)


def paged_attention_triton(
    q: Tensor,
    kv_cache: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int,
    soft_cap: float,
    num_decodes: int,
    workspace: DecodeWorkspace | None,
    k_scale: float,
    v_scale: float,
    prefill_kv_tokens: int | None,
    shared: SharedPrefix | None = None,
    units: Tensor | None = None,
) -> Tensor:
    """`kubeinfer.kernels.attention.paged_attention` on CUDA tensors.

    Under batch invariance every sequence must have one query token: each row is its own program's, cut into a number of
    splits that is the same for any batch.
    """
    if batch_invariant():
        if num_decodes < q.shape[0]:
            raise ValueError("batch-invariant attention takes sequences of one query token")
        if num_decodes > FIXED_ROWS:
            for rows in (slice(i, i + FIXED_ROWS) for i in range(0, num_decodes, FIXED_ROWS)):
                paged_attention_triton(
                    q[rows], kv_cache, query_start, seq_lens[rows], block_table[rows], out[rows], scale, 1, max_seq_len,
                    sliding_window, soft_cap, q[rows].shape[0], workspace, k_scale, v_scale, None,
                )  # fmt: skip
            return out
    num_tokens, num_heads, head_dim = q.shape
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    head_dim_pad = triton.next_power_of_2(head_dim)
    wide = q.dtype == torch.float32
    fp8 = kv_cache.dtype == torch.float8_e4m3fn
    precision = "ieee" if wide else "tf32"
    qk_scale = scale * k_scale * _LOG2E
    stride_q, stride_out, stride_table = q.stride(0), out.stride(0), block_table.stride(0)
    if num_decodes > 0:
        decode_attention_triton(
            q,
            kv_cache,
            seq_lens,
            block_table,
            out,
            qk_scale,
            sliding_window,
            soft_cap,
            num_decodes,
            workspace,
            v_scale,
            None if sliding_window > 0 or batch_invariant() else shared,
            units,
        )
    num_prefills = seq_lens.shape[0] - num_decodes
    if num_prefills > 0:
        k_rows = v_rows = row_starts = None
        rows_per_head = 0
        tma = False
        if not wide and not fp8 and head_dim in _TMA_HEAD_DIMS and max_seq_len >= _TMA_MIN_CONTEXT:
            # Without the exact sum, an upper bound. The rows stay within a small multiple of the step's own tokens.
            total = prefill_kv_tokens if prefill_kv_tokens is not None else num_prefills * max_seq_len
            rows_per_head = (total // _GATHER_TILE + num_prefills) * _GATHER_TILE
            tma = (
                num_prefills <= _GATHER_SEQS
                and rows_per_head <= 2 * max(num_tokens, 8192)
                and has_tensor_memory_accelerator()
            )
        block_m, block_n, num_warps, num_stages = _prefill_config(head_dim, group, wide, fp8, tma)
        if tma:
            rows = torch.empty(
                2, num_kv_heads * rows_per_head, head_dim, dtype=kv_cache.dtype, device=q.device
            )
            row_starts = torch.empty(num_prefills, dtype=torch.int32, device=q.device)
            _GATHER.launch(
                (rows_per_head // _GATHER_TILE, num_kv_heads, 2),
                (
                    kv_cache, block_table, seq_lens, rows, row_starts, num_blocks, rows_per_head, stride_table,
                    num_decodes, num_prefills,
                ),
                (
                    num_kv_heads, head_dim, block_size, _GATHER_TILE, _GATHER_SEQS,
                ),
                8,
            )  # fmt: skip
            gluon = (
                _gluon_config(head_dim) if sliding_window == 0 and soft_cap == 0.0 and group <= 128 else None
            )
            if gluon is not None:
                from kubeinfer.kernels.gluon_prefill import prefill_gluon

                prefill_gluon(
                    q, rows, row_starts, query_start, seq_lens, out, qk_scale, v_scale, num_kv_heads, num_decodes,
                    num_prefills, gluon,
                )  # fmt: skip
                return out
            k_rows = TensorDescriptor(rows[0], list(rows.shape[1:]), [head_dim, 1], [block_n, head_dim])
            v_rows = TensorDescriptor(rows[1], list(rows.shape[1:]), [head_dim, 1], [block_n, head_dim])
        # Of all tokens: those of decodes that a captured step leaves unused are prompts'. A tile too many ends at once.
        tiles = num_tokens // (block_m // group) + num_prefills
        _PREFILL.launch(
            (num_kv_heads, tiles, 1),
            (
                q, kv_cache, k_rows, v_rows, row_starts, block_table, query_start, seq_lens, out, num_blocks,
                rows_per_head, stride_table, num_decodes, num_prefills, qk_scale, v_scale,
            ),
            (
                stride_q, stride_out, num_kv_heads, group, head_dim, head_dim_pad, block_size, block_m, block_n,
                sliding_window, soft_cap, precision, tma, _SEARCHED,
            ),
            num_warps,
            num_stages,
        )  # fmt: skip
    return out
