"""Copies KV blocks between a device's cache and host memory, as the plans say."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kubeinfer.engine.plan import StepPlan
from kubeinfer.kernels.block_copy import gather_blocks, layer_pointers, scatter_blocks
from kubeinfer.worker.host_pool import HostPool, copy_async
from kubeinfer.worker.tables import to_device

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

    The step's own stream waits for a gather (memory to memory on the device), not for the host: only blocks that come in
    are waited for. Each direction has its stream, as the bus has two. What comes in waits for what went out before it: it
    may be the same host block. What goes out is behind all that came in, as the step that gathers it is. On the CPU all
    is done at once.
    """

    def __init__(self, num_blocks: int, block_bytes: int, device: torch.device):
        """``num_blocks``: at most so many are kept. Staging memory is taken here, before the KV cache is sized."""
        self.device = device
        self.block_bytes = block_bytes
        self._on_gpu = device.type == "cuda"
        self._rows = max(1, min(num_blocks, _STAGING_BYTES // block_bytes))
        # Two a direction, used in turn: one is filled while the other is emptied.
        self._staging_out = cycle([_Staging(self._rows, block_bytes, device) for _ in range(2)])
        self._staging_in = cycle([_Staging(self._rows, block_bytes, device) for _ in range(2)])
        if self._on_gpu:
            self._out: Any = torch.cuda.Stream(device)
            self._in: Any = torch.cuda.Stream(device)
            self._out_done: Any = torch.cuda.Event()
        self._kv_caches: list[Tensor] = []
        self._pool: HostPool | None = None

    def start(self, kv_caches: list[Tensor], num_blocks: int) -> None:
        """Take the host memory of ``num_blocks`` blocks; after graphs were captured."""
        self._kv_caches = kv_caches
        self._pointers = layer_pointers(kv_caches)
        self._pool = HostPool(num_blocks, self.block_bytes, self.device)
        self._pool.start()
        # Compile or load both kernels now, on the dummy block, and not when a request waits for them.
        blocks, rows = self._to_device([0]), next(self._staging_out).rows[:1]
        gather_blocks(kv_caches, self._pointers, blocks, rows)
        scatter_blocks(kv_caches, self._pointers, blocks, rows)

    def apply(self, plan: StepPlan) -> None:
        """Launch the plan's copies; call it before the step's own work, on the step's stream."""
        if not plan.copies_out and not plan.copies_in:
            return
        if self._pool is None:
            raise RuntimeError("the plan copies KV blocks to host memory, but this worker has none")
        if self._on_gpu and plan.copies_in:
            self._in.wait_event(self._out_done)  # of earlier plans
        # In the order of host blocks, neighbours go in one copy.
        out = sorted(plan.copies_out, key=lambda pair: pair[1])
        for first in range(0, len(out), self._rows):
            self._copy_out(out[first : first + self._rows], next(self._staging_out), self._pool)
        if self._on_gpu and out:
            self._out_done.record(self._out)
            if not {host for _, host in out}.isdisjoint(host for host, _ in plan.copies_in):
                self._in.wait_event(self._out_done)  # one was evicted and found again in the same planning
        back = sorted(plan.copies_in)
        for first in range(0, len(back), self._rows):
            self._copy_in(back[first : first + self._rows], next(self._staging_in), self._pool)

    def _copy_out(self, pairs: list[tuple[int, int]], staging: _Staging, pool: HostPool) -> None:
        rows = staging.rows[: len(pairs)]
        blocks = self._to_device([block for block, _ in pairs])
        runs = pool.runs([host for _, host in pairs])
        if not self._on_gpu:
            gather_blocks(self._kv_caches, self._pointers, blocks, rows)
            for first, host in runs:
                host.copy_(rows[first : first + len(host)])
            return
        step = torch.cuda.current_stream(self.device)
        step.wait_event(staging.free)
        gather_blocks(self._kv_caches, self._pointers, blocks, rows)
        staging.filled.record(step)
        self._out.wait_event(staging.filled)
        with torch.cuda.stream(self._out):
            for first, host in runs:
                copy_async(host, rows[first : first + len(host)])
        staging.free.record(self._out)

    def _copy_in(self, pairs: list[tuple[int, int]], staging: _Staging, pool: HostPool) -> None:
        rows = staging.rows[: len(pairs)]
        blocks = self._to_device([block for _, block in pairs])
        runs = pool.runs([host for host, _ in pairs])
        if not self._on_gpu:
            for first, host in runs:
                rows[first : first + len(host)].copy_(host)
            scatter_blocks(self._kv_caches, self._pointers, blocks, rows)
            return
        step = torch.cuda.current_stream(self.device)
        self._in.wait_event(staging.free)
        with torch.cuda.stream(self._in):
            for first, host in runs:
                copy_async(rows[first : first + len(host)], host)
        staging.filled.record(self._in)
        step.wait_event(staging.filled)
        scatter_blocks(self._kv_caches, self._pointers, blocks, rows)
        staging.free.record(step)

    def _to_device(self, blocks: list[int]) -> Tensor:
        return to_device(np.array(blocks, np.int32), self.device)

    def close(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
        if self._pool is not None:
            self._pool.close()
            self._pool = None
