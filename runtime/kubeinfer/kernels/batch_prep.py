"""The step's model inputs, built on the device from tables that live there.

Tables, one row a running request: ``last_tokens`` int64 ``[rows]`` (the last sampled token), ``block_tables`` int32
``[rows, max_blocks]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Buffers with stable addresses, as a CUDA graph needs; a step fills the first rows.

    Attributes:
        input_ids: int64 ``[max_tokens]``.
        positions: int64 ``[max_tokens]``.
        slot_mapping: int32 ``[max_tokens]``; -1 where nothing is to be written.
        seq_lens: int32 ``[max_seqs]``.
        block_table: int32 ``[max_seqs, max_blocks]``.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    seq_lens: Tensor
    block_table: Tensor


def step_inputs(max_tokens: int, max_seqs: int, max_blocks: int, device: torch.device | str) -> StepInputs:
    """Allocate `StepInputs`."""
    return StepInputs(
        input_ids=torch.zeros(max_tokens, dtype=torch.int64, device=device),
        positions=torch.zeros(max_tokens, dtype=torch.int64, device=device),
        slot_mapping=torch.full((max_tokens,), -1, dtype=torch.int32, device=device),
        seq_lens=torch.zeros(max_seqs, dtype=torch.int32, device=device),
        block_table=torch.zeros(max_seqs, max_blocks, dtype=torch.int32, device=device),
    )


def prepare_decode(
    row_index: Tensor,
    starts: Tensor,
    last_tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
    out: StepInputs,
) -> None:
    """Inputs of a decode step: row ``i`` of the batch feeds the last token of request row ``row_index[i]``.

    Negative rows are padding: token 0, position 0, slot -1, context 0, block 0.

    Args:
        row_index: int32 ``[B]``.
        starts: int32 ``[B]``, tokens whose keys and values are in the cache.
        block_tables: int32 ``[rows, max_blocks]``, as wide as ``out.block_table``.
        out: its first ``B`` rows are written (one kernel, no host sync).
    """
    if row_index.is_cuda:
        from kubeinfer.kernels.triton_batch_prep import prepare_decode_triton

        prepare_decode_triton(row_index, starts, last_tokens, block_tables, block_size, out)
        return
    prepare_decode_reference(row_index, starts, last_tokens, block_tables, block_size, out)


def prepare_decode_reference(
    row_index: Tensor,
    starts: Tensor,
    last_tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
    out: StepInputs,
) -> None:
    """`prepare_decode` in torch."""
    size = row_index.shape[0]
    live = row_index >= 0
    rows = row_index.clamp(min=0).long()
    position = starts.long() * live
    table = block_tables[rows] * live.unsqueeze(1)
    block = table.gather(1, (position // block_size).unsqueeze(1)).squeeze(1)
    out.input_ids[:size] = last_tokens[rows] * live
    out.positions[:size] = position
    out.slot_mapping[:size] = (block * block_size + position % block_size).where(live, -1)
    out.seq_lens[:size] = ((position + 1) * live).int()
    out.block_table[:size] = table


def store_sampled(
    row_index: Tensor,
    sampled: Tensor,
    last_tokens: Tensor,
    starts: Tensor,
    spare_row: int,
    turn: Tensor,
    out: Tensor,
) -> None:
    """``last_tokens[row_index] = sampled``, and what a next step of the same rows needs; a copy goes to the host.

    Args:
        row_index: int32 ``[B]``; negative rows are skipped, no row of a request appears twice.
        sampled: int64 ``[B]``.
        starts: int32 ``[B]``, counted up, but not of ``spare_row``, which is no request's.
        turn: int64 ``[1]``, counted up.
        out: int64 ``[turns, at least B]``, perhaps in page-locked host memory; of each ``turn`` another row is written.
    """
    if row_index.is_cuda:
        from kubeinfer.kernels.triton_batch_prep import store_sampled_triton

        store_sampled_triton(row_index, sampled, last_tokens, starts, spare_row, turn, out)
        return
    store_sampled_reference(row_index, sampled, last_tokens, starts, spare_row, turn, out)


def store_sampled_reference(
    row_index: Tensor,
    sampled: Tensor,
    last_tokens: Tensor,
    starts: Tensor,
    spare_row: int,
    turn: Tensor,
    out: Tensor,
) -> None:
    """`store_sampled` in torch."""
    live = row_index >= 0
    rows = row_index[live].long()
    last_tokens[rows] = sampled[live]
    starts += (live & (row_index != spare_row)).int()
    out[int(turn) % out.shape[0], : sampled.shape[0]] = sampled
    turn += 1
