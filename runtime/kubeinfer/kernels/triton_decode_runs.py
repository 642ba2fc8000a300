# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""Triton kernels of `kubeinfer.kernels.attention` for many rows of one query token: contexts as one long list, cut evenly.

The contexts of a batch are uneven. A program a row would leave most of its time to its beginning and its end where contexts are
short, and let all wait for the longest. So the tiles of keys of all rows are one list (as stream-K does with a product's: Osama
et al., arXiv 2301.03598), and each program takes an equal run of it, for one KV head: it fetches the tiles to come across the ends
of rows too, so that the memory never waits. A kernel writes the list once a step, for all layers.

Of a row that several programs have parts of, the last to arrive joins them, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels import tuned
from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.triton_attention_tiles import capped, joined
from kubeinfer.kernels.triton_launch import Kernel, all_threads, overlaps_launches, processors, runs_gluon

TILE = 64  # keys
# An entry of the list: whether its tile is its row's last, how many keys it has (0 to 64), which tile it is, and the row.
_KEYS_BIT, _TILE_BIT, _ROW_BIT = tl.constexpr(1), tl.constexpr(8), tl.constexpr(21)
_STREAMS_PER_PROCESSOR = 8
_MOST_TILES, _MOST_ROWS = 1 << 13, 1 << 10
FIRST = tl.constexpr(16)  # of the list's entries; before them is how many there are


@triton.jit
def row_of(entry):
    return entry >> _ROW_BIT


@triton.jit
def tile_of(entry):
    return (entry >> _TILE_BIT) & 0x1FFF


@triton.jit
def held_of(entry):
    """Keys of the entry's tile."""
    return (entry >> _KEYS_BIT) & 0x7F


