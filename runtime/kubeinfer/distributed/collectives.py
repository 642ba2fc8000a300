"""The tensor-parallel group over torch.distributed: NCCL between GPUs, gloo between CPU processes.

GPUs of one host sum over peer memory (every rank reads its peers' buffers; see `kubeinfer.distributed.peer_memory`), fused
with the residual addition and the norm that follow; multicast is not used. ``disable_custom_all_reduce`` keeps to NCCL.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kubeinfer.distributed.peer_memory import PeerMemory, allocate, usable_programs
from kubeinfer.distributed.shared_memory import HANDLE_BYTES
from kubeinfer.kernels.all_reduce import MOST_RANKS
from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.norm import fused_add_rms_norm

logger = logging.getLogger(__name__)
_PEER_BYTES = 8 * 2**20  # of a sum that nothing is fused with: beyond it NCCL's rings win


class TorchGroup:
    """The ranks that share a stage's layers: all ranks of an engine without pipeline stages.

    ``rank`` counts over all stages, ``size`` ranks a stage. Every rank makes its calls in the same order.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        init_method: str,
        device: torch.device,
        peer_memory: bool,
        num_stages: int = 1,
    ):
        self.rank = rank % size
        self.size = size
        self.device = device
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            init_method=init_method,
            rank=rank,
            world_size=size * num_stages,
            timeout=timedelta(minutes=10),
            device_id=device if device.type == "cuda" else None,
        )
        self._group: Any = dist.group.WORLD
        if num_stages > 1:
            for stage in range(num_stages):  # every rank takes part in making every group
                group = dist.new_group(list(range(stage * size, (stage + 1) * size)))
                if stage == rank // size:
                    self._group = group
        self._peer: PeerMemory | None = None
        self._wants_peer = peer_memory and device.type == "cuda" and size > 1

    def reserve(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Get memory that every rank can read, for tensors up to ``[rows, width]``; NCCL serves what does not fit.

        Once, by all ranks. Where the GPUs cannot reach each other there is a warning and NCCL does it all.
        """
        if not self._wants_peer:
            return
        self._wants_peer = False
        if self.size > MOST_RANKS:
            logger.warning("all-reduce over peer memory serves up to %d GPUs, NCCL does it all", MOST_RANKS)
            return
        programs = self.smallest(usable_programs(self.device, self.size))  # all ranks launch equal grids
        row_bytes = width * dtype.itemsize
        peer: PeerMemory | None = None
        exchanged = False

        def exchange(own: bytes) -> list[bytes]:
            nonlocal exchanged
            exchanged = True
            return self._exchange(own)

        try:
            peer = allocate(self.rank, self.size, self.device, rows, row_bytes, programs, exchange)
        except (RuntimeError, OSError) as exc:
            logger.warning("all-reduce over peer memory is off, NCCL does it all: %s", exc)
            if not exchanged:  # the other ranks wait for it
                self._exchange(bytes(HANDLE_BYTES))
        if self.smallest(peer is not None):
            self._peer = peer
        elif peer is not None:
            peer.close()

    def _exchange(self, own: bytes) -> list[bytes]:
        """Every rank's bytes, as many as this rank's."""
        mine = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(self.device)
        gathered = torch.empty(self.size * len(own), dtype=torch.uint8, device=self.device)
        self._gather_into(gathered, mine)
        return [bytes(part) for part in gathered.view(self.size, -1).cpu().numpy()]

    def buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        return self._peer.lend(rows, width, dtype) if self._peer is not None else None

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        if batch_invariant():
            return self._sum_in_order(x)
        peer, num_bytes = self._peer, x.numel() * x.element_size()
        if peer is None or not _takes(peer, x) or num_bytes > min(peer.one_shot_bytes, _PEER_BYTES):
            if peer is not None and peer.holds(x):
                x = x.clone()  # the next call's part goes where this one is
            dist.all_reduce(x, group=self._group)
            return x
        return peer.sum(x)

    def _sum_in_order(self, x: Tensor) -> Tensor:
        """The sum from the first rank to the last in fp32, whatever the size of ``x``: libraries choose an order by it."""
        gathered = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        self._gather_into(gathered.view(-1, *x.shape[1:]), x)
        total = gathered[0].float()
        for part in gathered[1:]:
            total += part
        return total.to(x.dtype)

    def all_reduce_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if self._peer is None or not _takes(self._peer, x):
            return fused_add_rms_norm(self.all_reduce(x), residual, weight, eps)
        return self._peer.sum(x, residual, weight, eps), residual

    def all_reduce_add(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._peer is None or not _takes(self._peer, x):
            return residual.add_(self.all_reduce(x))
        return self._peer.sum(x, residual).clone()  # the next call may overwrite what lies in peer memory

    def gather_buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        return self._peer.lend(rows, width, dtype, once=True) if self._peer is not None else None

    def all_gather(self, x: Tensor, width: int, out: Tensor | None = None) -> Tensor:
        if self._peer is not None and _takes(self._peer, x) and (out is None or out.stride(1) == 1):
            if out is None:
                out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
            return self._peer.gather(x, out)
        gathered = torch.empty(self.size * x.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
        self._gather_into(gathered, x)
        whole = gathered.view(self.size, *x.shape).transpose(0, 1).reshape(x.shape[0], -1)[:, :width]
        return whole.contiguous() if out is None else out.copy_(whole)

    def _gather_into(self, gathered: Tensor, x: Tensor) -> None:
        """All ranks' ``x`` one after another along the first dimension."""
        # torch 2.13 has renamed it
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, x.contiguous(), group=self._group)

    def smallest(self, value: int) -> int:
        """The smallest over all ranks of all stages."""
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor.item())

    def close(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None
        if dist.is_initialized():
            dist.destroy_process_group()


def _takes(peer: PeerMemory, x: Tensor) -> bool:
    return x.dim() == 2 and x.is_contiguous() and peer.fits(x.shape[0], x.shape[1], x.dtype)
