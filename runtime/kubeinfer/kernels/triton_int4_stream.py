# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc,var-annotated"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Triton kernel of `kubeinfer.kernels.int4` for up to eight tokens; weights on their way wait in shared memory.

Products and places of threads are those of `kubeinfer.kernels.triton_int4_chunk`. Weights are copied past the registers
(cp.async), steps ahead of their use, so that a thread has few and many warps fit a multiprocessor. A thread copies just what it
multiplies: nothing changes places. The first steps are asked for before the kernel before has ended, whose output is waited for
inside the loop.

A step is a chunk for each warp of a program, of all its tiles. Tiles times steps are one long list; a program takes one tile's
(or several neighbouring tiles') steps, or the list is cut into equal runs, whatever the number of outputs (stream-K: Osama et
al., arXiv 2301.03598). Of a tile that several programs have parts of, the last to arrive adds the parts, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kubeinfer.kernels.int4 import ROWS, Int4Weight
from kubeinfer.kernels.triton_int4_chunk import SUBNORMAL_UNIT, add_chunk, inputs_of, sum_of_warps
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches, processors
from kubeinfer.kernels.triton_mma import from_thread, load2
from kubeinfer.kernels.triton_split import MAX_TILES, scratch

MAX_ROWS = 8


@triton.jit
def _wait_before(step):
    """Before the first step, until the kernel before has ended. (A branch would be moved behind what must wait.)"""
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        setp.eq.s32 first, $1, 0;
        @first griddepcontrol.wait;
        @first griddepcontrol.launch_dependents;
        mov.b32 $0, 0;
        }""",
        "=r,r", [step], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _wait_and_read(step, at, xs):
    """`_wait_before` the first step, and then read its inputs: 16 words of two, of eight products; else ``xs``."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        setp.eq.s32 first, $17, 0;
        @!first bra done;
        griddepcontrol.wait;
        griddepcontrol.launch_dependents;
        ld.global.v2.b32 {$0, $1}, [$16];
        ld.global.v2.b32 {$2, $3}, [$16 + 32];
        ld.global.v2.b32 {$4, $5}, [$16 + 64];
        ld.global.v2.b32 {$6, $7}, [$16 + 96];
        ld.global.v2.b32 {$8, $9}, [$16 + 128];
        ld.global.v2.b32 {$10, $11}, [$16 + 160];
        ld.global.v2.b32 {$12, $13}, [$16 + 192];
        ld.global.v2.b32 {$14, $15}, [$16 + 224];
        done:
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
        [
            at, step, xs[0], xs[1], xs[2], xs[3], xs[4], xs[5], xs[6], xs[7],
            xs[8], xs[9], xs[10], xs[11], xs[12], xs[13], xs[14], xs[15],
        ],
        dtype=(
            tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
            tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
        ),
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _read(at):
    """A chunk's inputs of a thread: 16 words of two, of eight products."""
    found = ()
    for p in tl.static_range(8):
        found = found + load2(at + p * 16, tl.zeros([1], tl.int32), True)
    return found