@triton.jit(do_not_specialize=["count"])
def _plan_kernel(
    seq_lens_ptr, units_ptr, count, MOST_ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """A row's entries; a row without keys has one, of none, so that zeros are written for it."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    rows = tl.arange(0, MOST_ROWS)
    lens = tl.load(seq_lens_ptr + rows, mask=rows < count, other=0)
    tiles = tl.where(rows < count, tl.maximum((lens + (TILE - 1)) // TILE, 1), 0)
    first = tl.sum(tl.where(rows < row, tiles, 0), 0)
    own = tl.sum(tl.where(rows == row, tiles, 0), 0)
    keys = tl.sum(tl.where(rows == row, lens, 0), 0)
    if row == 0:
        tl.store(units_ptr, tl.sum(tiles, 0))
    for start in range(0, own, STEP):
        tile = start + tl.arange(0, STEP)
        held = tl.minimum(keys - tile * TILE, TILE)
        entry = (row << _ROW_BIT) | (tile << _TILE_BIT) | (held << _KEYS_BIT) | (tile == own - 1).to(tl.int32)
        tl.store(units_ptr + FIRST + first + tile, entry, mask=tile < own)


@triton.jit
def _keep_part(acc, lse, partial_ptr, lse_ptr, slot, rows, dims, GROUP: tl.constexpr, D: tl.constexpr):
    mask = (rows < GROUP)[:, None] & (dims < D)[None, :]
    tl.store(partial_ptr + (slot * GROUP + rows)[:, None] * D + dims[None, :], acc, mask=mask)
    tl.store(lse_ptr + slot * GROUP + rows, lse, mask=rows < GROUP)


@triton.jit
def _join_parts(
    partial_ptr, lse_ptr, low, high, head, rows, dims, HK: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """The result of a row that the runs ``low`` to ``high`` have parts of: of the first its last part, of the others their first."""
    mask = (rows < GROUP)[:, None] & (dims < D)[None, :]
    m = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    for run in range(low, high + 1):
        at = ((run * 2 + (run == low).to(tl.int32)) * HK + head) * GROUP + rows
        lse = tl.load(lse_ptr + at, mask=rows < GROUP, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            partial_ptr + at[:, None] * D + dims[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
        acc, total, m = joined(acc, total, m, part, lse)
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _finish(
    partial_ptr, lse_ptr, counter_ptr, out_ptr, row, low, high, head, rows, dims, STRIDE_OUT: tl.constexpr,
    HK: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Join a row's parts, which are all there, and leave its counter as it was."""
    tl.store(counter_ptr + row * HK + head, 0)
    out = _join_parts(partial_ptr, lse_ptr, low, high, head, rows, dims, HK, GROUP, GROUP_PAD, D, D_PAD)
    offsets = (head * GROUP + rows)[:, None] * D + dims[None, :]
    mask = (rows < GROUP)[:, None] & (dims < D)[None, :]
    tl.store(out_ptr + row.to(tl.int64) * STRIDE_OUT + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_blocks", "stride_table"])
def _runs_kernel(
    q_ptr,
    kv_ptr,
    block_table_ptr,
    seq_lens_ptr,
    units_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    counter_ptr,
    num_blocks,
    stride_table,
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
    TILE: tl.constexpr,
    RUNS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    run = tl.program_id(1)
    # Before the wait: the list is written at the step's start, many kernels before this one.
    units = tl.load(units_ptr)
    length = tl.cdiv(units, RUNS)
    begin = run * length
    end = tl.minimum(begin + length, units)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if begin >= end:
        return
    rows = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, D_PAD)
    keys = tl.arange(0, TILE)
    q_mask = (rows < GROUP)[:, None] & (dims < D)[None, :]
    q_offsets = (head * GROUP + rows)[:, None] * D + dims[None, :]
    k_ptr = kv_ptr + head * (BLOCK_SIZE * D)
    v_ptr = k_ptr + num_blocks.to(tl.int64) * (HK * BLOCK_SIZE * D)

    m = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    entry = 0
    joined = -1  # the row, if any, that was begun before this run and whose parts are all there
    for unit in tl.range(begin, end, num_stages=STAGES):
        entry = tl.load(units_ptr + FIRST + unit)
        row = row_of(entry)
        tile = tile_of(entry)
        inside = keys < held_of(entry)
        table = block_table_ptr + row.to(tl.int64) * stride_table + tile * (TILE // BLOCK_SIZE)
        page = tl.load(table + keys // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        offsets = (page * (HK * BLOCK_SIZE * D) + (keys % BLOCK_SIZE) * D)[:, None] + dims[None, :]
        mask = inside[:, None]
        if D != D_PAD:
            mask = mask & (dims < D)[None, :]
        q = tl.load(q_ptr + row.to(tl.int64) * STRIDE_Q + q_offsets, mask=q_mask, other=0.0)
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k)) * qk_scale
        if SOFT_CAP > 0:
            s = capped(s, SOFT_CAP)
        s = tl.where(inside[None, :], s, float("-inf"))
        before = tl.where(tile == 0, float("-inf"), m)  # a row begins: what is summed counts nothing any more
        m_new = tl.maximum(before, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(before - shift)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None])
        m = m_new
        if entry & 1 != 0:
            result = acc * (v_scale / tl.where(total > 0, total, 1.0))[:, None]
            if unit - tile >= begin:
                out = result.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + row.to(tl.int64) * STRIDE_OUT + q_offsets, out, mask=q_mask)
            else:
                low = (unit - tile) // length
                slot = run * 2 * HK + head
                _keep_part(result, m + tl.log2(total), partial_ptr, lse_ptr, slot, rows, dims, GROUP, D)
                all_threads()  # all of this part is stored before one of its threads counts it
                if tl.atomic_add(counter_ptr + row * HK + head, 1, sem="acq_rel") == run - low:
                    joined = row

    if entry & 1 == 0:  # the run ends within a row
        row = row_of(entry)
        first = end - 1 - tile_of(entry)
        low = first // length
        high = (first + tl.cdiv(tl.load(seq_lens_ptr + row), TILE) - 1) // length
        result = acc * (v_scale / tl.where(total > 0, total, 1.0))[:, None]
        slot = (run * 2 + (run == low).to(tl.int32)) * HK + head
        _keep_part(result, m + tl.log2(total), partial_ptr, lse_ptr, slot, rows, dims, GROUP, D)
        all_threads()
        if tl.atomic_add(counter_ptr + row * HK + head, 1, sem="acq_rel") == high - low:
            _finish(
                partial_ptr, lse_ptr, counter_ptr, out_ptr, row, low, high, head, rows, dims,
                STRIDE_OUT, HK, GROUP, GROUP_PAD, D, D_PAD,
            )  # fmt: skip
    if joined >= 0:
        first = begin - tile_of(tl.load(units_ptr + FIRST + begin))
        _finish(
            partial_ptr, lse_ptr, counter_ptr, out_ptr, joined, first // length, run, head, rows, dims,
            STRIDE_OUT, HK, GROUP, GROUP_PAD, D, D_PAD,
        )  # fmt: skip


