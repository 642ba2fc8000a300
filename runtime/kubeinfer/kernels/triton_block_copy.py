# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Gather and scatter of whole KV blocks over all layers, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kubeinfer.kernels.triton_launch import Kernel

_WORD = 8  # bytes
_BLOCK = 1024  # words a program moves at a time


@triton.jit(do_not_specialize=["num_blocks", "layers"])
def _copy_kernel(
    pointers_ptr,
    blocks_ptr,
    packed_ptr,
    num_blocks,
    layers,
    GATHER: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a page: keys or values of one layer of one block.
    page = tl.program_id(0)
    row = tl.program_id(1)
    layer = page // 2
    block = tl.load(blocks_ptr + row).to(tl.int64)
    # Allocations are aligned to 16 bytes and more, which a loaded address does not say.
    cache = tl.multiple_of(tl.load(pointers_ptr + layer).to(tl.pointer_type(tl.int64)), 16)
    cache += ((page % 2).to(tl.int64) * num_blocks + block) * PAGE_WORDS
    packed = packed_ptr + (row.to(tl.int64) * layers * 2 + page) * PAGE_WORDS
    for first in range(0, PAGE_WORDS, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < PAGE_WORDS
        if GATHER:
            tl.store(packed + at, tl.load(cache + at, mask=inside), mask=inside)
        else:
            tl.store(cache + at, tl.load(packed + at, mask=inside), mask=inside)


_COPY = Kernel(_copy_kernel)


def copy_blocks_triton(
    pointers: Tensor, num_blocks: int, page_bytes: int, blocks: Tensor, packed: Tensor, *, gather: bool
) -> None:
    """`gather_blocks` (``packed`` is written) or `scatter_blocks` (``packed`` is read)."""
    layers = pointers.shape[0]
    words = page_bytes // _WORD
    if page_bytes % _WORD or packed.shape[-1] != layers * 2 * page_bytes or not packed.is_contiguous():
        raise ValueError("KV pages and the buffer they are copied to or from do not fit each other.")
    grid = (layers * 2, len(blocks), 1)
    args = (pointers, blocks, packed.view(-1).view(torch.int64), num_blocks, layers)
    _COPY.launch(grid, args, (gather, words, min(_BLOCK, triton.next_power_of_2(words))), num_warps=4)
