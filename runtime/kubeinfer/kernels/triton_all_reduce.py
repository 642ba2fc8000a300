# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,attr-defined"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Triton kernels of `kubeinfer.kernels.all_reduce`: sums and gathers over memory that every rank of a group can read.

**How ranks meet.** Program ``b`` of each rank has a counter in every rank's memory for each source rank. At a meeting it
adds one to its counter at every peer (release, system scope: what this GPU wrote before is visible to who sees the
addition) and waits until the peers' additions have arrived in its own memory (acquire). Counters only grow, and how far
they have grown is kept beside them, so that a replayed CUDA graph goes on counting where the last call stopped; their
difference is taken modulo 2^32. All ranks make the same calls with the same grids, so program ``b`` has met its peers
equally often everywhere. At most ``Peers.programs`` programs run, few enough to be resident together, and each waits only for
its namesakes: none waits for a program that cannot start.

**What a meeting proves.** A program of call ``k`` starts its meeting after the kernel before it on the stream is complete
(``gdc_wait``; every kernel launched programmatically calls it, so all earlier ones are complete too). Whoever has passed the
meeting of call ``k`` therefore knows that on every rank all calls before ``k`` are complete: their reads of peer memory
included. A buffer read in call ``k - 1`` may be written again once call ``k`` is complete, which is why two buffers that
take turns need no closing meeting. `CLOSE` adds one, after which the call's own buffer is free too.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.all_reduce import MOST_RANKS, Peers
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches

_BLOCK = 2048  # columns that a program of the gather copies at a time


