# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Triton kernel of `kubeinfer.kernels.int4`: one token, as fast as the weights are read.

A code becomes a number without a conversion: left in the mantissa of a float32 with an exponent by which its place counts
one, it is that number plus a constant (128, 2,048 or 32,768, by the place). The constant and the zero leave the sum of a group at
once: ``sum (c + q - c - z) x = sum (c + q) x - sum c x - z sum x``, where all but the first term do not depend on the row.

Constants of all kernels: CODES of a word (8, or 4 of 8 bits), GROUPS of a chunk of 32 words, MINIMUMS instead of zeros.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels import tuned
from kubeinfer.kernels.int4 import CHUNK, Int4Weight
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches
from kubeinfer.kernels.triton_linear import Config

# The most tokens of the kernel without tensor cores: with more its instructions, not the weights' bytes, take the time.
MAX_VECTOR_ROWS = 1
_MOST_RUNS = 8  # that `_columns` joins
# Warps that keep the memory of a large GPU busy.
_ENOUGH_WARPS = 1600

# Bits of the float32 numbers 128, 2,048 and 32,768, whose mantissas' places 2^16, 2^12 and 2^8 count one. Kernels get them as
# arguments, which keeps them in registers: with two constants in it, a masking and an or would be two instructions.
_EXPONENTS = (0x43000000, 0x45000000, 0x47000000)


