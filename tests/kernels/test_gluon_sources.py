"""Gluon kernels without a GPU: the decode attention of a warp a run as numpy runs it; who does which part of a gated product."""

from __future__ import annotations

import functools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes_in_numpy import Lanes, Pointer, Program, load_kernel

TILE, DIM = 64, 128


def test_the_lists_entries_are_as_the_kernels_take_them() -> None:
    of_list = load_kernel("triton_decode_runs", Program())
    bits = (of_list._KEYS_BIT, of_list._TILE_BIT, of_list._ROW_BIT)
    assert (of_list.FIRST, of_list.TILE, *bits) == (16, TILE, 1, 8, 21)


class Rows:
    """Rows of one query over scattered blocks, whose other blocks and keys are NaN."""

    def __init__(self, lens: list[int], hq: int, hk: int, block_size: int, seed: int):
        rng, self.shuffle = np.random.default_rng(seed), random.Random(seed).shuffle
        self.lens, self.hq, self.hk, self.block_size = lens, hq, hk, block_size
        blocks = [-(-n // block_size) for n in lens]
        self.cache = np.full((2, sum(blocks) + 1, hk, block_size, DIM), np.nan, np.float16)
        self.table = np.zeros((len(lens), max(1, *blocks) + 8), np.int32)
        order = list(range(1, sum(blocks) + 1))
        self.shuffle(order)
        for row, count in enumerate(blocks):
            self.table[row, :count], order = order[:count], order[count:]
            for key in range(lens[row]):
                place = self.cache[:, self.table[row, key // block_size], :, key % block_size]
                place[:] = rng.standard_normal((2, hk, DIM))
        self.q = rng.standard_normal((len(lens), hq, DIM)).astype(np.float16)
        entries = [
            row << 21 | tile << 8 | min(n - tile * TILE, TILE) << 1 | (tile == max(1, -(-n // TILE)) - 1)
            for row, n in enumerate(lens)
            for tile in range(max(1, -(-n // TILE)))
        ]
        self.units = np.array([len(entries), *[0] * 15, *entries], np.int32)

    def attend(self, runs: int) -> tuple[Any, int]:
        """The result of the warps in any order, and how many copies began before the wait."""
        program = Program()
        of_list = load_kernel("triton_decode_runs", program)
        module = load_kernel("gluon_decode_streams", program, triton_decode_runs=of_list)
        rows, hq, _ = self.q.shape
        out = np.full(self.q.size, np.nan, np.float16)
        partial = np.full(2 * runs * hq * DIM, np.nan, np.float32)
        lse, counters = np.full(2 * runs * hq, np.nan, np.float32), np.zeros(rows * self.hk, np.int32)
        barriers = module._SLOTS * module._SLOT
        kind = module.gl.float16
        # What the kernel before writes: a row's newest key.
        newest = {
            (self.table[i, (n - 1) // self.block_size], (n - 1) % self.block_size // 16)
            for i, n in enumerate(self.lens)
            if n
        }

        def was_there(source: Pointer) -> bool:
            cache = self.cache[0].size  # keys, then values
            block, within = divmod(int(source.offset) % cache, self.hk * self.block_size * DIM)
            return (block, within % (self.block_size * DIM) // (16 * DIM)) not in newest

        places = [(head, run) for head in range(self.hk) for run in range(runs)]
        self.shuffle(places)
        early = 0
        for ids in places:
            program.begin(barriers + 8 * module._SLOTS + 8, ids, was_there)
            module._streams_kernel(
                Pointer(self.q.reshape(-1), 0, kind), Pointer(self.cache.reshape(-1), 0, kind), Pointer(self.table.reshape(-1)),
                Pointer(np.array(self.lens, np.int32)), Pointer(self.units), Pointer(out, 0, kind), Pointer(partial),
                Pointer(lse), Pointer(counters), Lanes(np.int32(self.cache.shape[1])),
                Lanes(np.int32(self.table.shape[1])), Lanes(np.int32(runs)), np.float32(DIM**-0.5 * np.log2(np.e)),
                np.float32(1.0), hq * DIM, hq * DIM, self.hk, hq // self.hk, self.block_size, TILE, module._SLOTS, barriers,
                barriers + 8 * module._SLOTS + 8,
            )  # fmt: skip
            assert program.waited
            early += program.early_copies
        assert not counters.any()
        return out.reshape(self.q.shape).astype(np.float64), early

    def want(self) -> Any:
        out = np.zeros(self.q.shape)
        for row, n in enumerate(self.lens):
            keys = np.arange(n)
            for head in range(self.hq if n else 0):
                k, v = self.cache[
                    :,
                    self.table[row, keys // self.block_size],
                    head * self.hk // self.hq,
                    keys % self.block_size,
                ].astype(np.float64)
                logits = k @ self.q[row, head].astype(np.float64) * DIM**-0.5
                weights = np.exp(logits - logits.max())
                out[row, head] = weights @ v / weights.sum()
        return out


@pytest.mark.parametrize(
    ("lens", "hq", "hk", "runs", "block_size"),
    [
        ([130, 1, 64, 65, 0, 100, 3], 7, 1, 3, 16),
        ([260, 140], 4, 1, 7, 16),  # rows that three runs have parts of
        ([0, 0, 1], 8, 1, 2, 16),
        ([63, 64, 0, 129], 8, 2, 4, 32),
        ([15, 16, 17, 48], 2, 2, 9, 16),  # runs with nothing to do
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the GPU makes infinities and NaN without a word
def test_decode_attention(lens: list[int], hq: int, hk: int, runs: int, block_size: int) -> None:
    rows = Rows(lens, hq, hk, block_size, len(lens))
    got, early = rows.attend(runs)
    np.testing.assert_allclose(got, rows.want(), atol=3e-3)
    assert early > 0 or max(lens) <= 16


@functools.cache
def _gated() -> tuple[Program, Any]:
    program = Program()
    return program, load_kernel("gluon_gated_matmul", program)


@given(
    st.integers(1, 40), st.integers(1, 30), st.integers(1, 9), st.integers(1, 200), st.integers(1, 5), st.booleans()
)  # fmt: skip
@settings(max_examples=100)
def test_a_gated_products_steps_are_done_once(
    rows: int, columns: int, steps: int, programs: int, group: int, paired: bool
) -> None:
    """``rows`` and ``programs``: of pairs, where they are ``paired``."""
    program, module = _gated()
    each = 2 if paired else 1
    programs = min(programs, 2 * rows * columns)
    program.programs = each * programs
    done: Counter[tuple[int, int, int]] = Counter()
    halves: dict[int, set[int]] = {}
    of_program: list[list[tuple[int, int, int]]] = []
    for own in range(program.programs):
        program.ids = (own,)
        plan, pieces, total = module._plan(Lanes(np.int32(rows)), steps, columns, each)
        of_program.append([])
        for piece in range(int(pieces)):
            tile, first, last = (int(x) for x in module._work(plan, Lanes(np.int32(piece)), steps, each))
            assert first < last
            row, column = module._place(Lanes(np.int32(tile)), Lanes(np.int32(rows)), columns, group, each)
            done.update((int(row), int(column), step) for step in range(first, last))
            of_program[-1] += [(int(row) // each, int(column), step) for step in range(first, last)]
            if (first, last) != (0, steps):
                halves.setdefault(tile, set()).add(first)
        assert len(of_program[-1]) == total
    assert done == Counter(
        (r, c, s) for r in range(each * rows) for c in range(columns) for s in range(steps)
    )
    # Whoever has a tile's first step waits for one other; they have a place each for their sums.
    assert all(len(firsts) == 2 and 0 in firsts for firsts in halves.values())
    assert all(2 * tile < programs for tile in halves)
    # A pair's programs have the same weights at the same time.
    assert of_program[::each] == of_program[each - 1 :: each]
