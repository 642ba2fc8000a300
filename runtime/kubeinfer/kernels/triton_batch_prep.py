# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernels of `kubeinfer.kernels.batch_prep`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from kubeinfer.kernels.triton_launch import Kernel

if TYPE_CHECKING:
    from kubeinfer.kernels.batch_prep import StepInputs


@triton.jit(do_not_specialize=["max_blocks", "stride_from", "stride_to"])
def _prepare_kernel(
    row_index_ptr,
    starts_ptr,
    last_tokens_ptr,
    block_tables_ptr,
    input_ids_ptr,
    positions_ptr,
    slots_ptr,
    seq_lens_ptr,
    block_table_ptr,
    max_blocks,
    stride_from,
    stride_to,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i is for sequence i: its token and place, and a copy of its block table."""
    i = tl.program_id(0)
    row = tl.load(row_index_ptr + i).to(tl.int64)
    live = row >= 0
    start = tl.where(live, tl.load(starts_ptr + i), 0)
    source = block_tables_ptr + row * stride_from
    lanes = tl.arange(0, BLOCK)
    tl.store(seq_lens_ptr + i, tl.where(live, start + 1, 0))
    for begin in range(0, max_blocks, BLOCK):
        at = begin + lanes
        blocks = tl.load(source + at, mask=live & (at < max_blocks), other=0)
        tl.store(block_table_ptr + i.to(tl.int64) * stride_to + at, blocks, mask=at < max_blocks)
    page = tl.load(source + start // BLOCK_SIZE, mask=live, other=0)
    tl.store(input_ids_ptr + i, tl.load(last_tokens_ptr + row, mask=live, other=0))
    tl.store(positions_ptr + i, start.to(tl.int64))
    tl.store(slots_ptr + i, tl.where(live, page * BLOCK_SIZE + start % BLOCK_SIZE, -1))


@triton.jit(do_not_specialize=["spare_row", "size", "turns", "stride_out"])
def _store_kernel(
    row_index_ptr,
    sampled_ptr,
    last_tokens_ptr,
    starts_ptr,
    turn_ptr,
    out_ptr,
    spare_row,
    size,
    turns,
    stride_out,
    BLOCK: tl.constexpr,
):
    """One program, as it counts the turns."""
    turn = tl.load(turn_ptr)
    out_ptr += (turn % turns) * stride_out
    for begin in range(0, size, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        row = tl.load(row_index_ptr + i, mask=i < size, other=-1).to(tl.int64)
        sampled = tl.load(sampled_ptr + i, mask=i < size, other=0)
        tl.store(last_tokens_ptr + row, sampled, mask=row >= 0)
        live = (row >= 0) & (row != spare_row)
        tl.store(starts_ptr + i, tl.load(starts_ptr + i, mask=live, other=0) + 1, mask=live)
        tl.store(out_ptr + i, sampled, mask=i < size)
    tl.debug_barrier()  # every thread has read the turn
    tl.store(turn_ptr, turn + 1)


_PREPARE = Kernel(_prepare_kernel)
_STORE = Kernel(_store_kernel)


def prepare_decode_triton(
    row_index: Tensor,
    starts: Tensor,
    last_tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
    out: StepInputs,
) -> None:
    """`kubeinfer.kernels.batch_prep.prepare_decode` on CUDA tensors."""
    _PREPARE.launch(
        (row_index.shape[0], 1, 1),
        (
            row_index, starts, last_tokens, block_tables, out.input_ids, out.positions,
            out.slot_mapping, out.seq_lens, out.block_table, block_tables.shape[1], block_tables.stride(0),
            out.block_table.stride(0),
        ),
        (block_size, 256),
        2,
    )  # fmt: skip


def store_sampled_triton(
    row_index: Tensor,
    sampled: Tensor,
    last_tokens: Tensor,
    starts: Tensor,
    spare_row: int,
    turn: Tensor,
    out: Tensor,
) -> None:
    """`kubeinfer.kernels.batch_prep.store_sampled` on CUDA tensors; ``out`` may be in page-locked host memory."""
    _STORE.launch(
        (1, 1, 1),
        (
            row_index, sampled, last_tokens, starts, turn, out, spare_row, row_index.shape[0], out.shape[0],
            out.stride(0),
        ),
        (1024,),
        4,
    )  # fmt: skip
