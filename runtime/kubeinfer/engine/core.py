"""The engine core: plan a step, launch it, take in the step before."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from kubeinfer.engine.kv_cache import KVCacheManager
from kubeinfer.engine.messages import EngineInfo, EngineOutput, EngineOutputs, EngineRequest
from kubeinfer.engine.pacing import StepPacer
from kubeinfer.engine.scheduler import Scheduler, SchedulerConfig
from kubeinfer.errors import OptionError

if TYPE_CHECKING:
    from kubeinfer.distributed.executor import CacheSpec, Executor
    from kubeinfer.model_config import ModelConfig
    from kubeinfer.options import EngineOptions

logger = logging.getLogger(__name__)
_GIB = 2**30
_COPIES_IN_BYTES = 256 * 2**20  # of a GPU that a step waits for: 5 to 20 ms on PCIe of generation 5 to 3


class EngineCore:
    """Scheduler and executor joined. Not thread-safe: one loop owns it."""

    def __init__(
        self, options: EngineOptions, model_config: ModelConfig, executor: Executor, limits: tuple[int, int]
    ):
        """``limits``: most sequences and most tokens of a step, as resolved for the device."""
        started = time.perf_counter()
        self.executor = executor
        spec = executor.start()
        max_model_len = fit_model_len(options, model_config, spec)
        max_num_seqs, max_tokens = limits
        kv_cache = KVCacheManager(
            spec.num_blocks, spec.block_size, options.enable_prefix_caching, spec.num_host_blocks,
            max_copies_in=max(1, _COPIES_IN_BYTES * spec.num_host_blocks // max(1, spec.host_cache_bytes)),
        )  # fmt: skip
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_tokens,
                max_model_len=max_model_len,
                long_prefill_token_threshold=options.long_prefill_token_threshold,
                enable_chunked_prefill=options.enable_chunked_prefill,
                policy=options.scheduling_policy,
                num_stages=options.pipeline_parallel_size,
                wait_for_tokens=executor.depth <= options.pipeline_parallel_size,
            ),
            kv_cache,
        )
        phases = dict(spec.start_seconds)
        phases["total"] = round(time.perf_counter() - started, 3)
        tokens = (spec.num_blocks - 1) * spec.block_size
        logger.info(
            "memory: weights %.2f GiB, KV cache %.2f GiB = %d tokens in %d blocks of %d; %.1f requests of %d tokens at once",
            spec.weight_bytes / _GIB, spec.kv_cache_bytes / _GIB, tokens, spec.num_blocks - 1, spec.block_size,
            tokens / max_model_len, max_model_len,
        )  # fmt: skip
        if spec.num_host_blocks:
            logger.info(
                "host memory keeps %.2f GiB a GPU of evicted KV blocks = %d tokens",
                spec.host_cache_bytes / _GIB, spec.num_host_blocks * spec.block_size,
            )  # fmt: skip
        logger.info("started: %s", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items()))
        self.info = EngineInfo(
            max_model_len=max_model_len,
            num_blocks=spec.num_blocks,
            block_size=spec.block_size,
            vocab_size=model_config.vocab_size,
            device=options.device,
            dtype=model_config.dtype,
            weight_bytes=spec.weight_bytes,
            kv_cache_bytes=spec.kv_cache_bytes,
            max_num_seqs=max_num_seqs,
            start_seconds=phases,
        )
        self._num_in_flight = 0
        # Where one step is queued while another runs, and there are no stages to keep busy, a server may queue it late.
        self._pacer = StepPacer() if executor.depth == 2 and options.pipeline_parallel_size == 1 else None
        self._ended: list[EngineOutput] = []  # aborts to be told with the next step

    def add_requests(self, requests: list[EngineRequest]) -> None:
        for request in requests:
            self.scheduler.add(request)

    def abort_requests(self, request_ids: list[str]) -> None:
        self._ended.extend(self.scheduler.abort(request_ids))

    def has_work(self) -> bool:
        return self._num_in_flight > 0 or bool(self._ended) or self.scheduler.has_unfinished()

    def spare_seconds(self) -> float:
        """How long a server may listen for requests before `step`, without the device waiting for it."""
        if self._pacer is None or self._ended:
            return 0.0
        return self._pacer.plan_at() - time.perf_counter()

    def step(self) -> EngineOutputs:
        """Launch one step if one can run, and take in the oldest step in flight if no more may fly.

        Returns what is new; its outputs may be empty while the pipeline fills.
        """
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is not None:
            self.executor.submit(plan)
            self._num_in_flight += 1
            if self._pacer is not None:
                self._pacer.launched(began, time.perf_counter(), plan.num_decodes, plan.chunk_tokens)
        outputs: list[EngineOutput] = []
        if self._num_in_flight and (plan is None or self._num_in_flight >= self.executor.depth):
            result = self.executor.collect()
            if self._pacer is not None:
                self._pacer.finished(time.perf_counter())
            outputs = self.scheduler.update(result)
            self._num_in_flight -= 1
        if self._ended:
            outputs += self._ended
            self._ended = []
        return EngineOutputs(outputs, self.scheduler.stats())

    def reset_prefix_cache(self) -> None:
        self.scheduler.kv_cache.reset_prefix_cache()

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()

    def shutdown(self) -> None:
        self.executor.shutdown()


def fit_model_len(options: EngineOptions, model_config: ModelConfig, spec: CacheSpec) -> int:
    """The longest sequence: the model's limit, if the KV cache can hold one such sequence.

    Where the user set no ``max_model_len`` it is lowered to what fits; a length the user asked for is never cut.
    """
    tokens = (spec.num_blocks - 1) * spec.block_size
    if model_config.max_model_len <= tokens:
        return model_config.max_model_len
    if options.max_model_len is not None:
        raise OptionError(
            f"max_model_len {options.max_model_len} needs more KV cache than there is: {tokens} tokens fit. "
            f"Lower --max-model-len to {tokens} or less, or raise "
            + ("--cpu-kvcache-space." if options.device == "cpu" else "--gpu-memory-utilization."),
            "max_model_len",
        )
    logger.warning(
        "max_model_len lowered from the model's %d to %d tokens: that is what the KV cache holds",
        model_config.max_model_len, tokens,
    )  # fmt: skip
    return tokens


def make_core(options: EngineOptions, serving: bool = False) -> EngineCore:
    """Read the model's configuration, resolve device-dependent defaults, and start an engine.

    ``serving``: streams are read as they come, so that steps are kept short where no option says otherwise.
    """
    from kubeinfer.distributed.executor import make_executor
    from kubeinfer.engine.defaults import (
        check_batch_invariant,
        check_dtype,
        check_offload,
        resolve_defaults,
        step_limits,
    )
    from kubeinfer.model_config import load_model_config

    options = resolve_defaults(options)
    model_config = check_dtype(options, load_model_config(options))
    check_batch_invariant(options, model_config)
    check_offload(options, model_config)
    limits = step_limits(options, model_config, serving)
    from kubeinfer.worker.worker import Worker

    executor = make_executor(Worker, options, model_config, limits)
    try:
        return EngineCore(options, model_config, executor, limits)
    except BaseException:
        executor.shutdown()
        raise
