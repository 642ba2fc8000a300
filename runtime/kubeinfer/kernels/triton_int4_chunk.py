# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc,var-annotated"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""What the kernels of `kubeinfer.kernels.int4` for few tokens do with a chunk of weights, thread by thread.

On a fast memory such kernels must spare instructions. Here a code costs seven eighths of a logic instruction: two codes
a time are put into the mantissas of two 16-bit numbers, which are then multiplied by the tensor cores. In bfloat16 these are
128 + q; what that and the group's zero add up to leaves at the group's end, as so many times the sum of the inputs, which is a
product on the tensor cores as well. (float16 would lose bits to its 1,024, which are subtracted before.) Weights are the
left operand and the tokens, padded to eight, the right one. The blocks of `kubeinfer.kernels.int4` are such that every thread
reads its own part of the operands and nothing is moved between threads before the sums at the end.

For that all tensors are ``[32 warps]``, an element a thread, and the tensor cores are called with inline assembly. The warps of
a program share its rows and take the chunks of inputs in turns.

A thread's place in its warp is ``4 g + t``: of the weights it holds rows ``g`` and ``g + 8`` of a tile, of the inputs those of
token ``g``, of the sums rows ``g`` and ``g + 8`` for the tokens ``2 t`` and ``2 t + 1``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kubeinfer.kernels.triton_mma import add_squares, codes, load2, mma, times

SUBNORMAL_UNIT = tl.constexpr(2.0**-69)  # 2**64 of the inputs times 2**-133 of the codes


