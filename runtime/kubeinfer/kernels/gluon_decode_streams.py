# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc,var-annotated"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Gluon kernel of `kubeinfer.kernels.triton_decode_runs` for Hopper, heads of 128 and up to 8 queries a KV head: a warp a run.

A warp waits for no other. Bulk copies bring 16 keys and their values at a time into a ring in shared memory, several of them ahead;
what was written before the step begins to come before the kernel before has ended.

Fragments of `mma` (16 x 8 x 16), for thread ``4 g + t`` of a warp; which inner index is which may be chosen, if both operands agree:

- ``q @ k.T``: on the left queries (row ``g``; rows 8 to 15 are zero), on the right keys (column ``g`` of eight). Inner indices are
  such that a thread's are eight dimensions side by side, ``32 u + 8 t`` on: one load of 16 bytes a key.
- ``v.T @ p.T``: on the left values, where of the eight products ``i`` has dimension ``8 g + i`` in row ``g`` and ``64 + 8 g + i`` in row
  ``g + 8``: a thread reads 16 bytes of four keys, and pairs them. On the right are weights, in the places where the first product
  left its results. A thread's results are eight dimensions side by side of the queries ``2 t`` and ``2 t + 1``.

Keys and values are rows of 256 bytes in shared memory: threads that read the same place of different rows want the same banks.
Which key is in which column of the first product, and half of the values 64 bytes on, are such that no more than two do at once.
(With all rows moved apart none do, but copies of 1 KB, which that takes, are slower than that.)
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kubeinfer.kernels.gluon_bulk import (
    before_copies,
    copy_page,
    count_up,
    init_barrier,
    put4,
    shared4,
    shared_base,
    wait_barrier,
    wait_for_kernel_before,
)
from kubeinfer.kernels.triton_decode_runs import FIRST, TILE, held_of, row_of, stream_runs, tile_of
from kubeinfer.kernels.triton_launch import Kernel
from kubeinfer.kernels.triton_mma import (
    first_halves,
    fresh4,
    from_thread,
    mma,
    pair,
    read4,
    second_halves,
    write4,
)

_SLOTS = 3  # pages on their way to a warp
# Bytes of one: a page's keys, its values, and what half of these are moved by (twice, so that slots begin in the same bank).
_SLOT = gl.constexpr(2 * 4096 + 2 * 64)


@gluon.jit
def _value_place(key):
    """Where a slot has the values of a page's ``key``: `copy_page`."""
    return 4096 + key * 256 + key // 8 * 64


