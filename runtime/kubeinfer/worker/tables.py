"""The worker's side of running requests: one row each of tokens, blocks and sampling state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kubeinfer.engine.plan import StepPlan


def to_device(values: NDArray[Any] | Sequence[Any], device: torch.device) -> Tensor:
    """``values`` as a tensor on ``device``, without waiting for what the device does.

    A copy from memory that is not page-locked would wait until the step before this one is done.
    """
    array = np.ascontiguousarray(values) if isinstance(values, np.ndarray) else values
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.tensor(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class RowTables:
    """Tables with one row a running request.

    ``block_table`` (host) and ``block_table_device`` hold the same ids; on the CPU they are the same memory.
    ``last_tokens`` lives on the device: a decode step reads what the step before sampled without the host.
    """

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device):
        self.device = device
        self.spare_row = max_rows  # never a request's: padding of captured batches
        self.tokens: list[NDArray[np.int32]] = [
            np.empty(0, np.int32)
        ] * max_rows  # known when the row was made
        self.block_table: NDArray[np.int32] = np.zeros((max_rows + 1, max_blocks), np.int32)
        self.version = 0  # counts the plans that gave a row to another request
        self.last_tokens = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.computed = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self._shared = device.type == "cpu"
        self.block_table_device: Tensor = (
            torch.from_numpy(self.block_table)
            if self._shared
            else torch.zeros(max_rows + 1, max_blocks, dtype=torch.int32, device=device)
        )

    def apply(self, plan: StepPlan) -> None:
        """Take in the plan's new rows and newly given blocks."""
        table = self.block_table
        changed: list[NDArray[np.int64]] = []
        width = table.shape[1]
        for new in plan.new_rows:
            self.tokens[new.row] = np.asarray(new.token_ids, np.int32)
            count = len(new.block_ids)
            table[new.row, :count] = new.block_ids
            changed.append(np.arange(new.row * width, new.row * width + count))
        if plan.new_rows:
            self.version += 1
            last = to_device([[n.row, n.token_ids[-1]] for n in plan.new_rows], self.device)
            self.last_tokens[last[:, 0]] = last[:, 1]
        for row, start, ids in plan.new_blocks:
            table[row, start : start + len(ids)] = ids
            if not self._shared:
                first = row * width + start
                changed.append(np.arange(first, first + len(ids)))
        if changed and not self._shared:
            where = np.concatenate(changed)
            update = to_device(np.stack((where, table.reshape(-1)[where].astype(np.int64))), self.device)
            self.block_table_device.view(-1).index_copy_(0, update[0], update[1].int())
