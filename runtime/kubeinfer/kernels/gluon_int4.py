# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc,var-annotated"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Gluon kernel of `kubeinfer.kernels.triton_int4_bulk`: products with 4-bit weights that bulk copies bring into shared memory.

Products and places of threads are those of `kubeinfer.kernels.triton_int4`. A kernel that reads its weights itself is bound by how
they come, a few bytes a thread at a time, and not by what it does with them. Here one thread of a warp asks for kilobytes, and the
rest of the warp finds them in shared memory.

Codes are multiplied as they stand in the words, in bits 0 to 3 or 4 to 7 of 16: as subnormal (or the least normal) bfloat16
numbers of 2**-133 or 2**-129 a unit, which spares half of the shifts. The inputs are multiplied by 2**64 or 2**60 for that, so
that magnitudes from 2**-57 to 2**63 keep all bits. Whether tensor cores take subnormal numbers as they are is not written
anywhere: it was seen on an H200, and the kernel is only for its generation.

Each warp is a stream of its own: it has chunks of 128 inputs that follow each other, and of the tiles of rows (UNITS) that come one
after the other those chunks' weights, in a ring of SLOTS pieces of PIECE chunks. It waits for a piece
at the piece's barrier, reads it, and asks for what follows in its place. The first pieces are asked for before the kernel
before has ended. At a tile's end the warps' sums meet in shared memory: one barrier, as there are two places for them in turns.

Programs are not equally fast. Where each takes several tiles, its first two are its own, and for any other it asks a counter in
memory while it works on the tile before the last that it knows: the number is there when the ring asks for that tile's weights.

Inputs are prepared once where they are used for several tiles (HELD): multiplied by the powers of two, laid out as threads
read them, with their sums over each chunk. Else a thread reads its part of them a chunk ahead.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kubeinfer.kernels.gluon_bulk import (
    all_threads,
    copy2,
    copy4,
    init_barrier,
    next_number,
    put4,
    put_numbers2,
    put_numbers4,
    put_word,
    shared2,
    shared4,
    shared_base,
    shared_number,
    shared_word_of_warp,
    wait_barrier,
    wait_for_kernel_before,
    warp_of,
)
from kubeinfer.kernels.triton_launch import Kernel
from kubeinfer.kernels.triton_mma import from_thread, load2, mma, read4, times

_READ = tl.constexpr(10)  # quadruples of inputs that a thread asks for at once
_UNIT = tl.constexpr(2.0**-69)  # of the sums: 2**64 of the inputs times 2**-133 of the codes


