"""Defaults that depend on the device, and options that cannot work on it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from kubeinfer.errors import OptionError
from kubeinfer.options import EngineOptions, target_device, wants_batch_invariance

if TYPE_CHECKING:
    from kubeinfer.model_config import ModelConfig

logger = logging.getLogger(__name__)
_NO_EFFECT = {
    "cpu": {
        "gpu_memory_utilization": "the engine runs on the CPU; --cpu-kvcache-space sizes its KV cache",
        "swap_space": "on the CPU the KV cache is in host memory already",
        "cpu_offload_gb": "on the CPU the weights are in host memory already",
        "enforce_eager": "there are no CUDA graphs on the CPU",
        "cudagraph_capture_sizes": "there are no CUDA graphs on the CPU",
        "disable_custom_all_reduce": "the CPU has no custom all-reduce",
    },
    "cuda": {
        "cpu_kvcache_space": "the engine runs on a GPU; --gpu-memory-utilization sizes its KV cache",
    },
}


def resolve_device(options: EngineOptions) -> str:
    """cpu or cuda: what was asked for, else ``KUBEINFER_TARGET_DEVICE``, else the GPU where there is one."""
    asked = options.device if options.device != "auto" else (target_device() or "auto")
    if asked == "cpu":
        return "cpu"
    import torch

    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise OptionError("device cuda was asked for, but torch finds no GPU; use --device cpu.", "device")
    if asked not in ("auto", "cuda"):
        raise OptionError(f"KUBEINFER_TARGET_DEVICE={asked} is not a device; use cpu or cuda.", "device")
    return "cuda" if has_gpu else "cpu"


def resolve_defaults(options: EngineOptions) -> EngineOptions:
    """Options with the device and all that depends on it filled in. Raises :class:`OptionError`."""
    device = resolve_device(options)
    changes: dict[str, object] = {"device": device}
    if options.block_size is None:
        changes["block_size"] = 16 if device == "cuda" else 32
    if wants_batch_invariance():
        changes["batch_invariant"] = True
    if options.distributed_executor_backend == "ray":
        raise OptionError(
            "distributed_executor_backend ray is not supported: several GPUs of one pod need mp (the default); "
            "Kubernetes does the rest.",
            "distributed_executor_backend",
        )
    if options.runner == "pooling" or options.convert not in ("auto", "none"):
        raise OptionError("pooling models (--runner pooling, --convert) are not supported yet.", "runner")
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if options.distributed_executor_backend == "uni" and getattr(options, name) > 1:
            raise OptionError(
                f"distributed_executor_backend uni is one process, but {name} {getattr(options, name)} needs one a "
                "device; use mp.",
                "distributed_executor_backend",
            )
    for name, why in _NO_EFFECT[device].items():
        if getattr(options, name) != EngineOptions.model_fields[name].default:
            logger.warning("%s has no effect: %s", name, why)
    if device == "cuda" and options.swap_space and not options.enable_prefix_caching:
        logger.warning("swap_space has no effect: without --enable-prefix-caching no KV block is found again")
    if device == "cpu" and options.kv_cache_dtype != "auto":
        raise OptionError(
            f"kv_cache_dtype {options.kv_cache_dtype} is not supported on the CPU.", "kv_cache_dtype"
        )
    return options.model_copy(update=changes)


def check_dtype(options: EngineOptions, model_config: ModelConfig) -> ModelConfig:
    """The configuration with a number format that the device has. Raises :class:`OptionError` where it was asked for."""
    if options.device != "cuda" or model_config.dtype != "bfloat16":
        return model_config
    import torch

    major, minor = torch.cuda.get_device_capability()
    if major >= 8:
        return model_config
    name = torch.cuda.get_device_name()
    if options.dtype == "bfloat16":
        raise OptionError(
            f"bfloat16 needs a GPU of compute capability 8.0 or later, but {name} has {major}.{minor}; use --dtype half.",
            "dtype",
        )
    logger.warning("%s has no bfloat16 (compute capability %d.%d): float16 is used", name, major, minor)
    return replace(model_config, dtype="float16")


def check_batch_invariant(options: EngineOptions, model_config: ModelConfig) -> None:
    """Raises :class:`OptionError` where batch invariance was asked for and cannot be kept."""
    if not options.batch_invariant:
        return
    method = (model_config.hf_config.get("quantization_config") or {}).get("quant_method")
    method = options.quantization or method
    kept = model_config.quantization
    if kept is None and method in (None, "gguf"):
        return
    hint = "Use the model's unquantized weights, or leave batch_invariant out."
    if kept is not None and kept.name == "gguf":
        method = "gguf"
        hint = (
            "Use the model's unquantized weights, --dtype float32 (GGUF weights are then dequantized), or leave "
            "batch_invariant out."
        )
    raise OptionError(
        f"batch_invariant does not work with quantization {method}: its kernels sum in an order that depends on the "
        f"batch. {hint}",
        "batch_invariant",
    )


def check_offload(options: EngineOptions, model_config: ModelConfig) -> None:
    """Raises :class:`OptionError` where weights cannot live in host memory as they are."""
    if (
        options.cpu_offload_gb
        and model_config.quantization is not None
        and model_config.quantization.name == "gguf"
    ):
        raise OptionError(
            "cpu_offload_gb does not work with GGUF weights on a GPU: they are repacked for their kernels at load. Leave "
            "cpu_offload_gb out, use --dtype float32 (they are then dequantized), or the unquantized model.",
            "cpu_offload_gb",
        )


def step_limits(options: EngineOptions, model_config: ModelConfig, serving: bool) -> tuple[int, int]:
    """Most sequences and most tokens of one step."""
    if options.device == "cpu":
        seqs, tokens = 64, 2048
    else:
        import torch

        large = torch.cuda.get_device_properties(0).total_memory > 60 * 2**30
        seqs, tokens = (1024, 16384) if large else (256, 8192)
        if serving:
            tokens = (
                2048  # a step of so many tokens keeps running streams waiting for some 50 ms on a 7B model
            )
    seqs = options.max_num_seqs or seqs
    tokens = options.max_num_batched_tokens or max(tokens, seqs)
    if tokens < seqs:
        raise OptionError(
            f"max_num_batched_tokens {tokens} is less than max_num_seqs {seqs}: a step must have room for one token of "
            "every sequence. Raise the first or lower the second.",
            "max_num_batched_tokens",
        )
    if not options.enable_chunked_prefill and tokens < model_config.max_model_len:
        if options.max_num_batched_tokens is None:
            tokens = model_config.max_model_len
        else:
            raise OptionError(
                f"without chunked prefill a step must hold a whole prompt: max_num_batched_tokens {tokens} is less than "
                f"max_model_len {model_config.max_model_len}.",
                "max_num_batched_tokens",
            )
    return seqs, tokens
