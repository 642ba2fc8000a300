# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Gluon kernel of `kubeinfer.kernels.fused_linear` for many tokens on Hopper: a product whose epilogue is the gated activation.

What goes to memory is half of what cuBLAS writes, and no second kernel reads it back.

One program a multiprocessor goes through tiles of 128 tokens and 128 outputs. A warp has the copy engine (TMA) bring the operands
of the steps to come into a ring in shared memory, across the ends of tiles too; two warpgroups of 64 tokens each multiply what is
there, gates and ups of a tile in one instruction. The bounds are the tensors', so that no size needs to be a multiple of a
tile's: what is read past the end is zero, what is written there is dropped.

The number of tiles is seldom a multiple of the number of programs. Tiles that would be a last wave come first, and where they would
leave half of the programs idle each is two programs' (the idea of stream-K: Osama et al., arXiv 2301.03598): who has the second
half of a tile's steps leaves the sums in memory, the other finishes it. Shorter parts would cost more than they save: a part's sums
are 128 KB. All programs are on the GPU at once, so none waits for one that has not begun.

Programs may be paired: two of neighbouring rows have the same columns at the same time, and either brings half of the weights for
both, of which the L2 cache then gives a third less in all. What is said of programs above goes for pairs then.
"""

from __future__ import annotations

import functools

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kubeinfer.kernels import tuned
from kubeinfer.kernels.fused_linear import MIN_MANY_ROWS, GatedForm
from kubeinfer.kernels.gluon_bulk import shared_base, wait_for_kernel_before
from kubeinfer.kernels.gluon_gate import activated, halves, with_bias
from kubeinfer.kernels.gluon_pair import arrive_at_both, barriers_at, meet
from kubeinfer.kernels.triton_launch import Kernel, processors, wait_for_count
from kubeinfer.kernels.triton_split import MAX_TILES, scratch

_BLOCK_M = 128
_BLOCK_N = 128
_BLOCK_K = 64
_STAGES = 4
# A third of a multiprocessor's registers for each of three warpgroups: the consumers take what the producer gives up.
_REGISTERS = 168


@gluon.jit
def _plan(rows, STEPS: gl.constexpr, COLUMNS: gl.constexpr, EACH: gl.constexpr):
    """What one of EACH programs has to do, for `_work`, in how many pieces, and in how many steps: of the tiles that fill no wave one,
    half of one (of several steps) or none; and of each whole wave one."""
    programs = gl.num_programs(0) // EACH
    own = gl.program_id(0) // EACH
    waves = rows * COLUMNS // programs
    odd_tiles = rows * COLUMNS - waves * programs
    HALF: gl.constexpr = (STEPS + 1) // 2
    first = 0
    last = STEPS
    if STEPS > 1 and 2 * odd_tiles <= programs:
        first = own % 2 * HALF
        last = gl.minimum(first + HALF, STEPS)
        own = own // 2
    has_own = (own < odd_tiles).to(gl.int32)
    return (own, first, last, has_own, odd_tiles), has_own + waves, has_own * (last - first) + waves * STEPS


@gluon.jit
def _work(plan, i, STEPS: gl.constexpr, EACH: gl.constexpr):
    """A program's ``i``-th piece of work: the tile, its first step, and the step it ends before."""
    own, first, last, has_own, odd_tiles = plan
    whole = i >= has_own
    tile = odd_tiles + (i - has_own) * (gl.num_programs(0) // EACH) + gl.program_id(0) // EACH
    return gl.where(whole, tile, own), gl.where(whole, 0, first), gl.where(whole, STEPS, last)


@gluon.jit
def _place(tile, rows, COLUMNS: gl.constexpr, GROUP: gl.constexpr, EACH: gl.constexpr):
    """The row and the column of a tile. Tiles of GROUP rows and the same column are neighbours in time, which share weights in the
    L2 cache; every other group goes through the columns backwards, and begins with the weights that the one before ended with."""
    group = tile // (GROUP * COLUMNS)
    within = tile % (GROUP * COLUMNS)
    height = gl.minimum(rows - group * GROUP, GROUP)
    column = within // height
    if group % 2 == 1:
        column = COLUMNS - 1 - column
    return (group * GROUP + within % height) * EACH + gl.program_id(0) % EACH, column


@gluon.jit
def _fetch_weights(w_rows, w, ready, at, column, k, N: gl.constexpr):
    """Gates, and behind them ups."""
    BLOCK_N: gl.constexpr = w.shape[1] // 2
    both = w.index(at)
    tma.async_copy_global_to_shared(w_rows, [column * BLOCK_N, k], ready.index(at), both.slice(0, BLOCK_N))
    tma.async_copy_global_to_shared(
        w_rows, [N + column * BLOCK_N, k], ready.index(at), both.slice(BLOCK_N, BLOCK_N)
    )


@gluon.jit
def _fetch_half_for_both(to, barrier, row, k):
    """The weights' rows from ``row`` on, for the same places of both programs' shared memories, whose barriers count them.

    Gluon has no copy to several. Of `_gated_kernel` a descriptor is five parameters, so that the weights' own is number 5.
    """
    gl.inline_asm_elementwise(
        """{
        .reg .pred lead;
        .reg .b64 rows;
        .reg .b16 both;
        mov.b64 rows, _gated_kernel_param_5;
        cvta.param.u64 rows, rows;
        mov.b16 both, 3;
        bar.warp.sync 0xFFFFFFFF;
        elect.sync _|lead, 0xFFFFFFFF;
        @lead cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
            [$1], [rows, {$4, $3}], [$2], both;
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r", [to, barrier, row, k], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _fetch_tokens(x_rows, x, ready, at, row, k):
    """Those of either warpgroup."""
    HALF: gl.constexpr = x.shape[1]
    tma.async_copy_global_to_shared(x_rows, [row * (2 * HALF), k], ready.index(at), x.index(2 * at))
    tma.async_copy_global_to_shared(
        x_rows, [row * (2 * HALF) + HALF, k], ready.index(at), x.index(2 * at + 1)
    )


@gluon.jit
def _produce(
    x_rows, w_rows, meetings_ptr, ring, plan, pieces, rows, N: gl.constexpr, STEPS: gl.constexpr,
    COLUMNS: gl.constexpr, GROUP: gl.constexpr, EACH: gl.constexpr, BARRIER_BYTES: gl.constexpr,
):  # fmt: skip
    x, w, ready, free, met = ring
    STAGES: gl.constexpr = w.shape[0]
    BLOCK_N: gl.constexpr = w.shape[1] // 2
    BLOCK_K: gl.constexpr = x.shape[2]
    HALF_BYTES: gl.constexpr = w_rows.block_type.nbytes
    BYTES: gl.constexpr = 2 * (x_rows.block_type.nbytes + w_rows.block_type.nbytes)
    ahead = 0
    if pieces > 0:
        # Weights do not depend on the kernel before this one.
        tile, first, last = _work(plan, 0, STEPS, EACH)
        row, column = _place(tile, rows, COLUMNS, GROUP, EACH)
        ahead = gl.minimum(last - first, STAGES)
        for i in range(ahead):
            mbarrier.expect(ready.index(i), BYTES)
            _fetch_weights(w_rows, w, ready, i, column, (first + i) * BLOCK_K, N)
        wait_for_kernel_before(gl.program_id(0))
        for i in range(ahead):
            _fetch_tokens(x_rows, x, ready, i, row, (first + i) * BLOCK_K)
    rank = gl.program_id(0) % EACH
    weights_at = shared_base(rank) + rank * HALF_BYTES
    ready_at = barriers_at(rank, BARRIER_BYTES)
    if EACH == 2:
        # The ring's first round was for this program only; then each writes into the other's memory, which must be there.
        meet(meetings_ptr + gl.program_id(0) // 2)
        mbarrier.arrive(met.index(0))
    count = 0
    for i in range(pieces):
        tile, first, last = _work(plan, i, STEPS, EACH)
        row, column = _place(tile, rows, COLUMNS, GROUP, EACH)
        for step in range(first, last):
            if count >= ahead:
                at = count % STAGES
                # The first round waits for the phase before a barrier's first, which counts as over.
                mbarrier.wait(free.index(at), (count // STAGES & 1) ^ 1)
                mbarrier.expect(ready.index(at), BYTES)
                if EACH == 2:
                    _fetch_half_for_both(
                        weights_at + at * (2 * HALF_BYTES),
                        ready_at + at * 8,
                        rank * N + column * BLOCK_N,
                        step * BLOCK_K,
                    )
                else:
                    _fetch_weights(w_rows, w, ready, at, column, step * BLOCK_K, N)
                _fetch_tokens(x_rows, x, ready, at, row, step * BLOCK_K)
            count += 1


@gluon.jit
def _by_thread(sums):
    """Where a warpgroup's sums go in memory: a thread's at equal distances, and those of all threads side by side."""
    L: gl.constexpr = sums.type.layout
    row = gl.arange(0, sums.shape[0], gl.SliceLayout(1, L))[:, None]
    column = gl.arange(0, sums.shape[1], gl.SliceLayout(0, L))[None, :]
    thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
    at = (column // 8 * 2 + row % 16 // 8) * 256 + thread * 2 + column % 2
    return gl.max_contiguous(gl.multiple_of(at, [1, 2]), [1, 2])


@gluon.jit
def _set_free(free, free_at, at, lane, is_read, is_needed, EACH: gl.constexpr):
    """A warpgroup has read a place of the ring; for whoever needs it next in a pair: none waits for more, and may have ended."""
    if EACH == 2:
        arrive_at_both(free_at + at * 8, lane, (is_read & is_needed).to(gl.int32))
    else:
        mbarrier.arrive(free.index(at), pred=is_read)


@gluon.jit
def _consume(
    out_rows, bias_ptr, sums_ptr, counter_ptr, ring, places, plan, pieces, total, rows, N: gl.constexpr,
    STEPS: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, EACH: gl.constexpr,
    BARRIER_BYTES: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """The tokens of one warpgroup: ``PART`` 0 or 1."""
    x, w, ready, free, met = ring
    STAGES: gl.constexpr = w.shape[0]
    M: gl.constexpr = x.shape[1]
    BLOCK_N: gl.constexpr = w.shape[1] // 2
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_N, 16])
    wait_for_kernel_before(gl.program_id(0))
    zeros = gl.zeros([M, 2 * BLOCK_N], gl.float32, L)
    within = _by_thread(zeros)
    place = places.index(PART)
    lane = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])) % 32
    free_at = barriers_at(lane, BARRIER_BYTES) + 8 * STAGES
    if EACH == 2:
        mbarrier.wait(met.index(0), 0)
    count = 0
    for i in range(pieces):
        tile, first, last = _work(plan, i, STEPS, EACH)
        sums = zeros
        for step in range(first, last):
            at = count % STAGES
            mbarrier.wait(ready.index(at), count // STAGES & 1)
            sums = warpgroup_mma(x.index(2 * at + PART), w.index(at).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=(sums,))
            # The step before has been multiplied.
            before = count + STAGES - 1
            _set_free(free, free_at, before % STAGES, lane, step > first, before < total, EACH)
            count += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        before = count + STAGES - 1
        _set_free(free, free_at, before % STAGES, lane, last > first, before < total, EACH)

        part = 2 * (tile * EACH + gl.program_id(0) % EACH) + PART
        slot = sums_ptr + part * (2 * M * BLOCK_N) + within
        counter = counter_ptr + part
        if first > 0:
            gl.store(slot, sums)
            gl.thread_barrier()  # all of this warpgroup's sums are stored before one of its threads counts it
            gl.atomic_add(counter, 1, sem="release")
        else:
            if last < STEPS:
                wait_for_count(counter, 1)
                gl.thread_barrier()
                gl.store(counter, 0)
                sums += gl.load(slot, cache_modifier=".cg")
            row, column = _place(tile, rows, COLUMNS, GROUP, EACH)
            gate, up = halves(sums)
            if HAS_BIAS:
                gate = with_bias(gate, bias_ptr, column * BLOCK_N, N)
                up = with_bias(up, bias_ptr + N, column * BLOCK_N, N)
            result = activated(gate, up).to(place.dtype)
            # By the copy engine, once it has read what it was given before from the same place.
            tma.store_wait(0)
            gl.thread_barrier()
            place.store(result)
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(out_rows, [(2 * row + PART) * M, column * BLOCK_N], place)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["m"])
def _gated_kernel(
    x_rows,
    w_rows,
    out_rows,
    bias_ptr,
    sums_ptr,
    counter_ptr,
    meetings_ptr,
    m,
    N: gl.constexpr,
    K: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PAIRED: gl.constexpr,
):
    DTYPE: gl.constexpr = x_rows.dtype
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    COLUMNS: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    EACH: gl.constexpr = 2 if PAIRED else 1
    BARRIER_BYTES: gl.constexpr = 16 * STAGES + 16
    rows = gl.cdiv(m, BLOCK_M * EACH)
    plan, pieces, total = _plan(rows, STEPS, COLUMNS, EACH)

    x = gl.allocate_shared_memory(DTYPE, [2 * STAGES, BLOCK_M // 2, BLOCK_K], x_rows.layout)
    w = gl.allocate_shared_memory(DTYPE, [STAGES, 2 * BLOCK_N, BLOCK_K], w_rows.layout)
    places = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M // 2, BLOCK_N], out_rows.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    met = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=16 if PAIRED else 2)  # warps of both programs, or warpgroups
    mbarrier.init(met.index(0), count=1)
    fence_async_shared()
    ring = (x, w, ready, free, met)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    out_rows, bias_ptr, sums_ptr, counter_ptr, ring, places, plan, pieces, total, rows, N, STEPS,
                    COLUMNS, GROUP, HAS_BIAS, EACH, BARRIER_BYTES, 0,
                ),
            ),
            (
                _consume,
                (
                    out_rows, bias_ptr, sums_ptr, counter_ptr, ring, places, plan, pieces, total, rows, N, STEPS,
                    COLUMNS, GROUP, HAS_BIAS, EACH, BARRIER_BYTES, 1,
                ),
            ),
            (
                _produce,
                (
                    x_rows, w_rows, meetings_ptr, ring, plan, pieces, rows, N, STEPS, COLUMNS, GROUP, EACH,
                    BARRIER_BYTES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


_GATED = Kernel(_gated_kernel)


def find_gated_form(n: int, k: int, m: int) -> GatedForm | None:
    """The form of `gated_matmul_gluon` for ``n`` outputs of ``k`` inputs and ``m`` tokens; None where cuBLAS is as fast, or nothing
    is known.

    Below MIN_MANY_ROWS the table knows multiples of 64 tokens, which is what captured steps of so many have. An entry's ``paired`` is
    the number of tokens from which on programs are paired: with many, a last row of tiles that has no other costs little.
    """
    found = _find(n, k, MIN_MANY_ROWS if m >= MIN_MANY_ROWS else -(-m // 64) * 64)
    return None if found is None else GatedForm(found["group"], 0 < found.get("paired", 0) <= m)


@functools.cache
def _find(n: int, k: int, m: int) -> dict[str, int] | None:
    if n % 8 or k % 8:
        return None
    return tuned.lookup("linear", f"gated_matmul/{n}x{k}" + (f"/m{m}" if m < MIN_MANY_ROWS else ""))


def gated_matmul_gluon(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, form: GatedForm
) -> Tensor:
    """``out = silu(gate) * up`` of ``x @ weight.T + bias``, summed and gated in fp32; returns ``out``.

    Args:
        x: ``[T, K]`` of 16-bit numbers, T at least 1.
        weight: ``[2 N, K]`` in ``x``'s dtype, gates first; N and K multiples of 8.
        bias: ``[2 N]`` in ``x``'s dtype.
        out: ``[T, N]`` in ``x``'s dtype.
        form: of `find_gated_form`; a pair has at least two rows of tiles in a group.

    Rows of all of them are contiguous and begin at multiples of 16 bytes.
    """
    m, k = x.shape
    n = out.shape[1]
    programs = processors(x.device)
    parts = scratch(x.device)
    if programs * _BLOCK_M * _BLOCK_N > parts.sums.numel() or programs > min(
        MAX_TILES, parts.meetings.numel()
    ):
        raise ValueError(f"A GPU of {programs} multiprocessors needs more scratch memory than there is.")
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    args = (
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [_BLOCK_M // 2, _BLOCK_K], layout),
        TensorDescriptor(weight, [2 * n, k], [weight.stride(0), 1], [_BLOCK_N, _BLOCK_K], layout),
        TensorDescriptor(out, [m, n], [out.stride(0), 1], [_BLOCK_M // 2, _BLOCK_N], layout),
        x if bias is None else bias, parts.sums, parts.counters, parts.meetings, m,
    )  # fmt: skip
    each = 2 if form.paired else 1
    constants = (
        n,
        k,
        bias is not None,
        _BLOCK_M,
        _BLOCK_N,
        _BLOCK_K,
        _STAGES,
        form.group // each,
        form.paired,
    )
    tiles = triton.cdiv(m, each * _BLOCK_M) * triton.cdiv(n, _BLOCK_N)
    grid = (min(programs // each, 2 * tiles), 1, 1)
    _GATED.launch(grid, args, constants, num_warps=4, pdl=True, max_registers=_REGISTERS, cluster=each)
    return out
