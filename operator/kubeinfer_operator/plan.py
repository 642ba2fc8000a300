"""Does the model fit? Computed from config.json and the file list, before a pod asks for a device. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kubeinfer.models.registry import SUPPORTED_ARCHITECTURES
from kubeinfer.weights.errors import format_bytes
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.store import quantity

GIB = 1 << 30
# What the engine needs beside weights and KV cache: CUDA context, graphs and activations on a GPU; torch and its
# buffers on a CPU.
GPU_OVERHEAD = int(1.5 * GIB)
CPU_OVERHEAD = int(0.6 * GIB)
HOST_SHARE = 0.9  # of host memory that the engine page-locks at most

_BYTES = {
    "float32": 4,
    "float": 4,
    "float16": 2,
    "half": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "fp8": 1,
    "fp8_e4m3": 1,
}
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def _is_weights(path: str) -> bool:
    return path.lower().endswith(_WEIGHT_SUFFIXES)


def _is_gguf(path: str) -> bool:
    return path.lower().endswith(".gguf")


@dataclass(frozen=True, slots=True)
class Hub:
    """What a hub said of a model at one commit: sizes by path, and config.json where there is one."""

    revision: str
    sizes: Mapping[str, int]
    config: Mapping[str, Any] | None

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    @property
    def weight_bytes(self) -> int:
        return sum(size for path, size in self.sizes.items() if _is_weights(path))


@dataclass(frozen=True, slots=True)
class Plan:
    """``reason`` is that of the condition; ``line`` stands in ``status.plan``; ``message`` says what to change."""

    fits: bool
    reason: str
    line: str
    message: str


def architectures() -> tuple[str, ...]:
    """Names the runtime's registry knows; reading them loads no torch."""
    return tuple(sorted(SUPPORTED_ARCHITECTURES))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _positive(config: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def kv_bytes_per_token(config: Mapping[str, Any], kv_dtype: str, dtype: str) -> int | None:
    """Bytes of keys and values of one token over all layers; None where config.json does not say."""
    config = _text_config(config)
    layers = _positive(config, "num_hidden_layers", "n_layer", "num_layers")
    heads = _positive(config, "num_attention_heads", "n_head")
    hidden = _positive(config, "hidden_size", "n_embd")
    if layers is None or heads is None or hidden is None:
        return None
    kv_heads = _positive(config, "num_key_value_heads") or heads
    head_dim = _positive(config, "head_dim") or hidden // heads
    width = _BYTES.get(dtype if kv_dtype == "auto" else kv_dtype, 2)
    return 2 * layers * kv_heads * head_dim * width


def _gguf_bytes(config: Mapping[str, Any], stored: int, used: str, spec: InferenceModelSpec) -> int:
    """Bytes that a GGUF file of ``stored`` takes in memory: on GPUs the layers' blocks stay quantized, all else is taken apart."""
    number = stored * 8 / float(config["gguf_bits"])
    width = _BYTES.get(used, 2)
    kept, in_layers = config.get("gguf_kept_bits"), _layer_weights(config)
    quantization = getattr(spec.engine, "quantization", None) or "gguf"
    if (
        spec.resources.device != "gpu"
        or width > 2
        or quantization != "gguf"
        or kept is None
        or in_layers is None
    ):
        return int(number * width)
    in_layers = min(in_layers, int(number))
    return int(in_layers * float(kept) / 8 + (number - in_layers) * width)


def _layer_weights(config: Mapping[str, Any]) -> int | None:
    """Weights in the matrices of a model of Llama's shape without its embedding and head; None where that is not known."""
    layers, hidden = _positive(config, "num_hidden_layers"), _positive(config, "hidden_size")
    heads, inner = _positive(config, "num_attention_heads"), _positive(config, "intermediate_size")
    if layers is None or hidden is None or heads is None or inner is None:
        return None
    kv_heads = _positive(config, "num_key_value_heads") or heads
    head_dim = _positive(config, "head_dim") or hidden // heads
    return layers * hidden * (2 * (heads + kv_heads) * head_dim + 3 * inner)


def _dtypes(config: Mapping[str, Any], spec: InferenceModelSpec) -> tuple[str, str]:
    """Number formats of the checkpoint and of the engine; ``auto`` turns float32 into bfloat16."""
    stored = str(
        config.get("dtype")
        or config.get("torch_dtype")
        or _text_config(config).get("torch_dtype")
        or "bfloat16"
    )
    wanted = getattr(spec.engine, "dtype", None) or "auto"
    used = ("bfloat16" if stored == "float32" else stored) if wanted == "auto" else wanted
    return stored, used


def device_memory(spec: InferenceModelSpec, labelled: int | None) -> int | None:
    """Bytes of one GPU: as the spec says, as a MIG resource's name says, or as the nodes are labelled."""
    wanted = spec.resources
    if wanted.memory_per_device is not None:
        return int(quantity(wanted.memory_per_device))
    slice_name = wanted.resource_name.rpartition(".")[2]
    if "mig-" in wanted.resource_name and slice_name.endswith("gb") and slice_name[:-2].isdigit():
        return int(slice_name[:-2]) * GIB
    return labelled


def _tensor_parallel_size(spec: InferenceModelSpec) -> int:
    engine = spec.engine
    asked = getattr(engine, "tensor_parallel_size", None)
    if asked is None and getattr(engine, "pipeline_parallel_size", None) is None:
        return spec.resources.count
    return int(asked or 1)


def plan(spec: InferenceModelSpec, hub: Hub, *, labelled_memory: int | None = None) -> Plan:
    """Whether ``spec`` can run with what the hub has. ``labelled_memory``: bytes of the largest GPU of the nodes."""
    config = hub.config
    if config is None:
        line = (
            f"{format_bytes(hub.weight_bytes)} of weights (no config.json: the engine checks the fit itself)"
        )
        return Plan(True, "NotComputed", line, line)
    names = config.get("architectures") or []
    known = architectures()
    if names and not any(name in known for name in names):
        text = (
            f"architecture {names[0]} is not supported; supported are {', '.join(known)}. "
            "Choose a model of one of these in spec.model.uri."
        )
        return Plan(False, "UnsupportedArchitecture", str(names[0]), text)
    if getattr(spec.engine, "runner", None) == "pooling":
        return Plan(
            False,
            "UnsupportedRunner",
            str((names or ["?"])[0]),
            "engine.runner pooling is not supported yet: leave it out.",
        )
    heads = _positive(_text_config(config), "num_attention_heads", "n_head")
    ranks = _tensor_parallel_size(spec)
    if heads is not None and heads % ranks:
        fitting = ", ".join(str(n) for n in range(1, ranks) if heads % n == 0)
        text = (
            f"{heads} attention heads cannot be shared out evenly over {ranks} devices: set resources.count (or "
            f"engine.tensorParallelSize) to {fitting}, or give the rest to engine.pipelineParallelSize"
        )
        return Plan(False, "UnevenHeads", str((names or ["?"])[0]), text)
    stored, used = _dtypes(config, spec)
    weights = hub.weight_bytes
    if "gguf_bits" in config:
        weights = _gguf_bytes(config, weights, used, spec)
    elif not config.get("quantization_config") and not all(
        _is_gguf(path) for path in hub.sizes if _is_weights(path)
    ):
        weights = weights * _BYTES.get(used, 2) // _BYTES.get(stored, 2)
    kv = kv_bytes_per_token(config, getattr(spec.engine, "kv_cache_dtype", None) or "auto", used)
    name = str((names or ["unknown architecture"])[0])
    if kv is None:
        line = f"{name}, {used}, {format_bytes(weights)} of weights"
        return Plan(True, "NotComputed", line, line + " (config.json does not say how large the KV cache is)")
    own_limit = _positive(_text_config(config), "max_position_embeddings", "n_positions")
    length = getattr(spec.engine, "max_model_len", None) or own_limit or 2048
    line = f"{name}, {used}, {format_bytes(weights)} of weights, {format_bytes(kv)} of KV cache a token"
    if spec.resources.device == "gpu":
        return _plan_gpu(spec, line, weights, kv, length, device_memory(spec, labelled_memory), heads or 1)
    return _plan_cpu(spec, line, weights, kv, length)


def _plan_gpu(
    spec: InferenceModelSpec, line: str, weights: int, kv: int, length: int, memory: int | None, heads: int
) -> Plan:
    count = spec.resources.count
    refused = _host_memory(spec, line)
    if refused is not None:
        return refused
    if memory is None:
        text = (
            f"{line}; the memory of {spec.resources.resource_name} is not known: set resources.memoryPerDevice to have "
            "the fit checked"
        )
        return Plan(True, "DeviceMemoryUnknown", line, text)
    share = float(getattr(spec.engine, "gpu_memory_utilization", None) or 0.9)
    offload = int(float(getattr(spec.engine, "cpu_offload_gb", None) or 0) * GIB)

    def room(devices: int) -> int:
        """Bytes a device has left for KV cache."""
        return int(memory * share) - max(weights // devices - offload, 0) - GPU_OVERHEAD

    left = room(count)
    need = kv * length // count
    if left >= need:
        tokens = left * count // kv
        line += f"; {count} x {format_bytes(memory)}: {tokens:,} tokens of KV cache"
        return Plan(True, "Fits", line, line)
    parts = [
        f"{line}: {format_bytes(weights / count)} of weights and {format_bytes(need)} of KV cache for one request of "
        f"{length:,} tokens do not fit on {count} x {format_bytes(memory)} with gpuMemoryUtilization {share:g}"
    ]
    changes = []
    if left > 0 and left * count // kv >= 256:
        changes.append(f"engine.maxModelLen to {left * count // kv // 16 * 16} or less")
    for more in (2, 4, 8, 16):
        if more > count and heads % more == 0 and room(more) >= kv * length // more:
            changes.append(f"resources.count to {more}")
            break
    changes.append(
        "resources to larger GPUs"
        if changes
        else "resources to larger or more GPUs, or take a quantized model"
    )
    parts.append("Set " + ", or ".join(changes) + ".")
    return Plan(False, "InsufficientMemory", line, " ".join(parts))


def _host_memory(spec: InferenceModelSpec, line: str) -> Plan | None:
    """The refusal where ``limits.memory`` has no room for what the engine's options keep in host memory."""
    limit = spec.resources.limits.get("memory")
    options = {"swapSpace": "swap_space", "cpuOffloadGb": "cpu_offload_gb"}
    asked = {name: float(getattr(spec.engine, option, None) or 0) for name, option in options.items()}
    host = int(sum(asked.values()) * spec.resources.count * GIB)
    if limit is None or not host:
        return None
    need = int(host / HOST_SHARE) + CPU_OVERHEAD * spec.resources.count
    if need <= int(quantity(limit)):
        return None
    names = " and ".join(f"engine.{name}" for name, gib in asked.items() if gib)
    text = (
        f"{line}: {names} ask for {format_bytes(host)} of host memory, which does not fit into limits.memory {limit} "
        f"beside the engine itself. Set resources.limits.memory to {-(-need // (1 << 20))}Mi or more, or lower {names}."
    )
    return Plan(False, "InsufficientMemory", line, text)


def _plan_cpu(spec: InferenceModelSpec, line: str, weights: int, kv: int, length: int) -> Plan:
    limit = spec.resources.limits.get("memory")
    space = getattr(spec.engine, "cpu_kvcache_space", None)
    cache = int(float(space) * GIB) if space else kv * length
    if space and cache < kv * length:
        tokens = cache // kv
        return Plan(
            False,
            "InsufficientMemory",
            line,
            f"{line}: engine.cpuKvcacheSpace of {space:g} GiB holds {tokens:,} tokens, less than one request of {length:,}. "
            f"Set it to {kv * length / GIB:.2f} or more, or engine.maxModelLen to {tokens // 16 * 16} or less.",
        )
    if limit is None:
        return Plan(True, "Fits", line, line)
    memory = int(quantity(limit))
    need = weights + cache + CPU_OVERHEAD
    if need <= memory:
        line += (
            f"; limit {format_bytes(memory)}: {(memory - weights - CPU_OVERHEAD) // kv:,} tokens of KV cache"
        )
        return Plan(True, "Fits", line, line)
    left = memory - weights - CPU_OVERHEAD
    changes = [f"resources.limits.memory to {-(-need // (1 << 20))}Mi or more"]
    if left > 0 and left // kv >= 256:
        option = "engine.maxModelLen" if not space else "engine.cpuKvcacheSpace"
        value = f"{left // kv // 16 * 16}" if not space else f"{left / GIB:.2f}"
        changes.append(f"{option} to {value} or less")
    text = (
        f"{line}: with {format_bytes(cache)} of KV cache and {format_bytes(CPU_OVERHEAD)} for the process, "
        f"{format_bytes(need)} in all, it does not fit into limits.memory {limit}. Set {', or '.join(changes)}."
    )
    return Plan(False, "InsufficientMemory", line, text)