@triton.jit
def _peer_of_thread(peers_ptr, SIZE: tl.constexpr):
    """In thread ``t`` the address of rank ``t``'s counters: not one value, as Triton's scalars else are. For `_meet`."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .pred meets;
            .reg .u32 thread;
            .reg .u64 at;
            mov.u32 thread, %tid.x;
            setp.lt.u32 meets, thread, $2;
            mad.wide.u32 at, thread, 8, $1;
            mov.u64 $0, 0;
            @meets ld.global.u64 $0, [at];
        }
        """,
        "=&l,l,r",
        [peers_ptr.to(tl.uint64), SIZE],
        dtype=tl.uint64,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _meet(theirs, mine, program, met, limit, RANK: tl.constexpr, SIZE: tl.constexpr, RANKS: tl.constexpr):
    """Thread ``t`` tells rank ``t`` that this program is here and waits for its word; a trap after ``limit`` looks.

    ``theirs``: `_peer_of_thread`; ``mine``: the address of this rank's counters; ``met``: how often the program has met
    its peers before, which the counters must exceed. The caller puts a barrier of the program's threads before it, where
    they have written (their writes are then published with the thread's own), and after it.
    """
    return tl.inline_asm_elementwise(
        """
        {
            .reg .pred meets, over;
            .reg .u32 thread, slot, seen, left;
            .reg .u64 at;
            mov.u32 thread, %tid.x;
            setp.lt.u32 meets, thread, $5;
            setp.ne.and.u32 meets, thread, $6, meets;
            @!meets bra MET;
            mad.lo.u32 slot, $2, $7, $6;
            mad.wide.u32 at, slot, 4, $1;
            red.release.sys.global.add.u32 [at], 1;
            mad.lo.u32 slot, $2, $7, thread;
            mad.wide.u32 at, slot, 4, $8;
            mov.u32 left, $4;
        LOOK:
            ld.acquire.sys.global.u32 seen, [at];
            sub.s32 seen, seen, $3;
            setp.gt.s32 over, seen, 0;
            @over bra MET;
            sub.u32 left, left, 1;
            setp.ne.u32 over, left, 0;
            @over bra LOOK;
            trap;
        MET:
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r,r,r,r,r,r,l",
        [theirs, program, met, limit, SIZE, RANK, RANKS, mine],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["num_rows", "slot", "result", "limit", "eps"])
def _sum_rows_kernel(
    peers_ptr,
    meetings_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    slot,
    result,
    limit,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    SCATTER: tl.constexpr,
    CLOSE: tl.constexpr,
    MEET: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows are summed in the order of the ranks, in fp32: all ranks get the same bits.

    ``slot``, ``result``: where they begin in peer memory, in units of 256 elements. `SCATTER`: this rank sums its own
    share of the rows and writes the results to every rank's ``result``; else it sums all rows into ``out``.
    """
    element = out_ptr.dtype.element_ty
    program, programs = tl.program_id(0), tl.num_programs(0)
    slot, result = slot * 256, result * 256
    columns = tl.arange(0, H_PAD)
    mask = columns < H
    stride = tl.full([], H, tl.int64)
    if NORM:
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    peers = ()
    for p in tl.static_range(SIZE):
        peers = peers + (tl.multiple_of(tl.load(peers_ptr + p).to(tl.pointer_type(element)), 16),)
    if MEET:
        theirs, mine = _peer_of_thread(peers_ptr, SIZE), tl.load(peers_ptr + RANK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if MEET:
        met = tl.load(meetings_ptr + program)
        _meet(theirs, mine, program, met, limit, RANK, SIZE, RANKS)
        tl.debug_barrier()

    first, last = 0, num_rows
    if SCATTER:
        share = (num_rows + SIZE - 1) // SIZE
        first = RANK * share
        last = tl.minimum(first + share, num_rows)
    for row in range(first + program, last, programs):
        at = row * stride + columns
        total = tl.zeros([H_PAD], tl.float32)
        if ADD:
            residual = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        for p in tl.static_range(SIZE):
            total += tl.load(peers[p] + slot + at, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            total += residual
        # The norm is of what is stored, so that it does not matter where the sum was rounded.
        rounded = total.to(element)
        if ADD:
            tl.store(residual_ptr + at, rounded, mask=mask)
        if NORM:
            wide = rounded.to(tl.float32)
            rounded = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps) * weight).to(element)
        if SCATTER:
            for p in tl.static_range(SIZE):
                tl.store(peers[p] + result + at, rounded, mask=mask)
        else:
            tl.store(out_ptr + at, rounded, mask=mask)

    if MEET:
        if CLOSE:
            tl.debug_barrier()
            met += 1
            _meet(theirs, mine, program, met, limit, RANK, SIZE, RANKS)
        tl.debug_barrier()
        tl.store(meetings_ptr + program, met + 1)


@triton.jit(do_not_specialize=["num_rows", "slot", "limit"])
def _gather_kernel(
    peers_ptr,
    meetings_ptr,
    out_ptr,
    num_rows,
    slot,
    limit,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOTAL: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    MEET: tl.constexpr,
    PDL: tl.constexpr,
):
    """Every rank's ``[num_rows, WIDTH]`` side by side, as far as column ``TOTAL``; ends with a closing meeting."""
    element = out_ptr.dtype.element_ty
    program, programs = tl.program_id(0), tl.num_programs(0)
    slot *= 256
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    stride, stride_out = tl.full([], WIDTH, tl.int64), tl.full([], STRIDE_OUT, tl.int64)
    if MEET:
        theirs, mine = _peer_of_thread(peers_ptr, SIZE), tl.load(peers_ptr + RANK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if MEET:
        met = tl.load(meetings_ptr + program)
        _meet(theirs, mine, program, met, limit, RANK, SIZE, RANKS)
        tl.debug_barrier()
    for tile in range(program, num_rows * SIZE * BLOCKS, programs):
        # Ranks begin with different peers.
        p = (tile // BLOCKS + RANK) % SIZE
        row = tile // (BLOCKS * SIZE)
        columns = (tile % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        mask = (columns < WIDTH) & (p * WIDTH + columns < TOTAL)
        peer = tl.multiple_of(tl.load(peers_ptr + p).to(tl.pointer_type(element)), 16)
        values = tl.load(peer + slot + row * stride + columns, mask=mask)
        tl.store(out_ptr + row * stride_out + p * WIDTH + columns, values, mask=mask)
    if MEET:
        tl.debug_barrier()
        _meet(theirs, mine, program, met + 1, limit, RANK, SIZE, RANKS)
        tl.debug_barrier()
        tl.store(meetings_ptr + program, met + 2)


_SUM_ROWS = Kernel(_sum_rows_kernel)
_GATHER = Kernel(_gather_kernel)


@functools.cache
def _sum_config(width: int) -> tuple[int, int]:
    """Padded width and warps."""
    padded = triton.next_power_of_2(width)
    return padded, min(8, max(1, padded // 512))


def sum_rows_triton(
    peers: Peers,
    slot: int,
    rows: int,
    width: int,
    out: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    result: int,
    close: bool,
) -> None:
    """`kubeinfer.kernels.all_reduce.sum_rows` on a GPU."""
    padded, num_warps = _sum_config(width)
    itemsize = out.element_size()
    scatter = result >= 0
    pdl = overlaps_launches()
    share = -(-rows // peers.size) if scatter else rows
    args = (
        peers.addresses, peers.meetings, out if residual is None else residual, out if weight is None else weight, out,
        rows, slot // (256 * itemsize), max(0, result) // (256 * itemsize), peers.limit, eps,
    )  # fmt: skip
    constants = (
        peers.rank, peers.size, MOST_RANKS, width, padded, residual is not None, weight is not None, scatter,
        close or scatter, peers.meet, pdl,
    )  # fmt: skip
    _SUM_ROWS.launch((min(share, peers.programs), 1, 1), args, constants, num_warps, pdl=pdl)


def gather_columns_triton(peers: Peers, slot: int, rows: int, width: int, out: Tensor) -> None:
    """`kubeinfer.kernels.all_reduce.gather_columns` on a GPU."""
    pdl = overlaps_launches()
    tiles = rows * peers.size * triton.cdiv(width, _BLOCK)
    args = (peers.addresses, peers.meetings, out, rows, slot // (256 * out.element_size()), peers.limit)
    constants = (
        peers.rank, peers.size, MOST_RANKS, width, out.shape[1], out.stride(0), _BLOCK, peers.meet, pdl,
    )  # fmt: skip
    _GATHER.launch((min(tiles, peers.programs), 1, 1), args, constants, 4, pdl=pdl)
