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
        self._shared = device.type == "cpu"
        self.block_table_device: Tensor = (
            torch.from_numpy(self.block_table)
            if self._shared
            else torch.zeros(max_rows + 1, max_blocks, dtype=torch.int32, device=device)
        )

    def apply(self, plan: StepPlan) -> None:
        """Take in the plan's new rows and newly given blocks."""
        self.version += bool(plan.new_rows)
        width, table = self.block_table.shape[1], self.block_table.reshape(-1)
        where: list[int] = []  # within the table
        blocks: list[int] = []
        for new in plan.new_rows:
            self.tokens[new.row] = np.array(new.token_ids, np.int32)
            where += range(new.row * width, new.row * width + len(new.block_ids))
            blocks += new.block_ids
        for row, start, ids in plan.new_blocks:
            where += range(row * width + start, row * width + start + len(ids))
            blocks += ids
        table[np.array(where, np.int64)] = blocks
        if self._shared:
            for new in plan.new_rows:
                self.last_tokens[new.row] = new.token_ids[-1]
        elif where or plan.new_rows:
            # In one transfer: what a step sends is small, and each has its price.
            count = len(where)
            host = np.empty((2, count + len(plan.new_rows)), np.int64)
            host[0, :count], host[0, count:] = where, [new.row for new in plan.new_rows]
            host[1, :count], host[1, count:] = table[where], [new.token_ids[-1] for new in plan.new_rows]
            at, values = to_device(host, self.device)
            if count:
                self.block_table_device.view(-1).index_copy_(0, at[:count], values[:count].int())
            if plan.new_rows:
                self.last_tokens.index_copy_(0, at[count:], values[count:])
