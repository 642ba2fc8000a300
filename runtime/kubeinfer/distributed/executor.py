"""How an engine core reaches its workers. The lazy registry at the end picks an implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kubeinfer.engine.plan import StepPlan, StepResult
    from kubeinfer.model_config import ModelConfig
    from kubeinfer.options import EngineOptions


@dataclass
class CacheSpec:
    """What the workers have room for, once weights and graphs are in place."""

    num_blocks: int
    block_size: int
    weight_bytes: int
    kv_cache_bytes: int
    start_seconds: dict[str, float]
    num_host_blocks: int = 0  # KV blocks that host memory keeps beside the device's
    host_cache_bytes: int = 0  # a rank's


class Executor(ABC):
    """Runs steps on one or more devices. Steps run in the order they are submitted."""

    #: how many steps may be in flight: 2 lets the next step be planned while one runs
    depth: int = 1

    @abstractmethod
    def start(self) -> CacheSpec:
        """Load the model and make the KV cache."""

    @abstractmethod
    def submit(self, plan: StepPlan) -> None:
        """Launch a step; returns before it is done where the device runs on its own."""

    @abstractmethod
    def collect(self) -> StepResult:
        """The result of the oldest step that was submitted and not yet collected."""

    @abstractmethod
    def shutdown(self) -> None: ...


def make_executor(
    worker_class: type[Any], options: EngineOptions, model_config: ModelConfig, limits: tuple[int, int]
) -> Executor:
    """One process for one device, a process each for more.

    ``worker_class`` is the caller's: workers stand above this package. ``limits``: sequences and tokens of a step.
    """
    if options.tensor_parallel_size * options.pipeline_parallel_size > 1:
        from kubeinfer.distributed.multi_process import MultiProcessExecutor

        return MultiProcessExecutor(worker_class, options, model_config, limits)
    from kubeinfer.distributed.uni_process import UniProcessExecutor

    return UniProcessExecutor(worker_class, options, model_config, limits)
