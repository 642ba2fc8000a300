"""Model inputs built from the device tables, against a plain loop."""

from __future__ import annotations

import pytest
import torch

from kubeinfer.kernels.batch_prep import StepInputs, prepare_decode, step_inputs, store_sampled

ROWS, MAX_BLOCKS = 11, 300


def tables(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    last = torch.randint(0, 50000, (ROWS,))
    blocks = torch.randint(1, 9999, (ROWS, MAX_BLOCKS), dtype=torch.int32)
    return last.to(device), blocks.to(device)


def poisoned(tokens: int, seqs: int, device: str) -> StepInputs:
    out = step_inputs(tokens, seqs, MAX_BLOCKS, device)
    for x in (out.input_ids, out.positions, out.slot_mapping, out.seq_lens, out.block_table):
        x.fill_(-99)
    return out


@pytest.mark.parametrize("block_size", [16, 32])
def test_decode(device: str, block_size: int) -> None:
    last, blocks = tables(device)
    rows = [3, -1, 0, 10, 7, -1]
    out = poisoned(8, 8, device)
    index = torch.tensor(rows, dtype=torch.int32, device=device)
    starts = torch.randint(0, MAX_BLOCKS * block_size - 600, (len(rows),), dtype=torch.int32)
    prepare_decode(index, starts.to(device), last, blocks, block_size, out)
    for i, row in enumerate(rows):
        position = int(starts[i]) if row >= 0 else 0
        assert int(out.positions[i]) == position
        assert int(out.input_ids[i]) == (int(last[row]) if row >= 0 else 0)
        assert int(out.seq_lens[i]) == (position + 1 if row >= 0 else 0)
        if row >= 0:
            block = int(blocks[row, position // block_size])
            assert int(out.slot_mapping[i]) == block * block_size + position % block_size
            assert torch.equal(out.block_table[i], blocks[row])
        else:
            assert int(out.slot_mapping[i]) == -1
            assert not out.block_table[i].any()
    assert (out.seq_lens[len(rows) :] == -99).all()
    assert (out.input_ids[len(rows) :] == -99).all()


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("size", [1, 5, 300, 1024, 2500])
def test_store_sampled(device: str, size: int, on_host: bool) -> None:
    rows = torch.randperm(3000)[:size].int()
    rows[torch.rand(size) < 0.3] = -1
    spare_row = int(rows[0])
    starts = torch.randint(0, 9000, (size + 3,), dtype=torch.int32)
    last = torch.full((3000,), -7)
    got, got_starts = last.to(device, copy=True), starts.to(device, copy=True)
    turn = torch.full((1,), 2, device=device)
    out = torch.full((4, size + 3), -5, device="cpu" if on_host else device)
    if on_host and device == "cuda":
        out = out.pin_memory()
    want = out.cpu().clone()
    for turns in range(3):
        sampled = torch.randint(0, 1000, (size,))
        given = (rows.to(device), sampled.to(device), got, got_starts[:size], spare_row, turn, out[:, :size])
        store_sampled(*given)
        for i, (row, token) in enumerate(zip(rows.tolist(), sampled.tolist(), strict=True)):
            if row >= 0:
                last[row] = token
            starts[i] += row not in (-1, spare_row)
        want[(2 + turns) % 4, :size] = sampled
    assert torch.equal(got.cpu(), last)
    assert torch.equal(got_starts.cpu(), starts)
    assert torch.equal(out.cpu(), want)
    assert int(turn) == 5