@triton.jit
def _all_threads():
    """Wait for all threads of the program. Of the usual barrier in it a loop would not be pipelined."""
    tl.inline_asm_elementwise(
        "bar.sync 0; mov.u32 $0, $1;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _rows(values):
    """The rows of ``[R, T]``, R a power of two: each thread has its own of all, and none is moved."""
    R: tl.constexpr = values.shape[0]
    if R == 1:
        found = (tl.reshape(values, [values.shape[1]]),)
    else:
        low, high = tl.split(tl.permute(tl.reshape(values, [2, R // 2, values.shape[1]]), [1, 2, 0]))
        found = _rows(low) + _rows(high)
    return found


@triton.jit
def _fours(values, T: tl.constexpr):
    """Of each row of ``[R, 4 T]`` the four tensors ``[T]`` of a thread's words."""
    R: tl.constexpr = values.shape[0]
    even, odd = tl.split(tl.reshape(values, [R, T, 2, 2]))
    found0, found2 = tl.split(even)
    found1, found3 = tl.split(odd)
    found0, found1, found2, found3 = _rows(found0), _rows(found1), _rows(found2), _rows(found3)
    found = ()
    for r in tl.static_range(R):
        found = found + (found0[r], found1[r], found2[r], found3[r])
    return found


@triton.jit
def _twos(values):
    """Of each row of ``[R, T, 2]`` the two tensors ``[T]``."""
    found0, found1 = tl.split(values)
    found0, found1 = _rows(found0), _rows(found1)
    found = ()
    for r in tl.static_range(values.shape[0]):
        found = found + (found0[r], found1[r])
    return found


@triton.jit
def _nothing(THREADS: tl.constexpr, COUNT: tl.constexpr):
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros([THREADS], tl.float32),)
    return found


@triton.jit
def _store(
    sums, squares, tile, bias_ptr, out_ptr, m, eps, N: tl.constexpr, K: tl.constexpr, STRIDE_OUT: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr, OWN: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Outputs of a program's tiles from their sums, four tensors ``[32]`` each."""
    lanes = tl.arange(0, 32)
    if NORM:
        source = tl.arange(0, 32 * WARPS) % 4 * 9
        even = from_thread(squares[0] + squares[6], source)
        odd = from_thread(squares[1] + squares[7], source + 4)
        both = sum_of_warps((even, odd), WARPS)
        factors = (tl.rsqrt(both[0] / K + eps), tl.rsqrt(both[1] / K + eps))
    for r in tl.static_range(OWN):
        for e in tl.static_range(4):
            row = (tile * OWN + r) * 16 + e // 2 * 8 + lanes // 4
            token = lanes % 4 * 2 + e % 2
            inside = (row < N) & (token < m)
            result = sums[r * 4 + e]
            if NORM:
                result *= factors[e % 2]
            if HAS_BIAS:
                result += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
            if GATED:
                up = sums[(OWN + r) * 4 + e]
                if NORM:
                    up *= factors[e % 2]
                if HAS_BIAS:
                    up += tl.load(bias_ptr + N + row, mask=row < N, other=0.0).to(tl.float32)
                result = result / (1.0 + tl.exp(-result)) * up
            target = out_ptr + token.to(tl.int64) * STRIDE_OUT + row
            if ADD:
                result += tl.load(target, mask=inside, other=0.0).to(tl.float32)
            tl.store(target, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    totals, squares, tile, bias_ptr, out_ptr, sums_ptr, counter_ptr, m, eps, N: tl.constexpr, K: tl.constexpr,
    STRIDE_OUT: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr,
    SUBNORMAL: tl.constexpr,
):  # fmt: skip
    """The end of a program's part of ``tile``, of which up to PARTS programs have parts."""
    OWN: tl.constexpr = TILES // 2 if GATED else TILES
    sums = ()
    for r in tl.static_range(TILES):
        found = sum_of_warps(totals[r * 4 : r * 4 + 4], WARPS)
        for e in tl.static_range(4):
            sums = sums + ((found[e] * (1.0 / SUBNORMAL_UNIT) if SUBNORMAL else found[e]),)
    if PARTS == 1:
        _store(
            sums, squares, tile, bias_ptr, out_ptr, m, eps, N, K, STRIDE_OUT, NORM, GATED, HAS_BIAS, ADD, OWN, WARPS
        )  # fmt: skip
    else:
        program = tl.program_id(0)
        low = tile * STEPS // UNITS  # programs that have parts of this tile
        high = (tile * STEPS + STEPS - 1) // UNITS
        last = True
        # A program may have the first part of one tile, its last, and another part of one, its first.
        at = sums_ptr + tl.arange(0, 32)
        slot = at + (2 * program + (program == low).to(tl.int32)) * (TILES * 128)
        if high > low:
            for i in tl.static_range(4 * TILES):
                tl.store(slot + i * 32, sums[i])
        _all_threads()  # the program's sums are stored before one of its threads counts it
        if high > low:
            last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == high - low
        if last:
            if high > low:
                tl.store(counter_ptr + tile, 0)
                added = ()
                for i in tl.static_range(4 * TILES):
                    added = added + (
                        tl.load(at + (2 * low + 1) * (TILES * 128) + i * 32, cache_modifier=".cg"),
                    )
                for part in tl.static_range(1, PARTS):
                    if low + part <= high:
                        more = ()
                        for i in tl.static_range(4 * TILES):
                            other = tl.load(
                                at + 2 * (low + part) * (TILES * 128) + i * 32, cache_modifier=".cg"
                            )
                            more = more + (added[i] + other,)
                        added = more
                sums = added
            _store(
                sums, squares, tile, bias_ptr, out_ptr, m, eps, N, K, STRIDE_OUT, NORM, GATED, HAS_BIAS, ADD, OWN, WARPS
            )  # fmt: skip


@triton.jit(do_not_specialize=["m", "eps"])
def _stream_kernel(
    x_ptr,
    norm_ptr,
    words_ptr,
    meta_ptr,
    bias_ptr,
    out_ptr,
    sums_ptr,
    counter_ptr,
    m,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    MINIMUMS: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    TOTAL: tl.constexpr,
    UNITS: tl.constexpr,
    SUBNORMAL: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    # Of TOTAL steps a program has UNITS. Its tiles are, of a gated layer, first TILES / 2 of gates and then theirs of the other half.
    OWN: tl.constexpr = TILES // 2 if GATED else TILES
    STEPS: tl.constexpr = (CHUNKS + WARPS - 1) // WARPS
    PARTS: tl.constexpr = 1 if UNITS % STEPS == 0 else (STEPS - 2 + UNITS) // UNITS + 1
    EVEN: tl.constexpr = CHUNKS % WARPS == 0
    THREADS: tl.constexpr = 32 * WARPS
    GROUPS: tl.constexpr = 128 // GROUP
    BLOCK: tl.constexpr = PLANES * 256  # words of a chunk of a tile
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    begin = tl.program_id(0) * UNITS
    threads = tl.arange(0, THREADS)
    warp = threads // 32
    place = threads % 32
    half = tl.arange(0, TILES * PLANES * 2)  # rows g or g + 8 of a plane of a tile
    own = half // (2 * PLANES)
    own = own // OWN * (N // 16) + own % OWN
    word = tl.arange(0, 4 * THREADS)
    words_at = words_ptr + (own.to(tl.int64) * (CHUNKS * BLOCK) + half % (2 * PLANES) * 128)[:, None]
    words_at += (word // 128 * BLOCK + word % 128)[None, :]
    group = tl.arange(0, TILES * GROUPS)
    own = group // GROUPS
    own = own // OWN * (N // 16) + own % OWN
    meta_at = meta_ptr + (own.to(tl.int64) * (CHUNKS * GROUPS * 16) + group % GROUPS * 16)[:, None, None]
    meta_at += (warp * (GROUPS * 16) + place // 4 * 2)[None, :, None] + tl.arange(0, 2)[None, None, :]
    first = warp * 128 + place % 4 * 4  # of the thread's inputs
    x_row = x_ptr + tl.minimum(place // 4, m - 1).to(tl.int64) * STRIDE_X + place % 4 * 4
    x_at = (x_row + warp * 128,)
    norm_at = (norm_ptr + first,)
    left = K - first
    xs = ()
    norms = ()
    if AHEAD:
        chunk = begin % STEPS * WARPS + warp
        if not EVEN:
            chunk = tl.minimum(chunk, CHUNKS - 1)  # whose weights are zeros where they are past the end
        now_at = x_row + chunk * 128
        if PDL:
            for _ in tl.static_range(16):
                xs = xs + (tl.zeros([THREADS], tl.int32),)
        else:
            xs = _read(now_at)
        if NORM:
            norms = _read(norm_ptr + place % 4 * 4 + chunk * 128)

    totals = _nothing(THREADS, 4 * TILES)
    squares = _nothing(THREADS, 8)
    count = UNITS
    if TOTAL % UNITS != 0:
        count = tl.minimum(UNITS, TOTAL - begin)
    for i in tl.range(0, count, num_stages=STAGES):
        unit = begin + i
        tile = unit // STEPS
        step = unit % STEPS
        inside = (warp + step * WARPS < CHUNKS).to(tl.int32)
        if AHEAD:
            if PDL:
                xs = _wait_and_read(i, now_at, xs)
            now, now_norms = xs, norms
            chunk = (unit + 1) % STEPS * WARPS + warp
            if not EVEN:
                chunk = tl.minimum(chunk, CHUNKS - 1)
            xs = _read(x_row + chunk * 128)
            if NORM:
                norms = _read(norm_ptr + place % 4 * 4 + chunk * 128)
        else:
            if PDL:
                _wait_before(i)
            now = ()
            now_norms = ()
            for p in tl.static_range(8):
                now = now + inputs_of(x_at, step, p, left, inside, K, WARPS, EVEN and K % 128 == 0)
                if NORM:
                    now_norms = now_norms + inputs_of(
                        norm_at, step, p, left, inside, K, WARPS, EVEN and K % 128 == 0
                    )
        far = tile.to(tl.int64) * (OWN * CHUNKS)
        if EVEN:
            words = tl.load(words_at + (far + step * WARPS) * BLOCK)
            metas = tl.load(meta_at + (far + step * WARPS) * (GROUPS * 16))
        else:
            wanted = (word // 128 + step * WARPS < CHUNKS)[None, :]
            words = tl.load(words_at + (far + step * WARPS) * BLOCK, mask=wanted, other=0)
            wanted = (warp + step * WARPS < CHUNKS)[None, :, None]
            metas = tl.load(meta_at + (far + step * WARPS) * (GROUPS * 16), mask=wanted, other=0)
        added = add_chunk(
            _fours(words, THREADS), _twos(metas), now, now_norms, x_at, norm_at, step, left, inside, totals, squares,
            K, GROUP, PLANES, MINIMUMS, NORM, TILES, 1, WARPS, BF16, True, False, EVEN, SUBNORMAL,
        )  # fmt: skip
        totals, squares = added[0], added[1]
        if UNITS != STEPS:  # noqa: SIM102 - known when the kernel is compiled
            if (step == STEPS - 1) | (i == count - 1):
                _finish(
                    totals, squares, tile, bias_ptr, out_ptr, sums_ptr, counter_ptr, m, eps,
                    N, K, STRIDE_OUT, NORM, GATED, HAS_BIAS, ADD, TILES, WARPS, STEPS, UNITS, PARTS, SUBNORMAL,
                )  # fmt: skip
                totals = _nothing(THREADS, 4 * TILES)
                squares = _nothing(THREADS, 8)
    if UNITS == STEPS:
        _finish(
            totals, squares, tl.program_id(0), bias_ptr, out_ptr, sums_ptr, counter_ptr, m, eps,
            N, K, STRIDE_OUT, NORM, GATED, HAS_BIAS, ADD, TILES, WARPS, STEPS, UNITS, PARTS, SUBNORMAL,
        )  # fmt: skip


_STREAM = Kernel(_stream_kernel)


def stream_bytes(tiles: int, num_warps: int, stages: int, planes: int, group: int) -> int:
    """Shared memory of a program: words, scales (which four threads have each) and sums."""
    step = tiles * num_warps * (planes * 1024 + 128 // group * 256)
    return max(0, stages - 1) * step + num_warps * 32 * 16


def int4_stream_triton(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    gated: bool,
    out: Tensor,
    add: bool,
    tiles: int,
    num_warps: int,
    stages: int,
    per_processor: int,
    max_registers: int,
    subnormal: bool,
    inputs_ahead: bool,
) -> None:
    """As `kubeinfer.kernels.triton_int4.int4_few_triton` into ``out``, or added to it.

    ``per_processor`` programs a multiprocessor take equal runs of steps; 0: a program takes all steps of its tiles.
    """
    m, k = x.shape
    n = weight.n // 2 if gated else weight.n
    chunks = weight.words.shape[1]
    own = tiles // 2 if gated else tiles
    if m > MAX_ROWS or not own or triton.cdiv(n, ROWS) % own or (gated and n % ROWS):
        raise ValueError(f"{tiles} tiles a program do not go into {n} outputs of {m} tokens.")
    rows = triton.cdiv(n, ROWS) // own
    steps = triton.cdiv(chunks, num_warps)
    units = steps
    if per_processor:
        units = triton.cdiv(rows * steps, processors(x.device) * per_processor)
        if norm_weight is not None:  # which needs all inputs of a tile
            units = triton.cdiv(units, steps) * steps
    programs = triton.cdiv(rows * steps, units)
    parts = scratch(x.device)
    if units % steps and (2 * programs * tiles * 128 > parts.sums.numel() or rows > MAX_TILES):
        raise ValueError(f"{programs} programs need more scratch memory than there is for {n} outputs.")
    # Their last chunk is read again by warps that have none: its squares would count twice.
    inputs_ahead &= k % 128 == 0 and (norm_weight is None or chunks % num_warps == 0)
    pdl = overlaps_launches()
    args = (
        x, norm_weight if norm_weight is not None else x, weight.words, weight.meta, bias if bias is not None else x, out,
        parts.sums, parts.counters, m, eps,
    )  # fmt: skip
    constants = (
        n, k, chunks, weight.group, weight.bits // 4, weight.minimums, x.stride(0), out.stride(0),
        norm_weight is not None, gated, bias is not None, add,
        tiles, num_warps, stages, rows * steps, units, subnormal, inputs_ahead, pdl,
    )  # fmt: skip
    _STREAM.launch((programs, 1, 1), args, constants, num_warps, stages, pdl=pdl, max_registers=max_registers)
