"""Tokens on their way back from the pipeline's last stage to its first, which decodes from them."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kubeinfer.distributed.pipeline import PARTING_TIME, Pipeline
from kubeinfer.engine.plan import StepPlan
from kubeinfer.worker.tables import RowTables, to_device


class ReturnedTokens:
    """Steps whose tokens were asked for and are not yet in ``tables.last_tokens``, the oldest first.

    Nothing is waited for before a step needs it, so later micro-batches run while tokens travel.
    """

    def __init__(self, pipeline: Pipeline, tables: RowTables):
        self._pipeline = pipeline
        self._tables = tables
        self._steps: deque[tuple[NDArray[np.int32], Tensor, Any]] = deque()
        self._most = 4 * pipeline.stage.count

    def expect(self, plan: StepPlan, rows: NDArray[np.int32]) -> None:
        """The step on ``rows`` has been handed on: its tokens will come."""
        if plan.sampled:
            tokens, handle = self._pipeline.receive_tokens(len(plan.sampled))
            self._steps.append((rows[plan.sampled], tokens, handle))

    def take(self, plan: StepPlan, rows: NDArray[np.int32]) -> None:
        """Before a step on ``rows``: store the tokens that its decodes start from, and all that came before them."""
        for new in plan.new_rows:
            for sampled, _, _ in self._steps:
                sampled[sampled == new.row] = self._tables.spare_row  # was another request's
        decoding = rows[: plan.num_decodes]
        needed = 0
        for count, (sampled, _, _) in enumerate(self._steps, start=1):
            if np.isin(sampled, decoding).any():
                needed = count
        self._store(max(needed, len(self._steps) - self._most))

    def _store(self, count: int) -> None:
        for _ in range(count):
            sampled, tokens, handle = self._steps.popleft()
            handle.wait()
            self._tables.last_tokens[to_device(sampled, tokens.device)] = tokens

    def close(self) -> None:
        """Wait until every token that was asked for has come."""
        while self._steps:
            self._steps.popleft()[2].wait(PARTING_TIME)
