"""Decode steps as CUDA graphs: one replay in place of hundreds of launches.

A graph covers a whole decode step for a batch size: inputs from the device's tables, the model, logits, greedy tokens and
their store. Rows that sample otherwise replay the same graph and sample from its logits. Padding rows are the tables'
spare row, whose block table points at the dummy block. A step also counts its rows' starts up, so that a next one of the same
rows needs nothing of the host, and writes its tokens into the host's memory: a copy either way takes as long as several kernels.

Some larger batches are captured a second time, with the pass over blocks that rows share (`kubeinfer.kernels.shared_prefix`),
which is told at each replay what they share.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kubeinfer.kernels.attention import DecodeWorkspace, plan_decodes
from kubeinfer.kernels.batch_prep import StepInputs, prepare_decode, step_inputs, store_sampled
from kubeinfer.kernels.sampling import sample
from kubeinfer.kernels.shared_prefix import SharedPrefix
from kubeinfer.layers.attention import StepContext
from kubeinfer.layers.parallel import Stage
from kubeinfer.worker.shared_prefix import MIN_BATCH, SharedBlocks
from kubeinfer.worker.tables import RowTables

# Steps whose tokens are in the host's memory at a time: more than are ever under way.
_TURNS = 16
_SMALL_SIZES = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)


def capture_sizes(max_num_seqs: int, asked: list[int] | None = None) -> list[int]:
    """Batch sizes to capture: close together where padding costs most, up to 1024."""
    most = min(max_num_seqs, 1024)
    sizes = asked or [*_SMALL_SIZES, *range(160, 513, 32), *range(576, 1025, 64)]
    chosen = {s for s in sizes if 0 < s <= most}
    if not asked:
        chosen.add(most)
    return sorted(chosen)


def shared_sizes(sizes: list[int]) -> list[int]:
    """Of ``sizes`` those captured for shared prefixes too. Far apart: each takes some 30 ms of the start."""
    large = [s for s in sizes if s >= MIN_BATCH]
    return [s for s in large if s % (16 if s < 128 else 128) == 0 or s == large[-1]]


class Capture:
    """Captures graphs one after the other, in one memory pool.

    As `torch.cuda.graph` does, which before each of them gives all free memory back to the driver, to take it again for the next.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._pool: tuple[Any, ...] = ()

    @contextmanager
    def graph(self) -> Iterator[torch.cuda.CUDAGraph]:
        """What is launched inside becomes a graph. Nothing else may be under way on the device."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(*self._pool)
            try:
                yield graph
            finally:
                graph.capture_end()
        self._pool = self._pool or (graph.pool(),)


class DecodeGraphs:
    """Captured decode steps by batch size, over shared input and logits buffers."""

    def __init__(
        self,
        model: Any,
        tables: RowTables,
        kv_caches: list[Tensor],
        workspace: DecodeWorkspace | None,
        block_size: int,
        vocab_size: int,
        dtype: torch.dtype,
        sizes: list[int],
        stage: Stage | None = None,
        shares_prefixes: bool = False,
    ):
        """``stage``: of a pipeline. Its graphs begin and end with hidden states; what is sent is not part of them.

        ``shares_prefixes``: some sizes are captured a second time, for rows that share a prefix (see `shared_sizes`).
        """
        self.stage = stage or Stage()
        self.model = model
        self.tables = tables
        self.kv_caches = kv_caches
        self.workspace = workspace
        self.block_size = block_size
        self.sizes = sizes
        self._shared_sizes = shared_sizes(sizes) if shares_prefixes else []
        largest = sizes[-1]
        device = tables.device
        max_blocks = tables.block_table.shape[1]
        self._inputs: StepInputs = step_inputs(largest, largest, max_blocks, device)
        # A replay's inputs in one copy: rows, starts, and a shared prefix's members and tokens. Kernels are compiled for
        # the alignment of their pointers.
        width = -(-largest // 32) * 32
        self._host_inputs = torch.zeros(4, width, dtype=torch.int32, device=device)
        self._host_inputs[0].fill_(tables.spare_row)
        self._host_inputs[2].fill_(-1)
        self._query_start = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._zeros = torch.zeros(largest, dtype=torch.float32, device=device)
        self._longs = torch.zeros(largest, dtype=torch.int64, device=device)
        self._logits = torch.empty(largest if self.stage.last else 0, vocab_size, dtype=dtype, device=device)
        hidden = model.config.hidden_size
        self.hidden_in = torch.zeros(0 if self.stage.first else largest, hidden, dtype=dtype, device=device)
        self.hidden_out = torch.zeros(0 if self.stage.last else largest, hidden, dtype=dtype, device=device)
        # Greedy tokens, in the memory of whoever is next: the host, or other stages' GPUs.
        on_host = self.stage.first and self.stage.last
        self._tokens = torch.zeros(
            _TURNS if on_host else 1, largest, dtype=torch.int64, device="cpu" if on_host else device,
            pin_memory=on_host,
        )  # fmt: skip
        self._turn = torch.zeros(1, dtype=torch.int64, device=device)
        self._replays = 0  # what the turn will be when all that was launched is done
        self._left: NDArray[np.int32] | None = None  # what the last replay leaves of the host's inputs
        # By size, and whether rows share a prefix.
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    def capture(self, capture: Capture, warm: Callable[[], AbstractContextManager[None]]) -> None:
        """Capture every size, the largest first so that the smaller ones reuse its memory.

        Within ``warm()`` a step is only to compile and load kernels.
        """
        for key in self._keys():
            # The first call compiles kernels for this size and lets cuBLAS take its workspace outside the graph.
            with warm():
                self._step(*key)
            with capture.graph() as self._graphs[key]:
                self._step(*key)
        self._replays = int(self._turn)

    def _keys(self) -> list[tuple[int, bool]]:
        found = [(size, False) for size in self.sizes] + [(size, True) for size in self._shared_sizes]
        return sorted(found, reverse=True)

    def run(self) -> None:
        """Run every size outside a graph."""
        for key in self._keys():
            self._step(*key)

    def _step(self, size: int, shares: bool) -> None:
        tables, inputs = self.tables, self._inputs
        rows, starts, members, shared_tokens = self._host_inputs[:, :size]
        prepare_decode(rows, starts, tables.last_tokens, tables.block_table_device, self.block_size, inputs)
        max_seq_len = inputs.block_table.shape[1] * self.block_size
        # Long before the first attention, which reads it before the kernel before has ended.
        units = None if shares else plan_decodes(inputs.seq_lens, size, max_seq_len, self.kv_caches[0])
        step = StepContext(
            positions=inputs.positions[:size],
            slot_mapping=inputs.slot_mapping[:size],
            query_start=self._query_start[: size + 1],
            seq_lens=inputs.seq_lens[:size],
            block_table=inputs.block_table[:size],
            max_query_len=1,
            max_seq_len=max_seq_len,
            num_decodes=size,
            kv_caches=self.kv_caches,
            workspace=self.workspace,
            shared=SharedPrefix(members, shared_tokens) if shares else None,
            units=units,
        )
        hidden = self.model.forward(
            inputs.input_ids[:size] if self.stage.first else self.hidden_in[:size], step
        )
        if not self.stage.last:
            self.hidden_out[:size].copy_(hidden)
            return
        logits = self.model.logits(hidden, self._logits[:size])
        zeros, longs = self._zeros[:size], self._longs[:size]
        tokens = sample(
            logits, zeros, longs, zeros, zeros, longs, longs,
            any_sampled=False, any_top_k=False, any_top_p=False, any_min_p=False,
        )  # fmt: skip
        store_sampled(
            rows, tokens, tables.last_tokens, starts, tables.spare_row, self._turn, self._tokens[:, :size]
        )

    def fits(self, batch: int) -> bool:
        return batch <= self.sizes[-1]

    def replay(
        self, rows: NDArray[np.int32], starts: NDArray[np.int32], shared: SharedBlocks | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run a decode step: (greedy tokens int64 ``[B]``, logits ``[B, V]``).

        The logits are overwritten by the next replay. Tokens are in the host's memory, once the replay is done and for as many
        more as are ever under way. In a pipeline they are on the device and overwritten too; there ``hidden_in`` must be filled
        before on all stages but the first, and all but the last leave ``hidden_out`` and nothing else.
        """
        batch = len(rows)
        if not self._shared_sizes:
            shared = None
        sizes = self.sizes if shared is None else self._shared_sizes  # the largest is the same
        size = sizes[bisect.bisect_left(sizes, batch)]
        inputs = np.empty((2 if shared is None else 4, size), np.int32)
        inputs[0, :batch], inputs[1, :batch] = rows, starts
        inputs[0, batch:], inputs[1, batch:] = self.tables.spare_row, 0
        if shared is not None:
            shared.fill(inputs[2], inputs[3])
        if self._left is None or not np.array_equal(inputs, self._left):
            self._send(inputs)
        self._graphs[size, shared is not None].replay()
        turn = self._replays % len(self._tokens)
        if self.stage.last:
            self._replays += 1
            inputs[1, :batch] += 1
            self._left = inputs
        return self._tokens[turn, :batch], self._logits[:batch]

    def _send(self, inputs: NDArray[np.int32]) -> None:
        # Whole rows, though a step reads only their beginning: a part of each would be a copy and a kernel.
        fields, size = inputs.shape
        host = torch.empty(fields, self._host_inputs.shape[1], dtype=torch.int32, pin_memory=True)
        host.numpy()[:, :size] = inputs
        self._host_inputs[:fields].copy_(host, non_blocking=True)
