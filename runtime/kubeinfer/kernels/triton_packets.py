# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,attr-defined"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""Triton kernel of `kubeinfer.kernels.all_reduce.sum_packets`: sums of a few rows, with one way over the link and no fence.

Program ``r`` writes row ``r`` into every peer's memory as packets of 8 bytes, 4 of the row and 4 of a number that says
which call they are of, and looks at its own memory until each packet of its peers bears this call's number. A packet is
written and read whole, so what comes with the right number is the right data, whatever the order of arrival (the method of
NCCL's LL protocol).

The number counts the calls in which the program took part; it is kept in memory, so that a replayed CUDA graph goes on
counting. Calls take turns between two inboxes by its last bit. That is enough: a rank writes call ``n + 2`` into the inbox
of call ``n`` after its own call ``n + 1`` is complete, thus after it has seen the peer's packets of ``n + 1``, which the peer
sent after its kernel of call ``n``, reads included, was complete.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.all_reduce import Inboxes, Peers
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches


@triton.jit
def _trap(condition):
    """End the kernel with an error if ``condition`` is not zero."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .pred ends;
            setp.ne.s32 ends, $1, 0;
            @ends trap;
            mov.u32 $0, 0;
        }
        """,
        "=r,r",
        [condition],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _take(inbox, mask, number, limit, MEET: tl.constexpr):
    """The words of the packets at ``inbox`` once all bear ``number``; a trap after ``limit`` looks."""
    empty = number.to(tl.int64) << 32
    packets = tl.load(inbox, mask=mask, other=empty, volatile=True)
    if MEET:
        late = tl.sum(((packets >> 32).to(tl.int32) != number).to(tl.int32), 0)
        left = limit
        while late > 0:
            packets = tl.load(inbox, mask=mask, other=empty, volatile=True)
            late = tl.sum(((packets >> 32).to(tl.int32) != number).to(tl.int32), 0)
            left -= 1
            _trap((left <= 0).to(tl.int32))
    return packets.to(tl.int32)


@triton.jit
def _first(words, element: tl.constexpr):
    """The first number of each word, in fp32."""
    if element.primitive_bitwidth == 32:
        numbers = words.to(element, bitcast=True)
    else:
        numbers = (words & 0xFFFF).to(tl.int16).to(element, bitcast=True)
    return numbers.to(tl.float32)


@triton.jit
def _second(words, element: tl.constexpr):
    """The second 16-bit number of each word, in fp32."""
    return (words >> 16).to(tl.int16).to(element, bitcast=True).to(tl.float32)


@triton.jit
def _word(first, second, element: tl.constexpr):
    """Words of numbers in fp32, rounded."""
    if element.primitive_bitwidth == 32:
        words = first.to(element).to(tl.int32, bitcast=True)
    else:
        low = first.to(element).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words = low | (second.to(element).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return words


@triton.jit(do_not_specialize=["limit", "eps"])
def _packets_kernel(
    peers_ptr,
    calls_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    limit,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    W_PAD: tl.constexpr,
    START: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    MEET: tl.constexpr,
    PDL: tl.constexpr,
):
    """``W`` words a row. Inboxes begin ``START`` packets into peer memory: ``[2, SIZE, ROWS, STRIDE]`` packets."""
    element: tl.constexpr = out_ptr.dtype.element_ty
    WORDS: tl.constexpr = tl.pointer_type(tl.int32)
    row = tl.program_id(0)
    words = tl.arange(0, W_PAD)
    mask = words < W
    if NORM:
        weight = tl.load(weight_ptr.to(WORDS) + words, mask=mask, other=0)
    peers = ()
    for p in tl.static_range(SIZE):
        address = tl.load(peers_ptr + p).to(tl.pointer_type(tl.int64))
        peers = peers + (tl.multiple_of(address, 16) + START,)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = row * W + words
    mine = tl.load(x_ptr.to(WORDS) + at, mask=mask, other=0)
    number = tl.load(calls_ptr + row) + 1
    turn = (number & 1) * (SIZE * ROWS * STRIDE) + row * STRIDE
    packets = (number.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    for p in tl.static_range(SIZE):
        if p != RANK:
            tl.store(peers[p] + RANK * (ROWS * STRIDE) + turn + words, packets, mask=mask)
    if ADD:
        residual = tl.load(residual_ptr.to(WORDS) + at, mask=mask, other=0)
    if MEET:
        tl.debug_barrier()  # no packet stays behind the looks for others

    first = tl.zeros([W_PAD], tl.float32)
    second = tl.zeros([W_PAD], tl.float32)
    for p in tl.static_range(SIZE):
        if p == RANK:
            part = mine
        else:
            part = _take(peers[RANK] + p * (ROWS * STRIDE) + turn + words, mask, number, limit, MEET)
        first += _first(part, element)
        if W < H:
            second += _second(part, element)
    if ADD:
        first += _first(residual, element)
        if W < H:
            second += _second(residual, element)
    # The norm is of what is stored, so that it does not matter where the sum was rounded.
    result = _word(first, second, element)
    if ADD:
        tl.store(residual_ptr.to(WORDS) + at, result, mask=mask)
    if NORM:
        first = _first(result, element)
        squares = first * first
        if W < H:
            second = _second(result, element)
            squares += second * second
        factor = tl.rsqrt(tl.sum(squares, 0) / H + eps)
        first = first * factor * _first(weight, element)
        if W < H:
            second = second * factor * _second(weight, element)
        result = _word(first, second, element)
    tl.store(out_ptr.to(WORDS) + at, result, mask=mask)
    if MEET:
        tl.debug_barrier()
        tl.store(calls_ptr + row, number)


_PACKETS = Kernel(_packets_kernel)


@functools.cache
def _config(num_words: int) -> tuple[int, int]:
    """Padded words and warps."""
    padded = triton.next_power_of_2(num_words)
    return padded, min(16, max(1, padded // 256))


def sum_packets_triton(
    peers: Peers,
    inboxes: Inboxes,
    x: Tensor,
    out: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
) -> None:
    """`kubeinfer.kernels.all_reduce.sum_packets` on a GPU."""
    rows, width = x.shape
    num_words = width * x.element_size() // 4
    padded, num_warps = _config(num_words)
    pdl = overlaps_launches()
    args = (
        peers.addresses, inboxes.calls, x, out if residual is None else residual, out if weight is None else weight,
        out, peers.limit, eps,
    )  # fmt: skip
    constants = (
        peers.rank, peers.size, width, num_words, padded, inboxes.offset // 8, inboxes.rows, inboxes.words,
        residual is not None, weight is not None, peers.meet, pdl,
    )  # fmt: skip
    _PACKETS.launch((rows, 1, 1), args, constants, num_warps, pdl=pdl)
