"""How much memory is truly free, and how many KV blocks fit in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kubeinfer.errors import OptionError
from kubeinfer.model_config import ModelConfig
from kubeinfer.options import EngineOptions

if TYPE_CHECKING:
    import torch

_GIB = 2**30
_HOST_SHARE = (
    0.9  # of free host memory that may be page-locked: what is locked can never be swapped or reclaimed
)
_CPU_SHARE = (
    0.5  # of free host memory: the rest is for activations, the page cache and the other processes of the pod
)


def free_host_bytes() -> int:
    """Memory this process may still take: the machine's, or its cgroup's if that is less.

    Files read a while ago (weights, often) count as free, as they do for the kubelet: the kernel drops them on demand.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, usage = _read_int(limit_file), _read_int(usage_file)
        if limit is not None and usage is not None:
            usage -= _inactive_file_bytes(str(Path(usage_file).parent))
            free = min(free, max(0, limit - usage))
    return free


def _inactive_file_bytes(cgroup: str) -> int:
    """Page cache of ``cgroup`` (a folder) that the kernel counts to it and may drop."""
    for line in (_read_text(f"{cgroup}/memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            return int(value)
    return 0


def usable_cpus() -> int:
    """Cores this process may use: its affinity, or its cgroup's quota if that is less (at least 1)."""
    import os

    count = len(os.sched_getaffinity(0))
    quota = _read_text("/sys/fs/cgroup/cpu.max")
    if quota and not quota.startswith("max"):
        limit, period = (int(part) for part in quota.split())
        count = min(count, max(1, limit // period))
    else:
        limit_v1 = _read_int("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period_v1 = _read_int("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
        if limit_v1 and period_v1 and limit_v1 > 0:
            count = min(count, max(1, limit_v1 // period_v1))
    return max(1, count)


def _read_text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _read_int(path: str) -> int | None:
    text = _read_text(path)
    try:
        return int(text) if text else None
    except ValueError:
        return None


def block_bytes(
    config: ModelConfig, block_size: int, itemsize: int, num_kv_heads: int, num_layers: int
) -> int:
    """Bytes of one block on one rank, all its layers, keys and values."""
    return 2 * num_layers * num_kv_heads * config.head_dim * block_size * itemsize


def cpu_kv_blocks(options: EngineOptions, config: ModelConfig, per_block: int, max_num_seqs: int) -> int:
    """KV blocks on the CPU, block 0 included."""
    block_size = int(options.block_size or 32)
    if options.num_gpu_blocks_override is not None:
        return options.num_gpu_blocks_override
    useful = max_num_seqs * -(-config.max_model_len // block_size) + 1
    free = free_host_bytes()
    if options.kv_cache_memory_bytes is not None:
        budget, source = options.kv_cache_memory_bytes, "--kv-cache-memory-bytes"
    elif options.cpu_kvcache_space is not None:
        budget, source = int(options.cpu_kvcache_space * _GIB), "--cpu-kvcache-space"
    else:
        ranks = options.tensor_parallel_size * options.pipeline_parallel_size
        budget, source = int(free * _CPU_SHARE) // ranks, ""
    option = source.removeprefix("--").replace("-", "_")
    if source and budget > free:
        raise OptionError(
            f"{source} asks for {budget / _GIB:.1f} GiB of KV cache, but only {free / _GIB:.1f} GiB of memory are free "
            "(cgroup limit included). Lower it, or give the pod more memory.",
            option,
        )
    blocks = min(budget // per_block, useful)
    if blocks < 2 and source:
        raise OptionError(
            f"{source} gives {budget / 2**20:.1f} MiB, but a KV cache has at least two blocks, of {per_block / 2**20:.1f} MiB "
            "each. Raise it.",
            option,
        )
    if blocks < 2:
        raise OptionError(
            f"no memory for a KV cache: {free / _GIB:.2f} GiB are free after the weights, one block takes "
            f"{per_block / 2**20:.1f} MiB. Give more memory, or choose a smaller model.",
            "cpu_kvcache_space",
        )
    return int(blocks)


def gpu_kv_blocks(
    options: EngineOptions,
    config: ModelConfig,
    per_block: int,
    peak_bytes: int,
    max_num_seqs: int,
    device: torch.device,
) -> int:
    """KV blocks on one GPU, block 0 included. ``peak_bytes``: what the largest step needs beside weights and cache."""
    import torch

    from kubeinfer.worker.mixed_graph import CHUNKS, ROWS

    if options.num_gpu_blocks_override is not None:
        return options.num_gpu_blocks_override
    free, total = torch.cuda.mem_get_info(device)
    # Graphs keep logits of the largest batch, those of the largest step with prompts, and their activations; the rest
    # covers kernels and the allocator's rounding.
    rows = 0 if options.enforce_eager else max_num_seqs + min(max_num_seqs, max(ROWS)) + CHUNKS
    graphs = rows * config.vocab_size * 2
    reserve = peak_bytes + graphs + _GIB
    if options.kv_cache_memory_bytes is not None:
        budget = options.kv_cache_memory_bytes
    else:
        budget = min(int(total * options.gpu_memory_utilization) - (total - free), free) - reserve
    if budget > free - peak_bytes:
        raise OptionError(
            f"kv_cache_memory_bytes asks for {budget / _GIB:.1f} GiB, but {max(0, free - peak_bytes) / _GIB:.1f} GiB are "
            "free beside what a step needs. Lower --kv-cache-memory-bytes.",
            "kv_cache_memory_bytes",
        )
    blocks = budget // per_block
    if blocks < 2:
        used = total - free
        raise OptionError(
            f"no GPU memory for a KV cache: of {total / _GIB:.1f} GiB, --gpu-memory-utilization "
            f"{options.gpu_memory_utilization} allows {total * options.gpu_memory_utilization / _GIB:.1f} GiB; weights and "
            f"other processes take {used / _GIB:.1f} GiB, a step {reserve / _GIB:.1f} GiB. Raise --gpu-memory-utilization, "
            "lower --max-num-batched-tokens or --max-num-seqs, or use more GPUs (--tensor-parallel-size).",
            "gpu_memory_utilization",
        )
    return int(blocks)


def check_host_memory(option: str, gib: float, ranks: int, free: int) -> None:
    """Raise :class:`OptionError` if ``ranks`` GPUs of this machine cannot have ``gib`` GiB each of ``free`` bytes."""
    if gib * _GIB * ranks <= free * _HOST_SHARE:
        return
    most = int(free * _HOST_SHARE / ranks / _GIB * 10) / 10
    raise OptionError(
        f"{option} asks for {gib:.4g} GiB of host memory for each of {ranks} GPUs, but of the {free / _GIB:.1f} GiB that "
        f"are free (cgroup limit included) at most {_HOST_SHARE:.0%} may be page-locked. Lower "
        f"--{option.replace('_', '-')} to {most:g} or less, or give the pod more memory.",
        option,
    )


def host_kv_blocks(options: EngineOptions, per_block: int, ranks: int, free: int) -> int:
    """KV blocks of host memory that one of ``ranks`` GPUs of this machine keeps (``swap_space``) of ``free`` bytes."""
    check_host_memory("swap_space", options.swap_space, ranks, free)
    budget = int(options.swap_space * _GIB)
    if budget < per_block:
        raise OptionError(
            f"swap_space {options.swap_space:g} GiB is less than one KV block ({per_block / 2**20:.1f} MiB); raise it.",
            "swap_space",
        )
    return budget // per_block