@triton.jit
def split_meta(meta):
    """fp32 scale and minimum."""
    scale = (meta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    minimum = (meta >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def _byte(words, J: tl.constexpr, at8):
    """fp32 of byte ``J`` of each word, plus 32,768."""
    if J == 0:
        moved = words << 8
    else:
        moved = words >> (8 * J - 8)
    return ((moved & 0xFF00) | at8).to(tl.float32, bitcast=True)


@triton.jit
def _number(words, J: tl.constexpr, at16, at12, at8):
    """fp32 of 4-bit code ``J`` of each word, plus the number of its place."""
    if J < 2:
        moved = words << 12
    elif J < 5:
        moved = words
    else:
        moved = words >> 12
    if J % 3 == 2:
        bits = (moved & 0xF00) | at8
    elif J % 3 == 0:
        bits = (moved & 0xF000) | at12
    else:
        bits = (moved & 0xF0000) | at16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _four(x, WIDTH: tl.constexpr):
    """Sums over the four neighbours that one thread holds."""
    return tl.sum(tl.reshape(x, [WIDTH // 4, 4]), 1)


@triton.jit
def _columns(values, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """``ROWS`` tensors ``[LENGTH]`` as the columns of one."""
    if ROWS == 1:
        return tl.reshape(values[0], [LENGTH, 1])
    elif ROWS == 2:
        return tl.join(values[0], values[1])
    elif ROWS == 4:
        four = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
        return tl.reshape(four, [LENGTH, 4])
    else:
        even = tl.join(tl.join(values[0], values[4]), tl.join(values[2], values[6]))
        odd = tl.join(tl.join(values[1], values[5]), tl.join(values[3], values[7]))
        return tl.reshape(tl.join(even, odd), [LENGTH, 8])


@triton.jit
def _load_words(
    words_ptr, rows, beside, start,
    WORDS: tl.constexpr, SPAN: tl.constexpr, HALVES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """A run of ``SPAN`` words of each of ``rows``, and where HALVES is 2 of those ``beside`` them; zeros past the end."""
    lanes = tl.arange(0, SPAN * HALVES)
    within = start + lanes % SPAN
    at = (lanes // SPAN) * (beside * WORDS) + within
    found = ()
    for r in tl.static_range(len(rows)):
        where = words_ptr + rows[r].to(tl.int64) * WORDS + at
        if EVEN_K:
            found = found + (tl.load(where, eviction_policy="evict_first"),)
        else:
            found = found + (tl.load(where, mask=within < WORDS, other=0, eviction_policy="evict_first"),)
    return found


@triton.jit
def _load_meta(
    meta_ptr, rows, beside, start,
    WORDS: tl.constexpr, SPAN: tl.constexpr, HALVES: tl.constexpr, CODES: tl.constexpr, GROUPS: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """Scale and zero of each run of four words, for each group that it has codes of and each of ``rows``."""
    STRIDE: tl.constexpr = WORDS // 32 * GROUPS
    SIDES: tl.constexpr = (
        2 if GROUPS > CODES else 1
    )  # groups of 16: the words' first and second half have their own
    lanes = tl.arange(0, SPAN * HALVES // 4)
    within = start + 4 * (lanes % (SPAN // 4))
    at = (lanes // (SPAN // 4)) * (beside * STRIDE) + (within // 32) * GROUPS
    if SIDES == 2:
        at += within % 32 // 16
    found = ()
    for h in tl.static_range(GROUPS // SIDES):
        for r in tl.static_range(len(rows)):
            where = meta_ptr + rows[r] * STRIDE + at + h * SIDES
            if EVEN_K:
                found = found + (tl.load(where),)
            else:
                found = found + (tl.load(where, mask=within < WORDS, other=0),)
    return found


@triton.jit
def _step(
    words, metas, x_ptr, norm_ptr, start, sums, squares, at16, at12, at8,
    M: tl.constexpr, K: tl.constexpr, STRIDE_X: tl.constexpr, NORM: tl.constexpr, CODES: tl.constexpr, GROUPS: tl.constexpr,
    MINIMUMS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, HALVES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add a tile's products to ``sums`` (token by token, each row's), and the inputs' squares to ``squares``."""
    WIDTH: tl.constexpr = SPAN * HALVES
    SETS: tl.constexpr = min(CODES, GROUPS)
    PER: tl.constexpr = CODES // SETS
    lanes = tl.arange(0, WIDTH)
    column = start * CODES + (lanes // 32) % (SPAN // 32) * (32 * CODES) + lanes % 32
    for h in tl.static_range(SETS):
        numbers = ()
        for i in tl.static_range(PER):
            for r in tl.static_range(ROWS):
                if CODES == 8:
                    numbers = numbers + (_number(words[r], h * PER + i, at16, at12, at8),)
                else:
                    numbers = numbers + (_byte(words[r], h * PER + i, at8),)
        for m in tl.static_range(M):
            plain8 = tl.zeros([WIDTH], tl.float32)
            plain12 = tl.zeros([WIDTH], tl.float32)
            plain16 = tl.zeros([WIDTH], tl.float32)
            square = tl.zeros([WIDTH], tl.float32)
            products = ()
            for i in tl.static_range(PER):
                k = column + (h * PER + i) * 32
                if EVEN:
                    x = tl.load(x_ptr + m * STRIDE_X + k).to(tl.float32)
                else:
                    x = tl.load(x_ptr + m * STRIDE_X + k, mask=k < K, other=0.0).to(tl.float32)
                if NORM:
                    square += x * x
                    if EVEN:
                        x = x * tl.load(norm_ptr + k).to(tl.float32)
                    else:
                        x = x * tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
                if CODES == 4 or (h * PER + i) % 3 == 2:
                    plain8 += x
                elif (h * PER + i) % 3 == 0:
                    plain12 += x
                else:
                    plain16 += x
                for r in tl.static_range(ROWS):
                    if i == 0:
                        products = products + (numbers[r] * x,)
                    else:
                        products = (
                            products[:r] + (products[r] + numbers[i * ROWS + r] * x,) + products[r + 1 :]
                        )
            if CODES == 8:
                sum8, sum12, sum16 = _four(plain8, WIDTH), _four(plain12, WIDTH), _four(plain16, WIDTH)
                plain = sum8 + sum12 + sum16
                shifted = 32768.0 * sum8 + 2048.0 * sum12 + 128.0 * sum16
            else:
                plain = _four(plain8, WIDTH)
                shifted = (32768.0 + 128.0) * plain
            if NORM:
                squares = squares[:m] + (squares[m] + _four(square, WIDTH),) + squares[m + 1 :]
            for r in tl.static_range(ROWS):
                meta = metas[h * ROWS + r]
                left = _four(products[r], WIDTH) - shifted
                if MINIMUMS:
                    scale, minimum = split_meta(meta)
                    total = sums[m * ROWS + r] + scale * left + minimum * plain
                else:
                    scale = (meta & -256).to(tl.float32, bitcast=True)
                    zero = (meta & 255).to(tl.float32)
                    total = sums[m * ROWS + r] + scale * (left - zero * plain)
                sums = sums[: m * ROWS + r] + (total,) + sums[m * ROWS + r + 1 :]
    return sums, squares


@triton.jit(do_not_specialize=["n", "eps", "at16", "at12", "at8"])
def _vector_kernel(
    x_ptr,
    norm_ptr,
    words_ptr,
    meta_ptr,
    bias_ptr,
    out_ptr,
    n,
    eps,
    at16,
    at12,
    at8,
    M: tl.constexpr,
    K: tl.constexpr,
    WORDS: tl.constexpr,
    CODES: tl.constexpr,
    GROUPS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    HALVES: tl.constexpr,
    DEPTH: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    # Of a gated layer a program has gate and up rows in turns, BLOCK_N of each. Where HALVES is 2 a run of words is half of a
    # row's and half of the next's: for inputs that whole runs of one row would not fit well.
    ROWS: tl.constexpr = (BLOCK_N * 2 if GATED else BLOCK_N) // HALVES
    STEPS: tl.constexpr = (WORDS + SPAN - 1) // SPAN
    EVEN_K: tl.constexpr = WORDS % SPAN == 0
    LANES: tl.constexpr = SPAN * HALVES // 4
    EVEN: tl.constexpr = EVEN_K and K == WORDS * CODES
    first = tl.program_id(0) * BLOCK_N
    rows = ()
    for r in tl.static_range(ROWS):
        # Past the last row it is read again, and nothing of it is kept.
        if GATED and HALVES == 2:
            rows = rows + (tl.minimum(first + r, n - 1),)
        elif GATED:
            rows = rows + (tl.minimum(first + r // 2, n - 1) + (r % 2) * n,)
        else:
            rows = rows + (tl.minimum(first + r * HALVES, n - HALVES),)
    beside = n if GATED else 1

    tiles = ()
    metas = ()
    for i in tl.static_range(DEPTH):
        tiles = tiles + (_load_words(words_ptr, rows, beside, i * SPAN, WORDS, SPAN, HALVES, EVEN_K),)
        metas = metas + (
            _load_meta(meta_ptr, rows, beside, i * SPAN, WORDS, SPAN, HALVES, CODES, GROUPS, EVEN_K),
        )
    own = first + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        if GATED:
            tile = tl.arange(0, 2 * BLOCK_N)
            column = first + tile // 2
            bias = tl.load(bias_ptr + column + (tile % 2) * n, mask=column < n, other=0.0).to(tl.float32)
        else:
            bias = tl.load(bias_ptr + own, mask=own < n, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    sums = ()
    squares = ()
    for _ in tl.static_range(M):
        squares = squares + (tl.zeros([LANES], tl.float32),)
        for _ in tl.static_range(ROWS):
            sums = sums + (tl.zeros([LANES], tl.float32),)
    if UNROLL:
        for i in tl.static_range(STEPS):
            words = tiles[0]
            meta = metas[0]
            tiles = tiles[1:]
            metas = metas[1:]
            if i + DEPTH < STEPS:
                tiles = tiles + (
                    _load_words(words_ptr, rows, beside, (i + DEPTH) * SPAN, WORDS, SPAN, HALVES, EVEN_K),
                )
                metas = metas + (
                    _load_meta(
                        meta_ptr, rows, beside, (i + DEPTH) * SPAN, WORDS, SPAN, HALVES, CODES, GROUPS, EVEN_K
                    ),
                )
            sums, squares = _step(
                words, meta, x_ptr, norm_ptr, i * SPAN, sums, squares, at16, at12, at8,
                M, K, STRIDE_X, NORM, CODES, GROUPS, MINIMUMS, ROWS, SPAN, HALVES, EVEN,
            )  # fmt: skip
    else:
        for start in range(0, WORDS, SPAN):
            words = tiles[0]
            meta = metas[0]
            # Past the end nothing is fetched.
            tiles = tiles[1:] + (
                _load_words(words_ptr, rows, beside, start + DEPTH * SPAN, WORDS, SPAN, HALVES, False),
            )
            metas = metas[1:] + (
                _load_meta(
                    meta_ptr, rows, beside, start + DEPTH * SPAN, WORDS, SPAN, HALVES, CODES, GROUPS, False
                ),
            )
            sums, squares = _step(
                words, meta, x_ptr, norm_ptr, start, sums, squares, at16, at12, at8,
                M, K, STRIDE_X, NORM, CODES, GROUPS, MINIMUMS, ROWS, SPAN, HALVES, EVEN,
            )  # fmt: skip

    for m in tl.static_range(M):
        columns = _columns(sums[m * ROWS : (m + 1) * ROWS], ROWS, LANES)
        if HALVES == 1:
            result = tl.sum(columns, 0)
        else:
            halves = tl.sum(tl.reshape(columns, [HALVES, LANES // HALVES, ROWS]), 1)
            result = tl.reshape(tl.trans(halves), [ROWS * HALVES])
        if NORM:
            result = result * tl.rsqrt(tl.sum(squares[m], 0) / (K * HALVES) + eps)
        if HAS_BIAS:
            result += bias
        if GATED:
            gate, up = tl.split(tl.reshape(result, [BLOCK_N, 2]))
            result = gate / (1.0 + tl.exp(-gate)) * up
        target = out_ptr + m * STRIDE_OUT + own
        if ADD:
            result += tl.load(target, mask=own < n, other=0.0).to(tl.float32)
        tl.store(target, result.to(out_ptr.dtype.element_ty), mask=own < n)


_VECTOR = Kernel(_vector_kernel)


@functools.cache
def find_config(m: int, n: int, k: int, kind: str, chunk: int = CHUNK, minimums: bool = False) -> Config:
    """Rows and words of a tile, warps and tiles fetched ahead; ``kind`` is ``plain`` or ``gated`` (two rows an output)."""
    m = 1 << (m - 1).bit_length()
    found = tuned.lookup("int4", f"{kind}/{n}x{k}/m{m}", f"{kind}/k{triton.next_power_of_2(k)}/m{m}")
    most = 4 if minimums else 8  # runs a program: words and scales of all are in registers at once
    if found is not None and not minimums:
        return Config(**found)
    words = triton.cdiv(k, chunk) * 32
    programs = triton.cdiv(n * (2 if kind == "gated" else 1), 2 * most // m)
    warps = 1
    while warps < 4 and programs * warps < _ENOUGH_WARPS and 128 * warps <= words:
        warps *= 2
    rows = max(2, most * row_halves(n, k, 128 * warps, kind, chunk) // m)
    return Config(rows // 2 if kind == "gated" else rows, 128 * warps, warps, 1)


@functools.cache
def row_halves(n: int, k: int, width: int, kind: str, chunk: int = CHUNK) -> int:
    """2 where runs of ``width`` words are better halves of two rows' (K 3,584 is three and a half runs of 128), else 1."""
    words = triton.cdiv(k, chunk) * 32
    if kind != "gated" and n % 2:
        return 1
    half = width // 2
    return 2 if triton.cdiv(words, half) * half < 0.95 * triton.cdiv(words, width) * width else 1


def layout(weight: Int4Weight) -> tuple[int, int, bool]:
    """The kernels' CODES, GROUPS and MINIMUMS."""
    return 32 // weight.bits, weight.chunk // weight.group, weight.minimums


def int4_vector_triton(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    gated: bool,
    residual: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """`kubeinfer.kernels.int4.int4_linear` of one or a few tokens; the weight's order is the inputs'."""
    m, k = x.shape
    n = weight.n // 2 if gated else weight.n
    if x.stride(1) != 1:
        x = x.contiguous()
    out = residual if residual is not None else torch.empty(m, n, dtype=x.dtype, device=x.device)
    words, kind = weight.words.shape[1], "gated" if gated else "plain"
    config = config or find_config(m, n, k, kind, weight.chunk, weight.minimums)
    halves = row_halves(n, k, config.block_k, kind, weight.chunk)
    if config.block_n * (2 if gated else 1) % (2 * halves):
        halves = 1
    if config.block_n * (2 if gated else 1) // halves > _MOST_RUNS:
        raise ValueError(f"{config}: more than {_MOST_RUNS} runs of words a program")
    span = config.block_k // halves
    steps = triton.cdiv(words, span)
    pdl = overlaps_launches()
    args = (
        x, norm_weight if norm_weight is not None else x, weight.words, weight.meta, bias if bias is not None else x, out,
        n, eps, *_EXPONENTS,
    )  # fmt: skip
    constants = (
        m, k, words, *layout(weight), x.stride(0), out.stride(0), norm_weight is not None, gated, bias is not None,
        residual is not None, config.block_n, span, halves, min(config.depth, steps), steps == 1, pdl,
    )  # fmt: skip
    _VECTOR.launch((triton.cdiv(n, config.block_n), 1, 1), args, constants, config.num_warps, pdl=pdl)
    return out