_PLAN = Kernel(_plan_kernel)
_RUNS = Kernel(_runs_kernel)


@dataclass(frozen=True, slots=True)
class RunsConfig:
    """Warps, steps in flight, and programs a multiprocessor."""

    num_warps: int
    num_stages: int
    per_processor: int

    def runs(self, num_kv_heads: int, device: torch.device) -> int:
        """How many programs share a KV head's tiles."""
        return max(1, processors(device) * self.per_processor // num_kv_heads)


def runs_config(head_dim: int) -> RunsConfig | None:
    """None where rows as they are were not found slower."""
    found = tuned.lookup("attention", f"runs/d{head_dim}/16bit")
    return None if found is None else RunsConfig(**found)


def takes_runs(kv_cache: Tensor) -> bool:
    """Whether `decode_runs_triton` serves such a cache, and queries of its dtype."""
    _, _, _, block_size, head_dim = kv_cache.shape
    plain = kv_cache.dtype in (torch.bfloat16, torch.float16) and not batch_invariant()
    return plain and TILE % block_size == 0 and runs_config(head_dim) is not None


def takes_streams(kv_cache: Tensor, num_rows: int, num_heads: int, soft_cap: float) -> bool:
    """Whether `kubeinfer.kernels.gluon_decode_streams` is to serve rows of so many heads, and of the cache's dtype.

    It can where heads are of 128, with up to 8 queries a KV head, and does where there are rows enough. On an H200 512 contexts of
    384 take 6% less time there and 256 of 512 10%; uneven ones take 1 to 6% more. ``benchmarks/kernels.py`` times both kernels.
    """
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    can = head_dim == 128 and num_heads <= 8 * num_kv_heads and block_size % 16 == 0 and soft_cap == 0
    return (
        can
        and kv_cache.is_cuda
        and runs_gluon()
        and 4 * num_rows >= 3 * stream_runs(num_kv_heads, kv_cache.device)
    )


def stream_runs(num_kv_heads: int, device: torch.device) -> int:
    """How many warps share a KV head's tiles there."""
    return max(1, processors(device) * _STREAMS_PER_PROCESSOR // num_kv_heads)


def runs_workspace_rows(num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> int:
    """Partial outputs that a launch over a list writes at most."""
    config = runs_config(head_dim)
    if config is None:
        return 0
    return 2 * num_heads * max(config.runs(num_kv_heads, device), stream_runs(num_kv_heads, device))


def list_tiles(seq_lens: Tensor, max_seq_len: int) -> Tensor | None:
    """The list for rows of ``seq_lens`` int32 ``[B]``, each at most ``max_seq_len``; None where it could not hold them."""
    count, tiles = seq_lens.shape[0], triton.cdiv(max_seq_len, TILE)
    if count > _MOST_ROWS or tiles > _MOST_TILES:
        return None
    units = torch.empty(FIRST.value + count * tiles, dtype=torch.int32, device=seq_lens.device)
    pdl = overlaps_launches()
    _PLAN.launch((count, 1, 1), (seq_lens, units, count), (_MOST_ROWS, TILE, 128, pdl), 4, pdl=pdl)
    return units


def decode_runs_triton(
    q: Tensor,
    kv_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    units: Tensor,
    qk_scale: float,
    v_scale: float,
    soft_cap: float,
    workspace: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Attention of the rows that ``units``, of `list_tiles`, lists; ``qk_scale`` is for powers of two.

    ``workspace``: partial results, their log-sum-exps, and counters, as of `kubeinfer.kernels.attention.DecodeWorkspace`.
    """
    _, num_heads, head_dim = q.shape
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    config = runs_config(head_dim)
    if config is None:
        raise ValueError(f"no configuration is known for heads of {head_dim}")
    group, pdl = num_heads // num_kv_heads, overlaps_launches()
    runs = config.runs(num_kv_heads, q.device)
    _RUNS.launch(
        (num_kv_heads, runs, 1),
        (
            q, kv_cache, block_table, seq_lens, units, out, *workspace, num_blocks, block_table.stride(0), qk_scale, v_scale,
        ),
        (
            q.stride(0), out.stride(0), num_kv_heads, group, max(16, triton.next_power_of_2(group)), head_dim,
            triton.next_power_of_2(head_dim), block_size, TILE, runs, soft_cap, config.num_stages, pdl,
        ),
        config.num_warps,
        config.num_stages,
        pdl,
    )  # fmt: skip