@gluon.jit
def _scaled(words):
    """A thread's words of inputs (pairs for codes in bits 0 to 3 and 4 to 7 in turns), so that products count by `_UNIT`."""
    L: gl.constexpr = words[0].type.layout
    low = gl.full([words[0].shape[0]], 0x5F805F80, gl.int32, L)  # 2**64
    high = gl.full([words[0].shape[0]], 0x5D805D80, gl.int32, L)  # 2**60
    found = ()
    for i in gl.static_range(len(words) // 2):
        found = found + (times(words[2 * i], low), times(words[2 * i + 1], high))
    return found


@gluon.jit
def _sums_of_inputs(xs, CHAINS: gl.constexpr):
    """Of a chunk's scaled inputs (16 words), summed for each token: numbers of a thread's tokens. CHAINS products do not wait for
    each other."""
    L: gl.constexpr = xs[0].type.layout
    T: gl.constexpr = xs[0].shape[0]
    one = gl.full([T], 0x00010001, gl.int32, L)  # where a code has it
    one8 = gl.full([T], 0x00100010, gl.int32, L)
    nothing = gl.zeros([T], gl.float32, L)
    sums = (nothing,) * (4 * CHAINS)
    for p in gl.static_range(8):
        found = mma(one, one, one8, one8, xs[2 * p], xs[2 * p + 1], sums[:4], True)
        sums = sums[4:] + found  # the chains in turns
    even, odd = sums[0], sums[1]
    for i in gl.static_range(1, CHAINS):
        even += sums[4 * i]
        odd += sums[4 * i + 1]
    return even, odd


@gluon.jit
def _add_chunk(words, metas, xs, even, odd, totals, TILES: gl.constexpr, CHAINS: gl.constexpr):
    """Add a chunk's products to ``totals``, four numbers a tile; ``even`` and ``odd`` are the sums of a thread's tokens' inputs."""
    L: gl.constexpr = words[0].type.layout
    T: gl.constexpr = words[0].shape[0]
    nothing = gl.zeros([T], gl.float32, L)
    accs = (nothing,) * (4 * TILES * CHAINS)
    for p in gl.static_range(8):
        for r in gl.static_range(TILES):
            word0, word1 = words[r * 8 + p // 2], words[r * 8 + 4 + p // 2]
            if p % 2 == 1:
                word0, word1 = word0 >> 8, word1 >> 8
            a0, a1, a2, a3 = word0 & 0x000F000F, word1 & 0x000F000F, word0 & 0x00F000F0, word1 & 0x00F000F0
            acc = mma(a0, a1, a2, a3, xs[2 * p], xs[2 * p + 1], accs[:4], True)
            accs = accs[4:] + acc  # chains and tiles in turns
    for r in gl.static_range(TILES):
        for half in gl.static_range(2):
            meta = metas[2 * r + half]
            scale = (meta & -256).to(gl.float32, bitcast=True)
            zero = (meta & 255).to(gl.float32)
            for e in gl.static_range(2):
                acc = accs[4 * r + 2 * half + e] - (odd if e else even) * zero
                for chain in gl.static_range(1, CHAINS):
                    acc += accs[4 * (TILES * chain + r) + 2 * half + e]
                totals = totals[1:] + (totals[0] + acc * scale,)
    return totals


@gluon.jit
def _read_inputs(at, inside, ALWAYS: gl.constexpr):
    """A thread's 16 words of a chunk's inputs."""
    found = ()
    for p in gl.static_range(8):
        found = found + load2(at + p * 16, inside, ALWAYS)
    return found


@gluon.jit
def _read_all(
    x_ptr, threads, m, CHUNKS: gl.constexpr, STRIDE_X: gl.constexpr, TOKENS: gl.constexpr, BEGIN: gl.constexpr
):  # fmt: skip
    """Of all inputs, of four words each, up to _READ places from BEGIN on for every thread; zeros past the end."""
    T: gl.constexpr = threads.shape[0]
    ITEMS: gl.constexpr = CHUNKS * 16 * TOKENS
    found = ()
    for turn in gl.static_range(BEGIN, min(BEGIN + _READ, (ITEMS + T - 1) // T)):
        item = turn * T + threads
        inside = (item < ITEMS).to(gl.int32)
        at = x_ptr + gl.minimum(item // 4 % TOKENS, m - 1) * STRIDE_X
        at += item // (16 * TOKENS) * 128 + item // (4 * TOKENS) % 4 * 32 + item % 4 * 4
        found = found + load2(at, inside, (turn + 1) * T <= ITEMS)
        found = found + load2(at + 16, inside, (turn + 1) * T <= ITEMS)
    return found


@gluon.jit
def _hold(
    read, to, sums_at, x_ptr, threads, m, CHUNKS: gl.constexpr, EVEN: gl.constexpr, STRIDE_X: gl.constexpr,
    TOKENS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Put all inputs into shared memory as threads want them in products, and their sums over each chunk."""
    T: gl.constexpr = 32 * WARPS
    ITEMS: gl.constexpr = CHUNKS * 16 * TOKENS
    TURNS: gl.constexpr = (ITEMS + T - 1) // T
    for begin in gl.static_range(0, TURNS, _READ):
        if begin > 0:
            read = _read_all(x_ptr, threads, m, CHUNKS, STRIDE_X, TOKENS, begin)
        scaled = _scaled(read)
        for turn in gl.static_range(begin, min(begin + _READ, TURNS)):
            item = turn * T + threads
            part = scaled[4 * (turn - begin) : 4 * (turn - begin) + 4]
            put4(to + item * 16, (item < ITEMS).to(gl.int32), part[0], part[1], part[2], part[3])
    if not EVEN:  # a chunk of zeros, for warps that have fewer than others
        zero = gl.full([T], 0, gl.int32, threads.type.layout)
        for turn in gl.static_range((16 * TOKENS + T - 1) // T):
            item = turn * T + threads
            put4(to + (ITEMS + item) * 16, (item < 16 * TOKENS).to(gl.int32), zero, zero, zero, zero)
    all_threads(threads)
    # Sums of eight chunks (or fewer, of several tokens) at once: each is a token of one product.
    COLUMNS: gl.constexpr = (CHUNKS if EVEN else CHUNKS + 1) * TOKENS
    lane = threads % 32
    for turn in gl.static_range((COLUMNS + 8 * WARPS - 1) // (8 * WARPS)):
        group = turn * WARPS + threads // 32
        column = gl.minimum(group * 8 + lane // 4, COLUMNS - 1)
        at = to + (column // TOKENS * (16 * TOKENS) + column % TOKENS * 4 + lane % 4) * 16
        xs = ()
        for q in gl.static_range(4):
            xs = xs + shared4(at + q * (64 * TOKENS))
        even, odd = _sums_of_inputs(xs, 4)
        put_numbers2(sums_at + (group * 8 + lane % 4 * 2) * 4, (lane < 4).to(gl.int32), even, odd)


@gluon.jit
def _put_squares(
    to, squares_ptr, threads, PARTS: gl.constexpr, STRIDE: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Into shared memory, of each warp sums of parts of the tokens' squares: of all warps together they are the rows'."""
    QUADS: gl.constexpr = 2 if TOKENS > 4 else 1  # four tokens each
    EACH: gl.constexpr = 32 * WARPS // QUADS
    TURNS: gl.constexpr = (PARTS + EACH - 1) // EACH
    found = ()
    for turn in gl.static_range(TURNS):
        part = turn * EACH + threads // QUADS
        at = squares_ptr + part * STRIDE + threads % QUADS * 4
        found = found + (read4(at, (part < PARTS).to(gl.int32), (turn + 1) * EACH <= PARTS),)
    sums = ()
    for i in gl.static_range(min(4, TOKENS)):
        total = found[0][i].to(gl.float32, bitcast=True)
        for turn in gl.static_range(1, TURNS):
            total += found[turn][i].to(gl.float32, bitcast=True)
        for bit in gl.static_range(QUADS - 1, 5):
            total += from_thread(total, threads % 32 ^ (1 << bit))
        sums = sums + (total,)
    # Sums of fewer tokens are there more than once, and read once.
    lane = threads % 32
    put_numbers4(
        to + threads // 32 * 32 + lane * 16,
        (lane < QUADS).to(gl.int32),
        sums[0],
        sums[1 % len(sums)],
        sums[2 % len(sums)],
        sums[3 % len(sums)],
    )


@gluon.jit
def _ask(
    leader, wanted, barrier, to, seen, words, metas, words_ptr, metas_ptr, TILES: gl.constexpr, OWN: gl.constexpr,
    APART: gl.constexpr, CHUNKS: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    """Ask for PIECE chunks of each tile. ``words`` and ``metas``: where they are behind the pointers. ``seen``: as of `copy2`."""
    if TILES == 1:
        copy2(
            leader, wanted, barrier, to, seen, words_ptr + words, metas_ptr + metas, PIECE * 1024, PIECE * 64
        )
    else:
        SECOND: gl.constexpr = APART if OWN == 1 else 1  # tile, counted from the first
        copy4(
            leader, wanted, barrier, to, seen, words_ptr + words, words_ptr + words + SECOND * (CHUNKS * 256),
            metas_ptr + metas, metas_ptr + metas + SECOND * (CHUNKS * 16), PIECE * 1024, PIECE * 64,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["m", "eps"])
def _bulk_kernel(
    x_ptr, words_ptr, meta_ptr, bias_ptr, out_ptr, squares_ptr, next_norm_ptr, next_scaled_ptr, next_squares_ptr, counter_ptr, m, eps,
    N: gl.constexpr, K: gl.constexpr, STRIDE_X: gl.constexpr, STRIDE_OUT: gl.constexpr, GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr, ADD: gl.constexpr, NORM_PARTS: gl.constexpr, STRIDE_SQUARES: gl.constexpr,
    NEXT_NORM: gl.constexpr, STRIDE_NEXT_SQUARES: gl.constexpr, PROGRAMS: gl.constexpr, TOKENS: gl.constexpr,
    TILES: gl.constexpr, WARPS: gl.constexpr, SLOTS: gl.constexpr, PIECE: gl.constexpr, HELD: gl.constexpr,
    RING: gl.constexpr, X: gl.constexpr, SUMS: gl.constexpr, PARTS: gl.constexpr, SQUARES: gl.constexpr,
    UNIT: gl.constexpr, BARRIERS: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    OWN: gl.constexpr = TILES // 2 if GATED else TILES
    CHUNKS: gl.constexpr = K // 128
    # Chunks of a warp; the last warps may have fewer.
    STEPS: gl.constexpr = (CHUNKS + WARPS * PIECE - 1) // (WARPS * PIECE) * PIECE
    EVEN: gl.constexpr = STEPS * WARPS == CHUNKS
    UNITS: gl.constexpr = N // (16 * OWN)
    AHEAD: gl.constexpr = SLOTS * PIECE  # steps that are asked for before
    ONCE: gl.constexpr = PROGRAMS >= UNITS and AHEAD >= STEPS  # all is asked for at first
    SHARED_OUT: gl.constexpr = max(UNITS - 2 * PROGRAMS, 0)  # units after each program's first two
    # Each program asks for one more until there is none: so often in all.
    ASKED: gl.constexpr = SHARED_OUT + min(PROGRAMS, max(UNITS - PROGRAMS, 0))
    CHAINS: gl.constexpr = 2 if TILES == 1 else 1
    PAIRS: gl.constexpr = (TOKENS + 1) // 2  # of tokens, of which a thread has one
    SUM: gl.constexpr = 16 * (8 * PAIRS + 1)  # bytes of a tile's
    T: gl.constexpr = 32 * WARPS
    SLOT: gl.constexpr = PIECE * TILES * 1088
    L: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    program = gl.program_id(0)
    threads = gl.arange(0, T, L)
    warp = warp_of(threads)
    lane = threads % 32
    shared = gl.allocate_shared_memory(gl.int64, [BYTES // 8, 1], mbarrier.MBarrierLayout())
    # Not used: only what is used is there. Nothing else is in its place (as of `gluon_decode_streams`).
    mbarrier.init(shared.index(0), 1)
    base = shared_base(threads)
    barrier_at = base + BARRIERS + warp * (SLOTS * 8)
    ring_at = base + RING + warp * (SLOTS * SLOT)
    init_barrier(barrier_at + lane * 8, (lane < SLOTS).to(gl.int32))

    # Of the warp's chunks, and of the next that it asks for.
    first = gl.minimum(warp * STEPS, CHUNKS)
    count = gl.minimum(CHUNKS - first, STEPS)
    leader = gl.full([T], 1, gl.int32, L)
    for slot in range(min(SLOTS, STEPS // PIECE)):
        chunk = program * (OWN * CHUNKS) + first + slot * PIECE
        wanted = (slot * PIECE < count).to(gl.int32)
        _ask(
            leader, wanted, barrier_at + slot * 8, ring_at + slot * SLOT, leader, chunk * 256, chunk * 16, words_ptr, meta_ptr,
            TILES, OWN, N // 16, CHUNKS, PIECE,
        )  # fmt: skip
    wait_for_kernel_before(threads)

    # Where the program ends a tile: threads are rows and tokens.
    row = threads % 16
    token = threads // 16
    inside = token < m
    own_token = gl.minimum(token, 7)
    summed = gl.minimum(token, TOKENS - 1)
    part_at = (
        base + PARTS + ((row // 8 * 2 + summed % 2) * (8 * PAIRS + 1) + row % 8 * PAIRS + summed // 2) * 4
    )

    place = lane % 4
    if HELD:
        read = _read_all(x_ptr, threads, m, CHUNKS, STRIDE_X, TOKENS, 0)
        if NORM_PARTS > 0:
            _put_squares(base + SQUARES, squares_ptr, threads, NORM_PARTS, STRIDE_SQUARES, TOKENS, WARPS)
        _hold(read, base + X, base + SUMS, x_ptr, threads, m, CHUNKS, EVEN, STRIDE_X, TOKENS, WARPS)
        x_at = base + X + (gl.minimum(lane // 4, TOKENS - 1) * 4 + place) * 16
        sums_at = base + SUMS + gl.minimum(place * 2, max(TOKENS - 2, 0)) * 4
        all_threads(threads)
    else:
        x_at = x_ptr + gl.minimum(lane // 4, m - 1) * STRIDE_X + first * 128 + place * 4
        ahead = _read_inputs(x_at, (count > 0).to(gl.int32), EVEN)
        if NORM_PARTS > 0:
            _put_squares(base + SQUARES, squares_ptr, threads, NORM_PARTS, STRIDE_SQUARES, TOKENS, WARPS)
            all_threads(threads)
    factor = gl.full([T], 1.0 / _UNIT, gl.float32, L)
    if NORM_PARTS > 0:
        square = gl.zeros([T], gl.float32, L)
        for w in gl.static_range(WARPS):
            square += shared_number(base + (SQUARES + w * 32) + own_token * 4)
        factor = gl.rsqrt(square / K + eps) * (1.0 / _UNIT)

    slot = program * 0
    phase = program * 0
    other = program * 0  # of the two places for parts of sums
    nothing = gl.zeros([T], gl.float32, L)
    unit = program
    following = program + PROGRAMS
    while unit < UNITS:
        # What is added in the end is asked for before.
        biases = ()
        before = ()
        norms = ()
        for r in gl.static_range(OWN):
            column = (unit * OWN + r) * 16 + row
            if HAS_BIAS:
                biases = biases + (gl.load(bias_ptr + column).to(gl.float32),)
                if GATED:
                    biases = biases + (gl.load(bias_ptr + N + column).to(gl.float32),)
            if ADD:
                target = out_ptr + own_token.to(gl.int64) * STRIDE_OUT + column
                before = before + (gl.load(target, mask=inside, other=0.0).to(gl.float32),)
            if NEXT_NORM:
                norms = norms + (gl.load(next_norm_ptr + column).to(gl.float32),)
        totals = (nothing,) * (4 * TILES)
        after = gl.zeros([T], gl.int32, L)  # in the program's first thread, which unit is after the following
        for turn in range(STEPS // PIECE):
            wait_barrier(barrier_at + slot * 8, gl.full([T], 0, gl.int32, L) + phase)
            seen = leader
            if ASKED > 0:  # late in the unit, so that who is slower than others gets fewer
                last = (turn == STEPS // PIECE - 1) & (following < UNITS)
                after = next_number(counter_ptr, ((threads == 0) & last).to(gl.int32), ASKED - 1)
            # What comes in the place of the piece that is read now, in this unit or in the following.
            step_ahead = turn * PIECE + AHEAD
            unit_ahead = gl.where(step_ahead < STEPS, unit, following)
            step_ahead = gl.where(step_ahead < STEPS, step_ahead, step_ahead - STEPS)
            for piece in range(PIECE):
                step = turn * PIECE + piece
                at = ring_at + slot * SLOT + piece * 1024 + lane * 16
                words = ()
                metas = ()
                for r in gl.static_range(TILES):
                    words = words + shared4(at + r * (PIECE * 1024))
                    words = words + shared4(at + (r * (PIECE * 1024) + 512))
                at = ring_at + slot * SLOT + piece * 64 + lane // 4 * 8
                for r in gl.static_range(TILES):
                    metas = metas + shared2(at + (TILES * PIECE * 1024 + r * (PIECE * 64)))
                for r in gl.static_range(TILES):  # a word of each load
                    seen = seen ^ words[8 * r] ^ words[8 * r + 4] ^ metas[2 * r]
                if not EVEN:
                    real = step < count
                    masked = ()
                    for i in gl.static_range(2 * TILES):
                        masked = masked + (gl.where(real, metas[i], 0),)
                    metas = masked
                if not ONCE and PIECE == 1:
                    chunk = unit_ahead * (OWN * CHUNKS) + first + step_ahead
                    _ask(
                        leader * (unit_ahead < UNITS).to(gl.int32), (step_ahead < count).to(gl.int32),
                        barrier_at + slot * 8, ring_at + slot * SLOT, seen, chunk * 256, chunk * 16, words_ptr, meta_ptr,
                        TILES, OWN, N // 16, CHUNKS, PIECE,
                    )  # fmt: skip
                if HELD:
                    chunk = first + step
                    if not EVEN:
                        chunk = gl.where(real, chunk, CHUNKS)
                    xs = ()
                    for q in gl.static_range(4):
                        xs = xs + shared4(x_at + chunk * (256 * TOKENS) + q * (64 * TOKENS))
                    if TOKENS == 1:
                        even = shared_number(sums_at + chunk * 4)
                        odd = even
                    else:
                        pair = shared2(sums_at + chunk * (4 * TOKENS))
                        even, odd = pair[0].to(gl.float32, bitcast=True), pair[1].to(gl.float32, bitcast=True)
                else:
                    xs = _scaled(ahead)
                    next_step = gl.where(step + 1 < STEPS, step + 1, 0)
                    ahead = _read_inputs(x_at + next_step * 128, (next_step < count).to(gl.int32), EVEN)
                    even, odd = _sums_of_inputs(xs, CHAINS)
                totals = _add_chunk(words, metas, xs, even, odd, totals, TILES, CHAINS)
            if not ONCE and PIECE > 1:
                chunk = unit_ahead * (OWN * CHUNKS) + first + step_ahead
                _ask(
                    leader * (unit_ahead < UNITS).to(gl.int32), (step_ahead < count).to(gl.int32), barrier_at + slot * 8,
                    ring_at + slot * SLOT, seen, chunk * 256, chunk * 16, words_ptr, meta_ptr, TILES, OWN, N // 16, CHUNKS, PIECE,
                )  # fmt: skip
            slot += 1
            if slot == SLOTS:
                slot = program * 0
                phase = phase ^ 1
        put_at = (
            base
            + PARTS
            + other * (WARPS * TILES * SUM)
            + warp * (TILES * SUM)
            + (lane // 4 * PAIRS + place) * 4
        )
        for i in gl.static_range(0, 4 * TILES, 1 if TOKENS > 1 else 2):
            put_word(
                put_at + i * (SUM // 4), (place < PAIRS).to(gl.int32), totals[i].to(gl.int32, bitcast=True)
            )
        if ASKED > 0:
            put_word(base + UNIT + other * 4, (threads == 0).to(gl.int32), after)
        all_threads(threads)
        results = ()
        for r in gl.static_range(TILES):
            result = shared_number(part_at + other * (WARPS * TILES * SUM) + r * SUM)
            for w in gl.static_range(1, WARPS):
                result += shared_number(part_at + other * (WARPS * TILES * SUM) + (w * TILES + r) * SUM)
            results = results + (result * factor,)
        for r in gl.static_range(OWN):
            column = (unit * OWN + r) * 16 + row
            result = results[r]
            if HAS_BIAS:
                result += biases[2 * r if GATED else r]
            if GATED:
                up = results[OWN + r]
                if HAS_BIAS:
                    up += biases[2 * r + 1]
                result = result / (1.0 + gl.exp(-result)) * up
            if ADD:
                result += before[r]
            rounded = result.to(out_ptr.dtype.element_ty)
            target = out_ptr + own_token.to(gl.int64) * STRIDE_OUT + column
            gl.store(target, rounded, mask=inside)
            if NEXT_NORM:
                kept = gl.where(inside, rounded.to(gl.float32), 0.0)
                scaled = (kept * norms[r]).to(out_ptr.dtype.element_ty)
                gl.store(next_scaled_ptr + own_token.to(gl.int64) * N + column, scaled, mask=inside)
                square = kept * kept
                for i in gl.static_range(4):
                    square += from_thread(square, lane ^ (1 << i))
                square_at = next_squares_ptr + (unit * OWN + r) * STRIDE_NEXT_SQUARES + own_token
                gl.store(square_at, square, mask=(row == 0) & (token < 8))
        unit = following
        if ASKED > 0:
            shared_at = shared_base(program) + UNIT + other * 4
            following = gl.where(following < UNITS, shared_word_of_warp(shared_at) + 2 * PROGRAMS, UNITS)
            other = other ^ 1


BULK = Kernel(_bulk_kernel)
