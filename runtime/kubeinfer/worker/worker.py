"""One rank: loads its shard of the model, makes its KV cache, runs steps."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import torch
from torch import Tensor

from kubeinfer.distributed.executor import CacheSpec
from kubeinfer.distributed.pipeline import Pipeline
from kubeinfer.engine.plan import StepPlan
from kubeinfer.errors import ModelLoadError
from kubeinfer.kernels.batch_invariance import use_batch_invariance
from kubeinfer.layers.parallel import Group, SingleGroup, Stage
from kubeinfer.layers.parameters import HostLayers, ParameterStore, belongs
from kubeinfer.model_config import ModelConfig
from kubeinfer.models.registry import model_class
from kubeinfer.options import EngineOptions
from kubeinfer.quantization import GGUFConfig
from kubeinfer.worker.block_swapper import BlockSwapper
from kubeinfer.worker.gpu_setup import prepare_gpu, profile_largest_step
from kubeinfer.worker.host_pool import host_memory
from kubeinfer.worker.memory import (
    block_bytes,
    check_host_memory,
    cpu_kv_blocks,
    free_host_bytes,
    gpu_kv_blocks,
    host_kv_blocks,
    usable_cpus,
)
from kubeinfer.worker.model_runner import ModelRunner, PendingResult
from kubeinfer.worker.weight_streamer import (
    WeightStreamer,
    check_streamed,
    choose_layers,
    freed_bytes,
    stream_layers,
)

logger = logging.getLogger(__name__)
_GIB = 2**30


class Worker:
    """Owns one device. ``start`` once, then ``execute`` a plan at a time."""

    def __init__(
        self,
        options: EngineOptions,
        model_config: ModelConfig,
        max_num_seqs: int,
        max_tokens: int,
        group: Group | None = None,
        pipeline: Pipeline | None = None,
    ):
        self.options = options
        self.model_config = model_config
        self.max_num_seqs = max_num_seqs
        self.max_tokens = max_tokens
        self.group: Group = group or SingleGroup()
        self.pipeline = pipeline
        self.stage = pipeline.stage if pipeline is not None else Stage()
        self.num_layers = len(self.stage.layers(model_config.num_layers))
        self.is_gpu = options.device == "cuda"
        index = self.stage.index * self.group.size + self.group.rank
        self.device = torch.device("cuda", index) if self.is_gpu else torch.device("cpu")
        self.dtype: torch.dtype = getattr(torch, model_config.dtype)
        self.cache_dtype = self.dtype
        self._ranks = options.tensor_parallel_size * options.pipeline_parallel_size  # they share one host
        self.runner: ModelRunner | None = None
        self.swapper: BlockSwapper | None = None
        self.streamer: WeightStreamer | None = None

    def start(self) -> CacheSpec:
        """Weights, then the KV cache from what is left. Raises ``ModelLoadError`` or ``OptionError``."""
        use_batch_invariance(self.options.batch_invariant)
        seconds: dict[str, float] = {}
        began = time.perf_counter()
        if self.is_gpu:
            torch.cuda.set_device(self.device)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, usable_cpus() // self._ranks))
        model, store = self._load_model()
        seconds["weights"] = round(time.perf_counter() - began, 3)
        began = time.perf_counter()
        block_size = int(self.options.block_size or 16)
        kv_heads = max(1, self.model_config.num_kv_heads // self.group.size)
        fp8 = self.options.kv_cache_dtype != "auto"
        self.cache_dtype = torch.float8_e4m3fn if fp8 else self.dtype
        itemsize = self.cache_dtype.itemsize
        per_block = block_bytes(self.model_config, block_size, itemsize, kv_heads, self.num_layers)
        if self.is_gpu:
            peak = profile_largest_step(
                model,
                self._make_kv_caches(1, kv_heads, block_size),
                block_size,
                self.max_tokens,
                self.max_num_seqs,
                self.stage,
                self._key(),
                self.group,
            )
            seconds["profile"] = round(time.perf_counter() - began, 3)
            began = time.perf_counter()
        num_host_blocks = self.group.smallest(self.num_host_blocks(per_block))
        if num_host_blocks:
            self.swapper = BlockSwapper(num_host_blocks, per_block, self.device)
        if self.is_gpu:
            num_blocks = gpu_kv_blocks(
                self.options, self.model_config, per_block, peak, self.max_num_seqs, self.device
            )
        else:
            num_blocks = cpu_kv_blocks(self.options, self.model_config, per_block, self.max_num_seqs)
        num_blocks = self.group.smallest(num_blocks)
        kv_caches = self._make_kv_caches(num_blocks, kv_heads, block_size)
        max_blocks = -(-min(self.model_config.max_model_len, (num_blocks - 1) * block_size) // block_size)
        self.runner = ModelRunner(
            model,
            kv_caches,
            block_size,
            self.max_num_seqs,
            max_blocks,
            self.device,
            self.pipeline,
            self.options.batch_invariant,
        )
        seconds["kv_cache"] = round(time.perf_counter() - began, 3)
        if self.is_gpu:
            began = time.perf_counter()
            prepare_gpu(self.runner, self.options, self.max_tokens, self._key(), self.group)
            seconds["graphs"] = round(time.perf_counter() - began, 3)
        if self.swapper is not None:
            self.swapper.start(kv_caches, num_host_blocks)
        return CacheSpec(
            num_blocks, block_size, store.num_bytes, num_blocks * per_block, seconds, num_host_blocks,
            num_host_blocks * per_block,
        )  # fmt: skip

    def _key(self) -> str:
        """What decides which kernels this worker launches."""
        limits = f"{self.max_num_seqs} {self.max_tokens} rank {self.group.rank} of {self.group.size}"
        return f"{self.model_config} {self.options.model_dump_json()} {limits}"

    def num_host_blocks(self, per_block: int) -> int:
        """KV blocks of ``per_block`` bytes that this rank may keep in host memory."""
        if not self.is_gpu or not self.options.swap_space or not self.options.enable_prefix_caching:
            return 0
        return host_kv_blocks(self.options, per_block, self._ranks, self._free_host_bytes())

    def _free_host_bytes(self) -> int:
        """What all ranks found free before any of them took some of it."""
        return self.group.smallest(free_host_bytes())

    def _load_model(self) -> tuple[Any, ParameterStore]:
        config = self.model_config
        self.group.reserve(self.max_tokens, config.hidden_size, self.dtype)
        store = ParameterStore(
            self.device, self.dtype, self.group, self._host_layers(), self.stage, config.quantization
        )
        model = model_class(config.architecture)(config, store)
        if self.options.load_format == "dummy":
            store.fill_random(self.options.seed)
        else:
            from kubeinfer.weights.readers import iterate_tensors

            elsewhere: tuple[str, ...] = model.weights_elsewhere

            def wanted(name: str) -> bool:
                return not belongs(name, elsewhere)

            # Quantized tensors and their scales are wanted as stored; of GGUF files, those that a layer named.
            as_stored = config.quantization is not None and not isinstance(config.quantization, GGUFConfig)
            tensors = iterate_tensors(
                config.path,
                self.options.load_format,
                wanted,
                None if as_stored else self.dtype,
                store.stored_names.__contains__,
            )
            try:
                store.load(tensors, model.optional_weights)
            except ModelLoadError as exc:
                raise ModelLoadError(f"{config.path}: {exc}") from None
        if store.host_tensors:
            self.streamer = stream_layers(model, store)
            store.num_bytes += self.streamer.staging_bytes
            self.streamer.lock_pages()
        store.release()
        model.finish_loading()
        if self.streamer is not None:
            check_streamed(model, self.streamer)
        return model, store

    def offload_bytes(self) -> int:
        """Bytes of weights that host memory is to take from this rank's device."""
        return int(self.options.cpu_offload_gb * _GIB) if self.is_gpu else 0

    def _host_layers(self) -> HostLayers | None:
        """The decoder layers that host memory holds for ``cpu_offload_gb``, chosen by what they would take."""
        asked = self.offload_bytes()
        if not asked:
            return None
        free = self._free_host_bytes()  # every rank takes part, whatever it chooses
        measure = ParameterStore(
            torch.device("meta"), self.dtype, self.group, stage=self.stage,
            quantization=self.model_config.quantization,
        )  # fmt: skip
        model_class(self.model_config.architecture)(self.model_config, measure)
        chosen = choose_layers(measure.layer_bytes, asked)
        sizes = [measure.layer_bytes[layer] for layer in chosen]
        freed = freed_bytes(sizes)
        total = len(measure.layer_bytes)
        if freed < asked:
            logger.warning(
                "cpu_offload_gb asks for %.2f GiB, but streaming all %d layers frees %.2f GiB: two layers at a time, "
                "norms, embedding and head stay on the GPU",
                asked / _GIB, total, freed / _GIB,
            )  # fmt: skip
        if not chosen:
            return None
        check_host_memory("cpu_offload_gb", sum(sizes) / _GIB, self._ranks, free)
        logger.info(
            "cpu_offload_gb: %d of %d layers (%.2f GiB) stay in host memory and are copied to the device for every step",
            len(chosen), total, sum(sizes) / _GIB,
        )  # fmt: skip
        return HostLayers(chosen, host_memory)

    def _make_kv_caches(self, num_blocks: int, kv_heads: int, block_size: int) -> list[Tensor]:
        shape = (2, num_blocks, kv_heads, block_size, self.model_config.head_dim)
        # Not zeroed: a page is written before it is read, and untouched pages of host memory cost nothing.
        return [
            torch.empty(shape, dtype=self.cache_dtype, device=self.device) for _ in range(self.num_layers)
        ]

    def execute(self, plan: StepPlan) -> PendingResult:
        if self.runner is None:
            raise RuntimeError("the worker was not started")
        use_batch_invariance(self.options.batch_invariant)  # another engine of this process may differ
        if self.swapper is not None:
            self.swapper.apply(plan)
        return self.runner.execute(plan)

    def shutdown(self) -> None:
        if self.runner is not None:
            self.runner.close()
        if self.swapper is not None:
            self.swapper.close()
            self.swapper = None
        if self.streamer is not None:
            self.streamer.close()
        self.runner = None
