"""A rank's links to the stages before and after it: hidden states go down the pipeline, sampled tokens back to its head.

Each link is a process group of two ranks, peers of the same place in their stages, for one direction: so a message never
waits behind one that goes the other way, and on GPUs it leaves the stream that computes free. (Micro-batches over
stages: Huang et al. 2019, "GPipe".)
"""

from __future__ import annotations

import os
from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kubeinfer.layers.parallel import Stage

PARTING_TIME = timedelta(seconds=5)  # a message that has not arrived by then never will


class Pipeline:
    """The links of one rank. ``receive_*`` and ``send_*`` of two peers are matched by their order."""

    def __init__(self, rank: int, size: int, num_stages: int, device: torch.device):
        """``rank`` of ``size * num_stages``; the default process group is there already."""
        # NCCL's warning that messages of one group wait for each other: that is why each link has a group of its own.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
        self.stage = Stage(rank // size, num_stages)
        self.device = device
        self._next, self._previous = rank + size, rank - size
        self._first, self._last = rank % size, (num_stages - 1) * size + rank % size
        self._to_next: Any = None
        self._from_previous: Any = None
        self._tokens: Any = None
        for sender in range(size * (num_stages - 1)):  # every rank takes part in making every group
            group = dist.new_group([sender, sender + size])
            if sender == rank:
                self._to_next = group
            elif sender == self._previous:
                self._from_previous = group
        for first in range(size):
            last = (num_stages - 1) * size + first
            group = dist.new_group([first, last])
            if rank in (first, last):
                self._tokens = group
        # What is sent must live until it has arrived. A step that old has been collected, so it has.
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._most_sent = 4 * num_stages
        self._connect()

    def _connect(self) -> None:
        """One message over each link: connections are made now rather than by the first request."""
        message = torch.zeros(1, dtype=torch.int64, device=self.device)
        if not self.stage.first:
            self.receive_hidden(message)
        if not self.stage.last:
            self.send_hidden(message)
        if self.stage.last:
            self.send_tokens(message)
        if self.stage.first:
            self.receive_tokens(1)[1].wait()

    def send_hidden(self, hidden: Tensor) -> None:
        """Hand ``hidden`` to the next stage; returns at once. It must not be written to afterwards."""
        self._keep(dist.isend(hidden, self._next, group=self._to_next), hidden)

    def receive_hidden(self, out: Tensor) -> Tensor:
        """Fill ``out`` with what the stage before sent."""
        dist.irecv(out, self._previous, group=self._from_previous).wait()
        return out

    def send_tokens(self, tokens: Tensor) -> None:
        """From the last stage to the first: a step's sampled tokens, int64 ``[S]``; returns at once."""
        self._keep(dist.isend(tokens, self._first, group=self._tokens), tokens)

    def receive_tokens(self, count: int) -> tuple[Tensor, Any]:
        """On the first stage: where a step's tokens will be, int64 ``[count]``, and the handle to wait on before use."""
        tokens = torch.empty(count, dtype=torch.int64, device=self.device)
        return tokens, dist.irecv(tokens, self._last, group=self._tokens)

    def close(self) -> None:
        """Wait until what was sent has arrived."""
        while self._sent:
            self._sent.popleft()[0].wait(PARTING_TIME)

    def _keep(self, work: Any, tensor: Tensor) -> None:
        sent = self._sent
        sent.append((work, tensor))
        while sent[0][0].is_completed() or len(sent) > self._most_sent:
            sent.popleft()[0].wait()
            if not sent:
                break