@triton.jit
def split_meta(meta):
    """fp32 scale and minimum."""
    scale = (meta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    minimum = (meta >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def sum_of_warps(values, WARPS: tl.constexpr):
    """``[32]`` of each of four (or two) tensors ``[32 WARPS]``: what the warps' threads of one place have together."""
    parts = ()
    for i in tl.static_range(len(values)):
        parts = parts + (tl.reshape(values[i], [WARPS, 32]),)
    if len(values) == 4:
        sums = tl.reduce(parts, 0, _add4)
    else:
        sums = tl.reduce(parts, 0, _add2)
    return sums


@triton.jit
def inputs_of(
    at, step, p: tl.constexpr, left, inside, K: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr
):
    """Of a chunk's product ``p`` of 16: of each of the pointers ``at`` two words of two inputs; zeros past the ``left`` ones."""
    if K % 128 != 0:
        inside = (step * (WARPS * 128) + p * 16 < left).to(tl.int32)
    found = ()
    for i in tl.static_range(len(at)):
        found = found + load2(at[i] + step * (WARPS * 128) + p * 16, inside, EVEN)
    return found


@triton.jit
def add_chunk(
    words, metas, xs, norms, x_at, norm_at, step, left, inside, totals, squares,
    K: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, MINIMUMS: tl.constexpr, NORM: tl.constexpr,
    TILES: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, BF16: tl.constexpr, AHEAD: tl.constexpr,
    MORE: tl.constexpr, EVEN: tl.constexpr, SUBNORMAL: tl.constexpr = False,
):  # fmt: skip
    """Add a chunk's products to ``totals`` (four of each tile and eight tokens) and its inputs' to ``squares``.

    Where AHEAD, ``xs`` and ``norms`` are the chunk's inputs, and if there is MORE those of the chunk ``step`` are returned; else
    they are empty, and the chunk is ``step``.

    With SUBNORMAL, of bfloat16, codes are multiplied as they stand in the words, in bits 0 to 3 or 4 to 7 of 16: as subnormal (or
    the least normal) numbers of 2**-133 or 2**-129 a unit, which spares half of the shifts. The inputs are multiplied by 2**64
    or 2**60 for that (magnitudes from 2**-57 to 2**63 keep all bits), and ``totals`` count by `SUBNORMAL_UNIT`.
    """
    PER: tl.constexpr = GROUP // 16  # products a group
    # How much the numbers that are multiplied exceed the codes: 128 each in bfloat16, and 128 those of a high and a low plane.
    OFFSET: tl.constexpr = (128.0 if BF16 and not SUBNORMAL else 0.0) * (17 if PLANES == 2 else 1) + (
        128.0 if PLANES == 2 else 0.0
    )
    LOW: tl.constexpr = 0x000F000F
    HIGH: tl.constexpr = 0x00F000F0
    nothing = tl.zeros([words[0].shape[0]], tl.float32)
    one = tl.full([words[0].shape[0]], 0x3F803F80 if BF16 else 0x3C003C00, tl.int32)
    one8 = one  # of inputs 8 to 15
    if SUBNORMAL:
        one = tl.full([words[0].shape[0]], 0x00010001, tl.int32)
        one8 = tl.full([words[0].shape[0]], 0x00100010, tl.int32)
        power = tl.full([words[0].shape[0]], 0x5F805F80, tl.int32)
        power8 = tl.full([words[0].shape[0]], 0x5D805D80, tl.int32)
    for group in tl.static_range(8 // PER):
        sums = ()
        accs = ()
        for _ in tl.static_range(TOKENS):
            sums = sums + (nothing, nothing, nothing, nothing)
        for _ in tl.static_range(TILES * PLANES * TOKENS):
            accs = accs + (nothing, nothing, nothing, nothing)
        for p in tl.static_range(group * PER, group * PER + PER):
            if AHEAD:
                x, norm = xs[: 2 * TOKENS], norms[:2]
                xs, norms = xs[2 * TOKENS :], norms[2:]
                if MORE:
                    xs = xs + inputs_of(x_at, step, p, left, inside, K, WARPS, EVEN)
                if MORE and NORM:
                    norms = norms + inputs_of(norm_at, step, p, left, inside, K, WARPS, EVEN)
            else:
                x = inputs_of(x_at, step, p, left, inside, K, WARPS, EVEN)
                if NORM:
                    norm = inputs_of(norm_at, step, p, left, inside, K, WARPS, EVEN)
            inputs = ()
            for i in tl.static_range(TOKENS):
                b0, b1 = x[2 * i], x[2 * i + 1]
                if NORM:
                    square = add_squares(b0, b1, squares[8 * i : 8 * i + 8])
                    squares = squares[: 8 * i] + square + squares[8 * i + 8 :]
                    b0, b1 = times(b0, norm[0]), times(b1, norm[1])
                if SUBNORMAL:
                    b0, b1 = times(b0, power), times(b1, power8)
                found = mma(one, one, one8, one8, b0, b1, sums[4 * i : 4 * i + 4], BF16)
                sums = sums[: 4 * i] + found + sums[4 * i + 4 :]
                inputs = inputs + (b0, b1)
            for r in tl.static_range(TILES * PLANES):
                word0 = words[r * 8 + p // 2]
                word1 = words[r * 8 + 4 + p // 2]
                word0, word1 = word0 >> (p % 2 * 8), word1 >> (p % 2 * 8)
                if SUBNORMAL:
                    a0, a1, a2, a3 = word0 & LOW, word1 & LOW, word0 & HIGH, word1 & HIGH
                else:
                    a0, a1, a2, a3 = (
                        codes(word0, BF16),
                        codes(word1, BF16),
                        codes(word0 >> 4, BF16),
                        codes(word1 >> 4, BF16),
                    )
                for i in tl.static_range(TOKENS):
                    acc = accs[(r * TOKENS + i) * 4 : (r * TOKENS + i) * 4 + 4]
                    acc = mma(a0, a1, a2, a3, inputs[2 * i], inputs[2 * i + 1], acc, BF16)
                    accs = accs[: (r * TOKENS + i) * 4] + acc + accs[(r * TOKENS + i) * 4 + 4 :]
        for r in tl.static_range(TILES):
            scales = ()
            apart = ()  # what a group's inputs count besides, in the unit of the codes where these have zeros
            for half in tl.static_range(2):
                meta = metas[2 * (r * (8 // PER) + group) + half]
                if MINIMUMS:
                    scale, minimum = split_meta(meta)
                    apart = apart + (minimum - scale * OFFSET,)
                else:
                    scale = (meta & -256).to(tl.float32, bitcast=True)
                    apart = apart + (-OFFSET - (meta & 255).to(tl.float32),)
                scales = scales + (scale,)
            for i in tl.static_range(4 * TOKENS):
                acc = accs[r * PLANES * 4 * TOKENS + i]
                if PLANES == 2:
                    acc = acc * 16.0 + accs[(r * 2 + 1) * 4 * TOKENS + i]
                total = totals[r * 4 * TOKENS + i]
                if MINIMUMS:
                    total += acc * scales[i % 4 // 2]
                    total += sums[i] * apart[i % 4 // 2]
                else:
                    total += (acc + sums[i] * apart[i % 4 // 2]) * scales[i % 4 // 2]
                totals = totals[: r * 4 * TOKENS + i] + (total,) + totals[r * 4 * TOKENS + i + 1 :]
    return totals, squares, xs, norms
