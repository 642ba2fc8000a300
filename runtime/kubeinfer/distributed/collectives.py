"""The tensor-parallel group over torch.distributed: NCCL between GPUs, gloo between CPU processes.

Small messages between GPUs of one host are summed over peer memory (every rank reads its peers' buffers), which beats
NCCL's latency in decode steps; multicast is not used. ``disable_custom_all_reduce`` keeps to NCCL.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kubeinfer.kernels.batch_invariance import batch_invariant

logger = logging.getLogger(__name__)
_ONE_SHOT_BYTES = 512 * 1024  # beyond it every rank reading every buffer costs more than a reduce-scatter
_PEER_BYTES = 8 * 2**20  # beyond it NCCL's rings win


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
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
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
        for stage in range(
            num_stages if num_stages > 1 else 0
        ):  # every rank takes part in making every group
            group = dist.new_group(list(range(stage * size, (stage + 1) * size)))
            if stage == rank // size:
                self._group = group
        self._name: str = self._group.group_name
        self._peer: Tensor | None = None
        if peer_memory and device.type == "cuda" and size > 1:
            self._peer = self._peer_buffer()

    def _peer_buffer(self) -> Tensor | None:
        """Memory that every rank can read, or None where the GPUs cannot reach each other."""
        try:
            import torch.distributed._symmetric_memory as symmetric

            buffer: Any = symmetric.empty(_PEER_BYTES // 2, dtype=torch.bfloat16, device=self.device)
            symmetric.rendezvous(buffer, group=self._name)
            return buffer
        except (RuntimeError, ImportError, AttributeError) as exc:
            logger.warning(
                "all-reduce over peer memory is off, NCCL does it all: %s", str(exc).splitlines()[0]
            )
            return None

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        if batch_invariant():
            return self._sum_in_order(x)
        num_bytes = x.numel() * x.element_size()
        if self._peer is None or num_bytes > _PEER_BYTES or num_bytes % 16:
            dist.all_reduce(x, group=self._group)
            return x
        shared = self._peer.view(torch.uint8)[:num_bytes].view(x.dtype).view(x.shape)
        shared.copy_(x)
        if num_bytes <= _ONE_SHOT_BYTES:
            return torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", self._name)
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._name)
        return x.copy_(shared)

    def _sum_in_order(self, x: Tensor) -> Tensor:
        """The sum from the first rank to the last in fp32, whatever the size of ``x``: libraries choose an order by it."""
        gathered = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered.view(-1, *x.shape[1:]), x.contiguous(), group=self._group)
        total = gathered[0].float()
        for part in gathered[1:]:
            total += part
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = torch.empty(self.size * x.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
        # torch 2.13 has renamed it
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, x.contiguous(), group=self._group)
        return gathered.view(self.size, *x.shape).transpose(0, 1).reshape(x.shape[0], -1)

    def smallest(self, value: int) -> int:
        """The smallest over all ranks of all stages."""
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor.item())

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
