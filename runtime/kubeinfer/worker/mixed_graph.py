"""Steps that bring in one short prompt, as CUDA graphs: some decodes and one chunk of a few hundred tokens.

Such steps are where a server's time to first token is made, and eager launches would cost more than the work itself.
The first ``decodes`` rows compute one token each, the last row a chunk of up to ``tokens``; unused rows and tokens are
padding that is written nowhere (slot -1) or belongs to the tables' spare row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kubeinfer.kernels.attention import DecodeWorkspace
from kubeinfer.kernels.sampling import sample
from kubeinfer.kernels.shared_prefix import SharedPrefix
from kubeinfer.layers.attention import StepContext
from kubeinfer.worker.packing import Packing
from kubeinfer.worker.shared_prefix import MIN_BATCH, SharedBlocks
from kubeinfer.worker.tables import RowTables

DECODES = (0, 16, 64)
TOKENS = (64, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(slots=True)
class _Shape:
    """One captured shape: its graph, its input buffer with views into it, and its outputs."""

    decodes: int
    tokens: int
    packing: Packing
    buffer: Tensor
    fields: dict[str, Tensor]
    graph: Any = None


class MixedGraphs:
    """Captured steps of up to 64 decodes and one chunk of up to 1,024 tokens."""

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
        """``shares_prefixes``: steps of `MIN_BATCH` decodes and more take what these share."""
        self.model = model
        self._shares_prefixes = shares_prefixes
        self.tables = tables
        self.kv_caches = kv_caches
        self.workspace = workspace
        self._max_seq_len = tables.block_table.shape[1] * block_size
        rows = max(DECODES) + 1
        device = tables.device
        self.logits = torch.empty(rows, vocab_size, dtype=dtype, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._zeros = torch.zeros(rows, dtype=torch.float32, device=device)
        self._longs = torch.zeros(rows, dtype=torch.int64, device=device)
        self._shapes = {
            (d, t): self._shape(d, t)
            for d in DECODES
            for t in TOKENS
            if d + 1 <= max_rows and d + t <= max_tokens
        }

    def _shape(self, decodes: int, tokens: int) -> _Shape:
        total, seqs = decodes + tokens, decodes + 1
        sizes = {
            "rows": seqs,
            "store_rows": seqs,
            "query_start": seqs + 1,
            "seq_lens": seqs,
            "last": seqs,
            "ids": total,
            "positions": total,
            "slots": total,
        }
        if self._shares_prefixes and decodes >= MIN_BATCH:
            sizes |= {"members": decodes, "shared_tokens": decodes}
        packing = Packing(sizes)
        buffer = torch.zeros(packing.size, dtype=torch.int32, device=self.tables.device)
        return _Shape(decodes, tokens, packing, buffer, packing.views(buffer))

    def capture(self, pool: Any) -> Any:
        """Capture every shape, the largest first; returns the memory pool they share."""
        for key in sorted(self._shapes, key=lambda k: -(k[0] + k[1])):
            shape = self._shapes[key]
            shape.fields["rows"].fill_(self.tables.spare_row)
            shape.fields["store_rows"].fill_(self.tables.spare_row)
            shape.fields["slots"].fill_(-1)
            shape.fields["query_start"].copy_(torch.arange(key[0] + 2, dtype=torch.int32))
            shape.fields["seq_lens"].fill_(1)
            if "members" in shape.fields:
                shape.fields["members"].fill_(-1)
            self._step(shape)
            torch.cuda.synchronize()
            shape.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(shape.graph, pool=pool):
                self._step(shape)
            pool = pool or shape.graph.pool()
        return pool

    def run(self) -> None:
        """Run every shape outside a graph."""
        for shape in self._shapes.values():
            self._step(shape)

    def _step(self, shape: _Shape) -> None:
        fields, tables = shape.fields, self.tables
        rows, ids = fields["rows"].long(), fields["ids"].clone()
        if shape.decodes:
            ids[: shape.decodes] = tables.last_tokens[rows[: shape.decodes]].int()
        step = StepContext(
            positions=fields["positions"],
            slot_mapping=fields["slots"],
            query_start=fields["query_start"],
            seq_lens=fields["seq_lens"],
            block_table=tables.block_table_device[rows],
            max_query_len=shape.tokens,
            max_seq_len=self._max_seq_len,
            num_decodes=shape.decodes,
            kv_caches=self.kv_caches,
            workspace=self.workspace,
            wanted=fields["last"],
            shared=SharedPrefix(fields["members"], fields["shared_tokens"]) if "members" in fields else None,
        )
        hidden = self.model.forward(ids, step)
        count = shape.decodes + 1
        logits = self.model.logits(hidden, self.logits[:count])
        zeros, longs = self._zeros[:count], self._longs[:count]
        tokens = sample(
            logits, zeros, longs, zeros, zeros, longs, longs,
            any_sampled=False, any_top_k=False, any_top_p=False, any_min_p=False,
        )  # fmt: skip
        self.tokens[:count].copy_(tokens)
        tables.last_tokens.index_copy_(0, fields["store_rows"].long(), tokens)

    def pick(self, decodes: int, tokens: int) -> tuple[int, int] | None:
        """The smallest captured shape that holds the step, if there is one."""
        fits = [key for key in self._shapes if key[0] >= decodes and key[1] >= tokens]
        return min(fits, key=lambda k: k[0] + k[1], default=None)

    def replay(
        self,
        key: tuple[int, int],
        arrays: dict[str, NDArray[np.int32]],
        num_decodes: int,
        chunk_samples: bool,
        shared: SharedBlocks | None = None,
    ) -> Tensor:
        """Run the step; returns the indices (host, int64) of its real rows within ``tokens`` and ``logits``.

        ``arrays``: rows, ids, positions, slots and seq_lens of the step as it is, decodes first. ``shared``: what its
        decodes share.
        """
        shape = self._shapes[key]
        spare, chunk = self.tables.spare_row, len(arrays["ids"]) - num_decodes
        host = torch.zeros(shape.buffer.shape, dtype=torch.int32, pin_memory=True)
        fields = shape.packing.host_views(host.numpy())
        decodes, pad = shape.decodes, shape.decodes - num_decodes

        def spread(name: str, empty: int) -> None:
            field, values = fields[name], arrays[name]
            field[:num_decodes] = values[:num_decodes]
            field[num_decodes:decodes] = empty
            field[decodes : decodes + len(values) - num_decodes] = values[num_decodes:]

        spread("rows", spare)
        spread("seq_lens", 1)
        spread("ids", 0)
        spread("positions", 0)
        fields["slots"].fill(-1)
        spread("slots", -1)
        fields["query_start"][: decodes + 1] = np.arange(decodes + 1)
        fields["query_start"][decodes + 1] = decodes + chunk
        fields["last"][:decodes] = np.arange(decodes)
        fields["last"][decodes] = decodes + chunk - 1
        fields["store_rows"][:] = fields["rows"]
        if not chunk_samples:
            fields["store_rows"][decodes] = spare
        if "members" in fields:
            fields["members"].fill(-1)
            if shared is not None:
                shared.fill(fields["members"], fields["shared_tokens"])
        shape.buffer.copy_(host, non_blocking=True)
        shape.graph.replay()
        real = np.arange(num_decodes + 1)
        real[num_decodes] += pad
        return torch.from_numpy(real)
