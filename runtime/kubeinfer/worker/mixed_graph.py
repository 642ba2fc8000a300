"""Steps that bring in prompts, as CUDA graphs: some decodes, and up to eight chunks of prompts beside them.

Such steps are where a server's time to first token is made, and eager launches would cost more than the work itself.

A captured shape has ``decodes`` sequences of one token, `CHUNKS` of any length, and ``rows`` tokens in all, which a step's
own lie at the beginning of, decodes first. What a step does not use costs it next to nothing: sequences without a token on
the tables' spare row, which the kernels pass over, and tokens at the end that are written nowhere (slot -1). An unused
decode's attention is zeros in the place of a chunk's token, which the chunks' attention, the next kernel, overwrites.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kubeinfer.engine.plan import StepPlan
from kubeinfer.kernels.attention import DecodeWorkspace, plan_decodes
from kubeinfer.kernels.sampling import sample
from kubeinfer.kernels.shared_prefix import SharedPrefix
from kubeinfer.layers.attention import StepContext
from kubeinfer.worker.cuda_graph import Capture
from kubeinfer.worker.packing import Packing
from kubeinfer.worker.shared_prefix import NOTHING_SHARED, SharedBlocks
from kubeinfer.worker.tables import RowTables

CHUNKS = 8
# Tokens of the shapes of each number of decodes. A step's time goes by its tokens, in steps of cuBLAS's tiles (64 to 128
# rows); of decodes there need be few numbers, as unused ones are no tokens. With the chunks 56 and 120 make 64 and 128
# rows of logits. All 51 take about 1.5 s of a 7B model's start, 30 ms each.
ROWS: dict[int, tuple[int, ...]] = {
    0: (64, 128, 192, 256, 512, 1024),
    16: (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024),
    56: (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024),
    120: (192, 256, 320, 384, 448, 512, 640, 768, 1024),
    256: (320, 384, 448, 512, 576, 640, 768, 896, 1024, 1280, 1536, 2048),
}
# Decodes from which a shape has the pass over a shared prefix, which takes 5 us a layer where nothing is shared.
_MIN_SHARED = 100
_ON_DEVICE = -1  # in place of a token that only the device knows


@dataclass(slots=True)
class _Shape:
    """One captured shape: its graph, and its input buffer with views into it."""

    decodes: int
    rows: int
    packing: Packing
    buffer: Tensor
    fields: dict[str, Tensor]
    graph: Any = None


class MixedGraphs:
    """Captured steps of up to 256 decodes, 8 chunks and 2,048 tokens."""

    def __init__(
        self,
        model: Any,
        tables: RowTables,
        kv_caches: list[Tensor],
        workspace: DecodeWorkspace | None,
        vocab_size: int,
        dtype: torch.dtype,
        block_size: int,
        max_rows: int,
        max_tokens: int,
        shares_prefixes: bool = False,
    ):
        """``max_rows`` requests run at once, and a step has ``max_tokens`` tokens at most: no shape is larger.

        ``shares_prefixes``: steps of `_MIN_SHARED` decodes and more take what these share.
        """
        self.model = model
        self._shares_prefixes = shares_prefixes
        self.tables = tables
        self.kv_caches = kv_caches
        self.workspace = workspace
        self.block_size = block_size
        self._max_seq_len = tables.block_table.shape[1] * block_size
        # Where a step's most tokens lie between two sizes they are a size: full steps are common under load.
        keys = {(min(d, max_rows), min(rows, max_tokens)) for d, sizes in ROWS.items() for rows in sizes}
        self._shapes = {key: self._shape(*key) for key in sorted(keys) if key[0] < key[1]}
        self._sizes: dict[int, list[int]] = {}  # tokens by decodes
        for decodes, rows in self._shapes:
            self._sizes.setdefault(decodes, []).append(rows)
        seqs = max(self._sizes, default=0) + CHUNKS
        device = tables.device
        self.logits = torch.empty(seqs, vocab_size, dtype=dtype, device=device)
        self.tokens = torch.zeros(seqs, dtype=torch.int64, device=device)
        self._zeros = torch.zeros(seqs, dtype=torch.float32, device=device)
        self._longs = torch.zeros(seqs, dtype=torch.int64, device=device)
        longest = max((rows for _, rows in self._shapes), default=0)
        self._range: NDArray[np.int32] = np.arange(longest, dtype=np.int32)

    def _shape(self, decodes: int, rows: int) -> _Shape:
        seqs = decodes + CHUNKS
        sizes = {
            "rows": seqs,
            "store_rows": seqs,
            "query_start": seqs + 1,
            "seq_lens": seqs,
            "last": seqs,
            "ids": rows,
            "positions": rows,
            "slots": rows,
        }
        if self._shares_prefixes and decodes >= _MIN_SHARED:
            sizes |= {"members": decodes, "shared_tokens": decodes}
        packing = Packing(sizes)
        buffer = torch.zeros(packing.size, dtype=torch.int32, device=self.tables.device)
        return _Shape(decodes, rows, packing, buffer, packing.views(buffer))

    def capture(self, capture: Capture, warm: Callable[[], AbstractContextManager[None]]) -> None:
        """Capture every shape, the largest first. Within ``warm()`` a step is only to compile and load kernels."""
        empty = StepPlan(0, [], [], [], 0, [], [], [], [])
        nothing = np.empty(0, np.int32)
        for shape in sorted(self._shapes.values(), key=lambda s: -s.rows):
            host = np.empty(shape.packing.size, np.int32)
            self._fill(shape, host, empty, nothing, nothing)
            shape.buffer.copy_(torch.from_numpy(host))
            with warm():
                self._step(shape)
            with capture.graph() as shape.graph:
                self._step(shape)

    def run(self) -> None:
        """Run every shape outside a graph."""
        for shape in self._shapes.values():
            self._step(shape)

    def _step(self, shape: _Shape) -> None:
        fields, tables, decodes = shape.fields, self.tables, shape.decodes
        rows, ids = fields["rows"].long(), fields["ids"]
        if decodes:
            ids = ids.clone()
            first = ids[:decodes]
            first.copy_(torch.where(first == _ON_DEVICE, tables.last_tokens[rows[:decodes]].int(), first))
        shared = SharedPrefix(fields["members"], fields["shared_tokens"]) if "members" in fields else None
        units = None
        if shared is None:
            units = plan_decodes(fields["seq_lens"], decodes, self._max_seq_len, self.kv_caches[0])
        step = StepContext(
            positions=fields["positions"],
            slot_mapping=fields["slots"],
            query_start=fields["query_start"],
            seq_lens=fields["seq_lens"],
            block_table=tables.block_table_device[rows],
            max_query_len=shape.rows,
            max_seq_len=self._max_seq_len,
            num_decodes=decodes,
            kv_caches=self.kv_caches,
            workspace=self.workspace,
            wanted=fields["last"],
            shared=shared,
            units=units,
        )
        hidden = self.model.forward(ids, step)
        count = decodes + CHUNKS
        logits = self.model.logits(hidden, self.logits[:count])
        zeros, longs = self._zeros[:count], self._longs[:count]
        tokens = sample(
            logits, zeros, longs, zeros, zeros, longs, longs,
            any_sampled=False, any_top_k=False, any_top_p=False, any_min_p=False,
        )  # fmt: skip
        self.tokens[:count].copy_(tokens)
        tables.last_tokens.index_copy_(0, fields["store_rows"].long(), tokens)

    def pick(self, decodes: int, chunk_tokens: int, chunks: int) -> tuple[int, int] | None:
        """The captured shape of fewest tokens that holds the step, if there is one; ``chunk_tokens`` of all chunks."""
        if not 0 < chunks <= CHUNKS:
            return None
        needed = decodes + chunk_tokens
        best: tuple[int, int] | None = None
        for most, sizes in self._sizes.items():
            at = bisect_left(sizes, needed)
            if most >= decodes and at < len(sizes) and (best is None or sizes[at] < best[1]):
                best = most, sizes[at]
        return best

    def takes_shared(self, key: tuple[int, int]) -> bool:
        """Whether the shape reads what its decodes share once for all."""
        return "members" in self._shapes[key].fields

    def replay(
        self,
        key: tuple[int, int],
        plan: StepPlan,
        rows: NDArray[np.int32],
        starts: NDArray[np.int32],
        shared: SharedBlocks | None = None,
    ) -> NDArray[np.int64]:
        """Run the step; returns where in ``tokens`` and ``logits`` the plan's sampled entries are.

        ``rows`` and ``starts`` are the plan's, ``shared`` is what its decodes share. Both results are overwritten by the
        next replay.
        """
        shape = self._shapes[key]
        host = torch.empty(
            shape.packing.size, dtype=torch.int32, pin_memory=self.tables.device.type == "cuda"
        )
        real = self._fill(shape, host.numpy(), plan, rows, starts, shared)
        shape.buffer.copy_(host, non_blocking=True)
        if shape.graph is None:  # nothing is captured on a CPU
            self._step(shape)
        else:
            shape.graph.replay()
        return real

    def _fill(
        self,
        shape: _Shape,
        buffer: NDArray[np.int32],
        plan: StepPlan,
        rows: NDArray[np.int32],
        starts: NDArray[np.int32],
        shared: SharedBlocks | None = None,
    ) -> NDArray[np.int64]:
        """Write the step's inputs, padded, into ``buffer``; returns the sequences (of the shape's) that sample."""
        fields, tables, size = shape.packing.host_views(buffer), self.tables, self.block_size
        decodes, first_chunk = plan.num_decodes, shape.decodes  # of the plan's entries, and of the shape's
        used = first_chunk + len(rows) - decodes
        ids, positions, slots = fields["ids"], fields["positions"], fields["slots"]
        ids[:decodes] = _ON_DEVICE
        positions[:decodes] = starts[:decodes]
        pages = tables.block_table[rows[:decodes], starts[:decodes] // size]
        slots[:decodes] = pages * size + starts[:decodes] % size
        ends = np.arange(1, len(rows) + 1, dtype=np.int32)  # of the entries' tokens
        end = decodes
        for i in range(decodes, len(rows)):
            row, start, count = plan.rows[i], plan.starts[i], plan.num_tokens[i]
            begin, end = end, end + count
            ends[i] = end
            ids[begin:end] = tables.tokens[row][start : start + count]
            at = np.add(self._range[:count], start, out=positions[begin:end])
            slots[begin:end] = tables.block_table[row][at // size] * size + at % size
        ids[end:], positions[end:], slots[end:] = 0, 0, -1

        def spread(name: str, values: NDArray[np.int32], empty: int) -> None:
            field = fields[name]
            field[:decodes], field[decodes:first_chunk] = values[:decodes], empty
            field[first_chunk:used], field[used:] = values[decodes:], empty

        lengths = np.array(plan.num_tokens, np.int32)
        spread("rows", rows, tables.spare_row)
        spread("seq_lens", starts + lengths, 0)
        spread("last", ends - 1, 0)
        query_start = fields["query_start"]
        query_start[: decodes + 1] = self._range[: decodes + 1]
        query_start[decodes + 1 : first_chunk + 1] = decodes
        query_start[first_chunk + 1 : used + 1], query_start[used + 1 :] = ends[decodes:], end
        if "members" in fields:
            (shared or NOTHING_SHARED).fill(fields["members"], fields["shared_tokens"])
        sampled = np.array(plan.sampled, np.int64)
        real = np.where(sampled < decodes, sampled, sampled + (first_chunk - decodes))
        store_rows = fields["store_rows"]
        store_rows.fill(tables.spare_row)
        store_rows[real] = rows[sampled]
        return real
