"""Copies KV blocks between a device's cache and host memory, as the plans say."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from kubeinfer.engine.plan import StepPlan
from kubeinfer.kernels.block_copy import gather_blocks, layer_pointers, scatter_blocks
from kubeinfer.worker.host_pool import HostPool

_STAGING_BYTES = 32 * 2**20


class _Staging:
    """Device memory on its way, and who may touch it: ``filled`` before it is read, ``free`` before it is filled."""

    def __init__(self, rows: int, block_bytes: int, device: torch.device):
        self.rows = torch.empty(rows, block_bytes, dtype=torch.uint8, device=device)
        on_gpu = device.type == "cuda"
        self.filled: Any = torch.cuda.Event() if on_gpu else None
        self.free: Any = torch.cuda.Event() if on_gpu else None


class BlockSwapper:
    """Gathers evicted blocks of all layers into staging memory, which a side stream copies to the host; and back.

    The step's own stream waits for a gather (memory to memory on the device), not for the host: only blocks that the
    step reads are waited for. All traffic with the host runs on one side stream in the order of the plans, so a block
    that comes back is complete, and a host block is not overwritten while it is read. On the CPU all is done at once.
    """

    def __init__(self, num_blocks: int, block_bytes: int, device: torch.device):
        """``num_blocks``: at most so many are kept. Staging memory is taken here, before the KV cache is sized."""
        self.device = device
        self.block_bytes = block_bytes
        rows = max(1, min(num_blocks, _STAGING_BYTES // block_bytes))
        # Two a direction, used in turn: one is filled while the other is emptied.
        self._staging_out = cycle([_Staging(rows, block_bytes, device) for _ in range(2)])
        self._staging_in = cycle([_Staging(rows, block_bytes, device) for _ in range(2)])
        self._rows = rows
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kv_caches: list[Tensor] = []
        self._pool: HostPool | None = None

    def start(self, kv_caches: list[Tensor], num_blocks: int) -> None:
        """Take the host memory of ``num_blocks`` blocks; after graphs were captured."""
        self._kv_caches = kv_caches
        self._pointers = layer_pointers(kv_caches)
        self._pool = HostPool(num_blocks, self.block_bytes, self.device)
        self._pool.start()

    def apply(self, plan: StepPlan) -> None:
        """Launch the plan's copies; call it before the step's own work, on the step's stream."""
        if not plan.copies_out and not plan.copies_in:
            return
        if self._pool is None:
            raise RuntimeError("the plan copies KV blocks to host memory, but this worker has none")
        # In the order of host blocks, neighbours go in one copy.
        out = sorted(plan.copies_out, key=lambda pair: pair[1])
        for first in range(0, len(out), self._rows):
            self._copy_out(out[first : first + self._rows], next(self._staging_out), self._pool)
        back = sorted(plan.copies_in)
        for first in range(0, len(back), self._rows):
            self._copy_in(back[first : first + self._rows], next(self._staging_in), self._pool)

    def _copy_out(self, pairs: list[tuple[int, int]], staging: _Staging, pool: HostPool) -> None:
        rows = staging.rows[: len(pairs)]
        blocks = self._to_device([block for block, _ in pairs])
        if self._side is None:
            gather_blocks(self._kv_caches, self._pointers, blocks, rows)
            for first, host in pool.runs([block for _, block in pairs]):
                host.copy_(rows[first : first + len(host)])
            return
        step = torch.cuda.current_stream(self.device)
        step.wait_event(staging.free)
        gather_blocks(self._kv_caches, self._pointers, blocks, rows)
        staging.filled.record(step)
        self._side.wait_event(staging.filled)
        with torch.cuda.stream(self._side):
            for first, host in pool.runs([block for _, block in pairs]):
                host.copy_(rows[first : first + len(host)], non_blocking=True)
        staging.free.record(self._side)

    def _copy_in(self, pairs: list[tuple[int, int]], staging: _Staging, pool: HostPool) -> None:
        rows = staging.rows[: len(pairs)]
        blocks = self._to_device([block for _, block in pairs])
        if self._side is None:
            for first, host in pool.runs([block for block, _ in pairs]):
                rows[first : first + len(host)].copy_(host)
            scatter_blocks(self._kv_caches, self._pointers, blocks, rows)
            return
        step = torch.cuda.current_stream(self.device)
        self._side.wait_event(staging.free)
        with torch.cuda.stream(self._side):
            for first, host in pool.runs([block for block, _ in pairs]):
                rows[first : first + len(host)].copy_(host, non_blocking=True)
        staging.filled.record(self._side)
        step.wait_event(staging.filled)
        scatter_blocks(self._kv_caches, self._pointers, blocks, rows)
        staging.free.record(step)

    def _to_device(self, blocks: list[int]) -> Tensor:
        ids = torch.tensor(blocks, dtype=torch.int32)
        return ids if self._side is None else ids.pin_memory().to(self.device, non_blocking=True)

    def close(self) -> None:
        if self._side is not None:
            torch.cuda.synchronize(self.device)
        if self._pool is not None:
            self._pool.close()
            self._pool = None
