# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc,var-annotated"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Triton kernel of `kubeinfer.kernels.int4` for up to eight tokens in bfloat16; weights on their way wait in shared memory.

Products and places of threads are those of `kubeinfer.kernels.triton_int4`. Weights are copied past the registers (cp.async),
steps ahead of their use, so that a thread has few and many warps fit a multiprocessor. A thread copies just what it multiplies:
nothing changes places. The first steps are asked for before the kernel before has ended, whose output is waited for inside the
loop. A step is a chunk of 128 inputs for each warp of a program, of all its tiles.

Codes are multiplied as they stand in the words, in bits 0 to 3 or 4 to 7 of 16: as subnormal (or the least normal) bfloat16
numbers of 2**-133 or 2**-129 a unit, which spares half of the shifts. The inputs are multiplied by 2**64 or 2**60 for that, so
that magnitudes from 2**-57 to 2**63 keep all bits. Whether tensor cores take subnormal numbers as they are is not written
anywhere: it was seen on an H200, and the kernel is only for its generation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kubeinfer.kernels import tuned
from kubeinfer.kernels.int4 import CHUNK, ROWS, Int4Weight
from kubeinfer.kernels.norm import rms_norm
from kubeinfer.kernels.triton_int4_tile import norm_factors, store_tiles
from kubeinfer.kernels.triton_launch import Kernel
from kubeinfer.kernels.triton_mma import add_squares, from_thread, load2, mma, sum_of_warps, times

MAX_ROWS = 8
_UNIT = tl.constexpr(2.0**-69)  # of the sums: 2**64 of the inputs times 2**-133 of the codes


@triton.jit
def _wait_and_read(step, at, xs):
    """Before the first step, wait until the kernel before has ended and read the first inputs; else ``xs``, all 16 words."""
    # A branch around a wait and loads would be moved behind what must come after them.
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
        dtype=(tl.int32,) * 16,
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
    even, odd = tl.split(even), tl.split(odd)
    found0, found1, found2, found3 = _rows(even[0]), _rows(odd[0]), _rows(even[1]), _rows(odd[1])
    found = ()
    for r in tl.static_range(R):
        found = found + (found0[r], found1[r], found2[r], found3[r])
    return found


@triton.jit
def _twos(values):
    """Of each row of ``[R, T, 2]`` the two tensors ``[T]``."""
    even, odd = tl.split(values)
    found0, found1 = _rows(even), _rows(odd)
    found = ()
    for r in tl.static_range(values.shape[0]):
        found = found + (found0[r], found1[r])
    return found


