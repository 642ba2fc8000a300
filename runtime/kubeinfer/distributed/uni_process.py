"""One worker in the engine core's own process."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kubeinfer.distributed.executor import CacheSpec, Executor

if TYPE_CHECKING:
    from kubeinfer.engine.plan import StepPlan, StepResult
    from kubeinfer.model_config import ModelConfig
    from kubeinfer.options import EngineOptions


class UniProcessExecutor(Executor):
    """Calls the worker directly. On a GPU a submitted step runs while the next is planned."""

    def __init__(
        self,
        worker_class: type[Any],
        options: EngineOptions,
        model_config: ModelConfig,
        limits: tuple[int, int],
    ):
        self.worker: Any = worker_class(options, model_config, *limits)
        overlap = options.async_scheduling
        self.depth = 2 if (self.worker.is_gpu if overlap is None else overlap) else 1
        self._pending: deque[Any] = deque()

    def start(self) -> CacheSpec:
        spec: CacheSpec = self.worker.start()
        return spec

    def submit(self, plan: StepPlan) -> None:
        self._pending.append(self.worker.execute(plan))

    def collect(self) -> StepResult:
        result: StepResult = self._pending.popleft().wait()
        return result

    def shutdown(self) -> None:
        # Nobody wants the result of a step under way, but it may write tokens into memory of the host that is given back here.
        with suppress(Exception):  # of a device that has failed: that has been told
            while self._pending:
                self._pending.popleft().wait()
        self._pending.clear()
        self.worker.shutdown()