@gluon.jit
def _block(entry, page, block_table_ptr, stride_table, TILE: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """The block that holds a tile's page."""
    row = row_of(entry)
    return gl.load(
        block_table_ptr + row.to(gl.int64) * stride_table + (tile_of(entry) * TILE + page * 16) // BLOCK_SIZE
    )


@gluon.jit
def _page_after(
    cursor, end, units_ptr, block_table_ptr, stride_table, TILE: gl.constexpr, BLOCK_SIZE: gl.constexpr
):
    """A cursor: the unit, the page of its tile, its entry and the entry after it, the page's block. All is known a page before it is
    used."""
    unit, page, entry, coming, block = cursor
    page += 1
    if page * 16 >= held_of(entry):
        page = page * 0
        unit += 1
        entry = coming
        coming = gl.load(units_ptr + gl.minimum(unit + 1, end - 1))
    block = _block(entry, page, block_table_ptr, stride_table, TILE, BLOCK_SIZE)
    return unit, page, entry, coming, block


@gluon.jit
def _copy(
    cursor, end, wanted, barrier_at, ring_at, slot, seen, k_ptr, v_ptr, HK: gl.constexpr, BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """Ask for the cursor's page."""
    unit, page, _, _, block = cursor
    offset = block.to(gl.int64) * (HK * BLOCK_SIZE * 128) + page * 16 % BLOCK_SIZE * 128
    wanted = wanted & (unit < end).to(gl.int32)
    at = ring_at + slot * _SLOT
    copy_page(wanted, barrier_at + slot * 8, at, seen, k_ptr + offset, v_ptr + offset)


@gluon.jit
def _queries(q_ptr, lane, GROUP: gl.constexpr):
    """A thread's words of the queries; a group's last stands for those it lacks."""
    at = q_ptr + gl.minimum(lane // 4, GROUP - 1) * 128 + lane % 4 * 8
    found = ()
    for u in gl.static_range(4):
        found = found + read4(at + 32 * u, lane, True)
    return found


@gluon.jit
def _of_columns(values, lane):
    """Of numbers of queries ``g``, those of queries ``2 t`` and ``2 t + 1``."""
    return from_thread(values, lane % 4 * 8), from_thread(values, lane % 4 * 8 + 4)


@gluon.jit
def _scaled(acc, even, odd):
    found = ()
    for i in gl.static_range(16):
        found = found + (acc[2 * i] * even, acc[2 * i + 1] * odd)
    return found


@gluon.jit
def _add_values(low, high, at, first, second, acc, BF16: gl.constexpr):
    """``acc`` (eight times four numbers a thread) plus a page's values times their weights. ``first``, ``second``: where keys are."""
    v = ()
    for key in gl.static_range(4):
        place = at + (second if key % 2 == 1 else first) + key // 2 * 256
        v = v + shared4(place) + shared4(place + 128)
    for w in gl.static_range(4):
        # The eight of ``acc`` in turns.
        a0, a1 = first_halves(v[w], v[8 + w]), first_halves(v[4 + w], v[12 + w])
        a2, a3 = first_halves(v[16 + w], v[24 + w]), first_halves(v[20 + w], v[28 + w])
        acc = acc[4:] + mma(a0, a1, a2, a3, low, high, acc[:4], BF16)
        a0, a1 = second_halves(v[w], v[8 + w]), second_halves(v[4 + w], v[12 + w])
        a2, a3 = second_halves(v[16 + w], v[24 + w]), second_halves(v[20 + w], v[28 + w])
        acc = acc[4:] + mma(a0, a1, a2, a3, low, high, acc[:4], BF16)
    return acc


@gluon.jit
def _clear_values(at, count, lane):
    """Zeros for the values of a page after the first ``count``: they may be anything, NaN too, and zero times them must be zero."""
    zero = lane * 0
    for i in gl.static_range(8):
        item = 32 * i + lane
        key = item // 16
        place = at + _value_place(key) + item % 16 * 16
        put4(place, (key >= count).to(gl.int32), zero, zero, zero, zero)
    before_copies(lane)


@gluon.jit
def _put_result(out_ptr, result, lane, GROUP: gl.constexpr, BF16: gl.constexpr):
    for e in gl.static_range(2):
        query = lane % 4 * 2 + e
        for c in gl.static_range(2):
            words = ()
            for i in gl.static_range(4):
                words = words + (pair(result[8 * i + 2 * c + e], result[8 * i + 4 + 2 * c + e], BF16),)
            at = out_ptr + query * 128 + lane // 4 * 8 + 64 * c
            write4(at, (query < GROUP).to(gl.int32), words[0], words[1], words[2], words[3])


@gluon.jit
def _put_part(partial_ptr, lse_ptr, slot, result, lse, lane, GROUP: gl.constexpr):
    for e in gl.static_range(2):
        query = lane % 4 * 2 + e
        inside = (query < GROUP).to(gl.int32)
        for c in gl.static_range(2):
            at = partial_ptr + (slot * GROUP + query) * 128 + lane // 4 * 8 + 64 * c
            for half in gl.static_range(2):
                words = ()
                for i in gl.static_range(4):
                    words = words + (result[16 * half + 4 * i + 2 * c + e].to(gl.int32, bitcast=True),)
                write4(at + 4 * half, inside, words[0], words[1], words[2], words[3])
    gl.store(lse_ptr + slot * GROUP + lane // 4, lse, mask=(lane % 4 == 0) & (lane // 4 < GROUP))


@gluon.jit
def _join_parts(partial_ptr, lse_ptr, low, high, head, lane, HK: gl.constexpr, GROUP: gl.constexpr):
    """The result of a row that the runs ``low`` to ``high`` have parts of: of the first its last part, of the others their first."""
    L: gl.constexpr = lane.type.layout
    nothing = gl.zeros([32], gl.float32, L)
    none = nothing + float("-inf")
    m = (none, none)
    total = (nothing, nothing)
    acc = (nothing,) * 32
    for run in range(low, high + 1):
        base = ((run * 2 + (run == low).to(gl.int32)) * HK + head) * GROUP
        new_m = ()
        old = ()
        new = ()
        new_total = ()
        places = ()
        for e in gl.static_range(2):
            at = base + gl.minimum(lane % 4 * 2 + e, GROUP - 1)
            lse = gl.load(lse_ptr + at, cache_modifier=".cg")
            most = gl.maximum(m[e], lse)
            shift = gl.where(most == float("-inf"), 0.0, most)
            new_m = new_m + (most,)
            old = old + (gl.exp2(m[e] - shift),)
            new = new + (gl.exp2(lse - shift),)
            new_total = new_total + (total[e] * old[e] + new[e],)
            places = places + (partial_ptr + at * 128 + lane // 4 * 8,)
        m = new_m
        total = new_total
        parts = ()
        for e in gl.static_range(2):
            for c in gl.static_range(2):
                parts = parts + fresh4(places[e] + 64 * c) + fresh4(places[e] + (64 * c + 4))
        sums = ()
        for i in gl.static_range(8):
            for c in gl.static_range(2):
                for e in gl.static_range(2):
                    part = parts[16 * e + 8 * c + i].to(gl.float32, bitcast=True)
                    sums = sums + (acc[4 * i + 2 * c + e] * old[e] + part * new[e],)
        acc = sums
    even = 1.0 / gl.where(total[0] > 0, total[0], 1.0)
    odd = 1.0 / gl.where(total[1] > 0, total[1], 1.0)
    return _scaled(acc, even, odd)


@gluon.jit(do_not_specialize=["num_blocks", "stride_table", "runs"])
def _streams_kernel(
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
    runs,
    qk_scale,
    v_scale,
    STRIDE_Q: gl.constexpr,
    STRIDE_OUT: gl.constexpr,
    HK: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    SLOTS: gl.constexpr,
    BARRIERS: gl.constexpr,
    BYTES: gl.constexpr,
):
    BF16: gl.constexpr = q_ptr.dtype.element_ty == gl.bfloat16
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, L)
    head = gl.program_id(0)
    run = gl.program_id(1)
    # The list and the table are written at the step's start, many kernels before this one.
    units = gl.load(units_ptr)
    units_ptr += FIRST
    length = gl.cdiv(units, runs)
    begin = run * length
    end = gl.minimum(begin + length, units)
    if begin >= end:
        wait_for_kernel_before(lane)
        return
    q_ptr += head * (GROUP * 128)
    out_ptr += head * (GROUP * 128)
    k_ptr = kv_ptr + head * (BLOCK_SIZE * 128)
    v_ptr = k_ptr + num_blocks.to(gl.int64) * (HK * BLOCK_SIZE * 128)

    shared = gl.allocate_shared_memory(gl.int64, [BYTES // 8, 1], mbarrier.MBarrierLayout())
    # Not used: only what is used is there. Its memory is its own: on a busy multiprocessor the first copy can be there before the
    # barrier, which then lies in the keys (PTX forbids other uses of a barrier's memory).
    mbarrier.init(shared.index(BYTES // 8 - 1), 1)
    ring_at = shared_base(lane)
    barrier_at = ring_at + BARRIERS
    init_barrier(barrier_at + lane * 8, (lane < SLOTS).to(gl.int32))
    zero = lane * 0
    nothing = gl.zeros([32], gl.float32, L)
    none = nothing + float("-inf")
    entry = gl.load(units_ptr + begin)
    start = begin * 0
    coming = gl.load(units_ptr + gl.minimum(begin + 1, end - 1))
    block = _block(entry, start, block_table_ptr, stride_table, TILE, BLOCK_SIZE)
    first_page = (begin, start, entry, coming, block)
    for when in gl.static_range(2):
        if when == 1:
            wait_for_kernel_before(lane)
        # All of a row's keys but the last were there before this step: pages before the first row's end come early.
        early = zero + 1
        cursor = first_page
        for slot in range(SLOTS):
            ends = (cursor[2] & 1) * (cursor[1] * 16 + 16 >= held_of(cursor[2])).to(gl.int32)
            early = early * (1 - ends)
            wanted = 1 - early if when == 1 else early
            _copy(cursor, end, wanted, barrier_at, ring_at, slot, lane, k_ptr, v_ptr, HK, BLOCK_SIZE)
            cursor = _page_after(cursor, end, units_ptr, block_table_ptr, stride_table, TILE, BLOCK_SIZE)

    # Where a page has a thread's columns of keys, and those of its values.
    group, column = lane // 4, lane % 4
    key_at = ((group // 2 + group % 2 * 2) % 4 * 4 + group % 2 * 2) * 256 + column * 16
    first_at = _value_place(column * 4) + group * 16
    second_at = _value_place((column + 2) % 4 * 4 + 2) + group * 16
    queries = (zero,) * 16
    m = none
    total = nothing
    acc = (nothing,) * 32
    slot = start
    phase = start
    # The rows, if any, of which others have parts too: the one that was begun before this run, and the one that it leaves.
    begun_row = start - 1
    begun_low = start
    left_row = start - 1
    left_low = start
    left_high = start
    for unit in range(begin, end):
        row = row_of(entry)
        tile = tile_of(entry)
        held = held_of(entry)
        following = gl.load(units_ptr + gl.minimum(unit + 1, end - 1))
        if (tile == 0) | (unit == begin):
            queries = _queries(q_ptr + row.to(gl.int64) * STRIDE_Q, lane, GROUP)
            m = none
            total = nothing
            acc = (nothing,) * 32
        for page in range(gl.maximum((held + 15) // 16, 1)):
            wait_barrier(barrier_at + slot * 8, zero + phase)
            at = ring_at + slot * _SLOT
            count = held - 16 * page
            s = ()
            for j in gl.static_range(2):
                k = ()
                for u in gl.static_range(4):
                    k = k + shared4(at + key_at + (256 * j + 64 * u))
                sums = (nothing,) * 8
                for i in gl.static_range(8):  # two chains in turns
                    found = mma(
                        queries[2 * i], zero, queries[2 * i + 1], zero, k[2 * i], k[2 * i + 1], sums[:4], BF16
                    )
                    sums = sums[4:] + found
                for e in gl.static_range(2):
                    key = (column + 2 * e) % 4 * 4 + (2 * e + j)
                    s = s + (gl.where(key < count, (sums[e] + sums[4 + e]) * qk_scale, float("-inf")),)
            most = gl.maximum(gl.maximum(s[0], s[1]), gl.maximum(s[2], s[3]))
            most = gl.maximum(most, from_thread(most, lane ^ 1))
            most = gl.maximum(m, gl.maximum(most, from_thread(most, lane ^ 2)))
            shift = gl.where(most == float("-inf"), 0.0, most)
            alpha = gl.exp2(m - shift)
            m = most
            p = (gl.exp2(s[0] - shift), gl.exp2(s[1] - shift), gl.exp2(s[2] - shift), gl.exp2(s[3] - shift))
            total = total * alpha + ((p[0] + p[1]) + (p[2] + p[3]))
            if count < 16:
                _clear_values(at, count, lane)
            even, odd = _of_columns(alpha, lane)
            acc = _add_values(
                pair(p[0], p[1], BF16),
                pair(p[2], p[3], BF16),
                at,
                first_at,
                second_at,
                _scaled(acc, even, odd),
                BF16,
            )
            seen = acc[0].to(gl.int32, bitcast=True)  # made of all that was read
            _copy(cursor, end, zero + 1, barrier_at, ring_at, slot, seen, k_ptr, v_ptr, HK, BLOCK_SIZE)
            cursor = _page_after(cursor, end, units_ptr, block_table_ptr, stride_table, TILE, BLOCK_SIZE)
            slot += 1
            if slot == SLOTS:
                slot = start
                phase = phase ^ 1
        if (entry & 1 != 0) | (unit == end - 1):
            # A row ends, or the run within one.
            total += from_thread(total, lane ^ 1)
            total += from_thread(total, lane ^ 2)
            even, odd = _of_columns(gl.where(total > 0, v_scale / total, 0.0), lane)
            result = _scaled(acc, even, odd)
            low = (unit - tile) // length  # the first and the last run that have parts of the row
            high = run
            if entry & 1 == 0:
                high = (unit - tile + gl.cdiv(gl.load(seq_lens_ptr + row), TILE) - 1) // length
            if low == high:
                _put_result(out_ptr + row.to(gl.int64) * STRIDE_OUT, result, lane, GROUP, BF16)
            else:
                part = (run * 2 + (run == low).to(gl.int32)) * HK + head
                _put_part(partial_ptr, lse_ptr, part, result, m + gl.log2(total), lane, GROUP)
                if entry & 1 == 0:
                    left_row = row
                    left_low = low
                    left_high = high
                else:
                    begun_row = row
                    begun_low = low
        entry = following
    # Counted at the end: a warp that counts waits until its stores are seen everywhere, and nothing comes for it meanwhile.
    for which in range(2):
        row = gl.where(which == 0, begun_row, left_row)
        low = gl.where(which == 0, begun_low, left_low)
        high = gl.where(which == 0, run, left_high)
        if row >= 0:
            counter = counter_ptr + row * HK + head
            if count_up(counter) == high - low:  # the last to arrive
                gl.store(counter, 0)
                result = _join_parts(partial_ptr, lse_ptr, low, high, head, lane, HK, GROUP)
                _put_result(out_ptr + row.to(gl.int64) * STRIDE_OUT, result, lane, GROUP, BF16)


_STREAMS = Kernel(_streams_kernel)


def decode_streams_gluon(
    q: Tensor,
    kv_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    units: Tensor,
    qk_scale: float,
    v_scale: float,
    workspace: tuple[Tensor, Tensor, Tensor],
) -> None:
    """`kubeinfer.kernels.triton_decode_runs.decode_runs_triton` where `takes_streams`."""
    _, num_heads, _ = q.shape
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    runs = stream_runs(num_kv_heads, q.device)
    barriers = _SLOTS * _SLOT.value
    _STREAMS.launch(
        (num_kv_heads, runs, 1),
        (
            q, kv_cache, block_table, seq_lens, units, out, *workspace, num_blocks, block_table.stride(0), runs, qk_scale,
            v_scale,
        ),
        (
            q.stride(0), out.stride(0), num_kv_heads, num_heads // num_kv_heads, block_size, TILE, _SLOTS, barriers,
            barriers + 8 * _SLOTS + 8,
        ),
        1,
        pdl=True,
    )  # fmt: skip