@triton.jit
def _add_chunk(words, metas, xs, norms, totals, squares, NORM: tl.constexpr, TILES: tl.constexpr):
    """Add a chunk's products to ``totals``, four tensors a tile that count by `_UNIT`, and its inputs' squares to ``squares``."""
    nothing = tl.zeros([words[0].shape[0]], tl.float32)
    one = tl.full([words[0].shape[0]], 0x00010001, tl.int32)  # where a code has it
    one8 = tl.full([words[0].shape[0]], 0x00100010, tl.int32)
    power = tl.full([words[0].shape[0]], 0x5F805F80, tl.int32)  # 2**64
    power8 = tl.full([words[0].shape[0]], 0x5D805D80, tl.int32)  # 2**60
    sums, accs = (nothing,) * 4, (nothing,) * (4 * TILES)
    for p in tl.static_range(8):
        b0, b1 = xs[2 * p], xs[2 * p + 1]
        if NORM:
            squares = add_squares(b0, b1, squares)
            b0, b1 = times(b0, norms[2 * p]), times(b1, norms[2 * p + 1])
        b0, b1 = times(b0, power), times(b1, power8)
        sums = mma(one, one, one8, one8, b0, b1, sums, True)
        for r in tl.static_range(TILES):
            word0, word1 = words[r * 8 + p // 2] >> (p % 2 * 8), words[r * 8 + 4 + p // 2] >> (p % 2 * 8)
            a0, a1, a2, a3 = word0 & 0x000F000F, word1 & 0x000F000F, word0 & 0x00F000F0, word1 & 0x00F000F0
            acc = mma(a0, a1, a2, a3, b0, b1, accs[r * 4 : r * 4 + 4], True)
            accs = accs[: r * 4] + acc + accs[r * 4 + 4 :]
    for r in tl.static_range(TILES):
        scales = ()
        apart = ()  # what a group's inputs count besides
        for half in tl.static_range(2):
            meta = metas[2 * r + half]
            scales = scales + ((meta & -256).to(tl.float32, bitcast=True),)
            apart = apart + (-(meta & 255).to(tl.float32),)
        for e in tl.static_range(4):
            total = totals[r * 4 + e] + (accs[r * 4 + e] + sums[e] * apart[e // 2]) * scales[e // 2]
            totals = totals[: r * 4 + e] + (total,) + totals[r * 4 + e + 1 :]
    return totals, squares


@triton.jit(do_not_specialize=["m", "eps"])
def _stream_kernel(
    x_ptr, norm_ptr, words_ptr, meta_ptr, bias_ptr, out_ptr, m, eps, N: tl.constexpr, K: tl.constexpr,
    STRIDE_X: tl.constexpr, STRIDE_OUT: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A program has TILES tiles of rows, of a gated layer first TILES / 2 of gates and then theirs of the other half.
    OWN: tl.constexpr = TILES // 2 if GATED else TILES
    CHUNKS: tl.constexpr = K // 128
    STEPS: tl.constexpr = CHUNKS // WARPS
    THREADS: tl.constexpr = 32 * WARPS
    begin = tl.program_id(0) * STEPS  # counted through all tiles, as in the form that was timed
    threads = tl.arange(0, THREADS)
    warp = threads // 32
    place = threads % 32
    half = tl.arange(0, TILES * 2)  # rows g or g + 8 of a tile
    own = half // 2 // OWN * (N // 16) + half // 2 % OWN
    word = tl.arange(0, 4 * THREADS)
    words_at = words_ptr + (own.to(tl.int64) * (CHUNKS * 256) + half % 2 * 128)[:, None]
    words_at += (word // 128 * 256 + word % 128)[None, :]
    own = tl.arange(0, TILES) // OWN * (N // 16) + tl.arange(0, TILES) % OWN
    meta_at = meta_ptr + (own.to(tl.int64) * (CHUNKS * 16))[:, None, None]
    meta_at += (warp * 16 + place // 4 * 2)[None, :, None] + tl.arange(0, 2)[None, None, :]
    x_row = x_ptr + tl.minimum(place // 4, m - 1).to(tl.int64) * STRIDE_X + place % 4 * 4
    first_at = x_row + (begin % STEPS * WARPS + warp) * 128
    xs = (tl.zeros([THREADS], tl.int32),) * 16
    norms = ()
    if NORM:
        norms = _read(norm_ptr + place % 4 * 4 + (begin % STEPS * WARPS + warp) * 128)
    nothing = tl.zeros([THREADS], tl.float32)
    squares, totals = (nothing,) * 8, (nothing,) * (4 * TILES)
    for i in tl.range(0, STEPS, num_stages=STAGES):
        unit = begin + i
        xs = _wait_and_read(i, first_at, xs)
        now, now_norms = xs, norms
        ahead = ((unit + 1) % STEPS * WARPS + warp) * 128  # of the last step the first again, for nothing
        xs = _read(x_row + ahead)
        if NORM:
            norms = _read(norm_ptr + place % 4 * 4 + ahead)
        at = (unit // STEPS).to(tl.int64) * (OWN * CHUNKS) + unit % STEPS * WARPS
        words = tl.load(words_at + at * 256)
        metas = tl.load(meta_at + at * 16)
        totals, squares = _add_chunk(
            _fours(words, THREADS), _twos(metas), now, now_norms, totals, squares, NORM, TILES
        )
    sums = ()
    for r in tl.static_range(TILES):
        found = sum_of_warps(totals[r * 4 : r * 4 + 4], WARPS)
        for e in tl.static_range(4):
            sums = sums + (found[e] * (1.0 / _UNIT),)
    factors = ()
    if NORM:
        source = threads % 4 * 9
        even = from_thread(squares[0] + squares[6], source)
        odd = from_thread(squares[1] + squares[7], source + 4)
        factors = norm_factors(even, odd, eps, K, WARPS)
    store_tiles(sums, factors, bias_ptr, out_ptr, m, N, 0, STRIDE_OUT, NORM, GATED, HAS_BIAS, ADD, OWN)


_STREAM = Kernel(_stream_kernel)


@dataclass(frozen=True, slots=True)
class Int4StreamConfig:
    """Tiles of 16 rows a program (of a gated layer's halves together), warps, steps of weights in shared memory plus one.

    With ``norm_apart`` (1), another kernel makes the norm.
    """

    tiles: int
    num_warps: int
    stages: int
    norm_apart: int


@functools.cache
def _known_generation() -> bool:
    """Hopper's. (In the interpreter there is no GPU to ask.)"""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == 9


def serves(x: Tensor, weight: Int4Weight) -> bool:
    """Whether this kernel is for such inputs, such a weight and this GPU."""
    plain = weight.bits == 4 and weight.group == CHUNK and not weight.minimums
    return plain and x.dtype == torch.bfloat16 and x.shape[0] <= MAX_ROWS and _known_generation()


@functools.cache
def find_stream_config(n: int, k: int, kind: str) -> Int4StreamConfig | None:
    """The tuned configuration for ``n`` outputs of ``k`` inputs, if this kernel is the fastest; ``kind`` as of the other's."""
    found = tuned.lookup("int4", f"{kind}/{n}x{k}/m{MAX_ROWS}/stream")
    return None if found is None else Int4StreamConfig(**found)


def int4_stream_triton(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    gated: bool,
    add: bool,
    out: Tensor,
    config: Int4StreamConfig,
) -> Tensor:
    """As `kubeinfer.kernels.triton_int4.int4_few_triton`, where it `serves` and whole steps and programs come out.

    Written to ``out``, or added to it where ``add``.
    """
    m, k = x.shape
    n = out.shape[1]
    own = config.tiles // 2 if gated else config.tiles
    if not serves(x, weight) or k % (CHUNK * config.num_warps) or not own or n % (ROWS * own):
        raise ValueError(f"{config} is not for {m} tokens in {x.dtype} and {n} outputs of {k} inputs.")
    if norm_weight is not None and config.norm_apart:
        x, norm_weight = rms_norm(x, norm_weight, eps), None
    args = (
        x, norm_weight if norm_weight is not None else x, weight.words, weight.meta, bias if bias is not None else x, out,
        m, eps,
    )  # fmt: skip
    constants = (
        n, k, x.stride(0), out.stride(0), norm_weight is not None, gated, bias is not None, add,
        config.tiles, config.num_warps, config.stages,
    )  # fmt: skip
    programs = n // (ROWS * own)
    _STREAM.launch((programs, 1, 1), args, constants, config.num_warps, config.stages, pdl=True)
    return out
