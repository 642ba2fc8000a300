"""Host memory beside a GPU: evicted KV blocks (``swap_space``) and weights (``cpu_offload_gb``)."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from fixtures.tiny_models import tiny_model
from kubeinfer.engine.client import EngineClient, make_client
from kubeinfer.engine.messages import EngineRequest
from kubeinfer.errors import OptionError
from kubeinfer.options import EngineOptions
from kubeinfer.sampling_params import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")


def generate(client: EngineClient, prompts: list[list[int]], count: int, at_once: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    found: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for first in range(0, len(prompts), at_once):
        client.add_requests(
            [
                EngineRequest(
                    request_id=str(i), prompt_token_ids=prompts[i], params=params, seed=0, max_tokens=count
                )
                for i in range(first, min(first + at_once, len(prompts)))
            ]
        )
        while client.has_unfinished_requests():
            for output in client.step().outputs:
                found[output.request_id] += output.new_token_ids
    client.core.check_integrity()  # type: ignore[attr-defined]
    return [found[str(i)] for i in range(len(prompts))]


def make(name: str, **options: Any) -> Any:
    options = {"dtype": "float32", "kv_cache_memory_bytes": 2**26, "max_num_seqs": 16, **options}
    return make_client(EngineOptions(model=str(tiny_model(name)), device="cuda", **options))


def shared_beginnings(seed: int, kinds: int = 8, count: int = 48) -> list[list[int]]:
    rng = random.Random(seed)
    beginnings = [[rng.randrange(5, 500) for _ in range(150)] for _ in range(kinds)]
    return [
        beginnings[rng.randrange(kinds)] + [rng.randrange(5, 500) for _ in range(rng.randrange(1, 40))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("at_once", [1, 16, 48])
@pytest.mark.parametrize("extra", [{}, {"enforce_eager": True}, {"async_scheduling": False}])
def test_blocks_that_come_back_change_no_output(extra: dict[str, Any], at_once: int, gpus: int) -> None:
    import torch

    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    prompts = shared_beginnings(1)
    plain = make("llama", enable_prefix_caching=False)
    expected = generate(plain, prompts, 16, 48)
    plain.shutdown()
    client = make(
        "llama",
        num_gpu_blocks_override=60,
        max_model_len=256,
        swap_space=0.05,
        tensor_parallel_size=gpus,
        **extra,
    )
    for _ in range(2):
        assert generate(client, prompts, 16, at_once) == expected
    stats = client.core.scheduler.stats()
    assert stats.prefix_cache_host_hits > 1000
    assert stats.blocks_copied_out > 60
    client.shutdown()


@pytest.mark.parametrize("fp8", [False, True])
def test_a_small_host_pool_under_pressure(fp8: bool) -> None:
    """Host blocks are given up and overwritten all the time; every prompt again, in another order, answers the same."""
    prompts = shared_beginnings(2, kinds=24, count=120)
    number = {"dtype": "bfloat16", "kv_cache_dtype": "fp8"} if fp8 else {}
    plain = make("qwen2", enable_prefix_caching=False, max_num_batched_tokens=2048, **number)
    expected = generate(plain, prompts, 12, 120)
    plain.shutdown()
    client = make(
        "qwen2", num_gpu_blocks_override=80, max_model_len=256, swap_space=0.001 if fp8 else 0.004,
        max_num_batched_tokens=256, **number,
    )  # fmt: skip
    order = list(range(len(prompts)))
    for seed in range(4):
        random.Random(seed).shuffle(order)
        again = generate(client, [prompts[i] for i in order], 12, 40)
        same = sum(again[at] == expected[i] for at, i in enumerate(order))
        # In 16 bits the company of a prompt may tip a tie; a wrong block would change nearly every answer.
        assert same >= (0.75 if fp8 else 1.0) * len(prompts)
    stats = client.core.scheduler.stats()
    assert stats.prefix_cache_host_hits > 0
    assert stats.host_cache_usage > 0.9
    client.reset_prefix_cache()
    assert client.core.scheduler.kv_cache.host_usage == 0
    client.shutdown()


def test_more_host_memory_than_there_is_is_refused() -> None:
    with pytest.raises(OptionError, match="swap_space asks for"):
        make("llama", swap_space=10**6)


def test_copies_reach_the_bus_speed_and_return_every_byte() -> None:
    """The swapper alone, on caches of a 7B's shape: what went out comes back, at a rate that only locked memory has."""
    import torch

    from kubeinfer.engine.plan import StepPlan
    from kubeinfer.worker.block_swapper import BlockSwapper

    device = torch.device("cuda", 0)
    caches = [torch.randn(2, 600, 4, 16, 128, device=device).bfloat16() for _ in range(28)]
    per_block = 28 * 2 * 4 * 16 * 128 * 2
    swapper = BlockSwapper(1000, per_block, device)
    swapper.start(caches, 1000)
    swapper._pool._thread.join()  # type: ignore[union-attr]
    before = [c.clone() for c in caches]
    blocks = random.Random(1).sample(range(1, 600), 512)
    out, back = list(zip(blocks, range(100, 612))), list(zip(range(100, 612), blocks))

    def plan(out: list[tuple[int, int]], back: list[tuple[int, int]]) -> StepPlan:
        return StepPlan(1, [], [], [], 0, [], [], [], [], [], out, back)

    for turn in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        swapper.apply(plan(out, []))
        torch.cuda.synchronize()
        middle = time.perf_counter()
        for cache in caches:
            cache[:, blocks] = 0
        torch.cuda.synchronize()
        erased = time.perf_counter()
        swapper.apply(plan([], back))
        torch.cuda.synchronize()
        end = time.perf_counter()
        gib = len(blocks) * per_block / 2**30
        print(f"turn {turn}: out {gib / (middle - began):.1f} GiB/s, in {gib / (end - erased):.1f} GiB/s")
        assert all(torch.equal(cache, old) for cache, old in zip(caches, before))
    assert gib / (middle - began) > 8
    assert gib / (end - erased) > 8
    swapper.close()


# ---- weights ----


def dummy(tmp_path: Path, layers: int, **options: Any) -> Any:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 8000,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 1e4, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"kv_cache_memory_bytes": 2**28, "max_num_seqs": 16, "max_num_batched_tokens": 512, **options}
    return make_client(EngineOptions(model=str(tmp_path), device="cuda", load_format="dummy", **options))


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "opt"])
@pytest.mark.parametrize("extra", [{}, {"enforce_eager": True}])
def test_streamed_weights_change_no_output(extra: dict[str, Any], name: str, gpus: int) -> None:
    import torch

    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    prompts = shared_beginnings(3, count=24)
    plain = make(name)
    expected = generate(plain, prompts, 24, 24)
    plain.shutdown()
    # A host pool beside it: both stream over the same bus.
    client = make(
        name, cpu_offload_gb=1e-5, swap_space=0.05, num_gpu_blocks_override=60, max_model_len=256,
        tensor_parallel_size=gpus, **extra,
    )  # fmt: skip
    for at_once in (24, 1, 16):
        assert generate(client, prompts, 24, at_once) == expected
    client.shutdown()


@pytest.mark.parametrize("extra", [{}, {"enforce_eager": True}])
def test_fused_kernels_read_streamed_weights_whole(tmp_path: Path, extra: dict[str, Any]) -> None:
    """bfloat16, where kernels of few tokens begin to read weights early: bit-equal to the model without streaming."""
    prompts = [p[:100] for p in shared_beginnings(4, count=20)]
    plain = dummy(tmp_path, 12, enable_prefix_caching=False, **extra)
    expected = [generate(plain, prompts, 40, at_once) for at_once in (1, 3, 16)]
    plain.shutdown()
    client = dummy(tmp_path, 12, enable_prefix_caching=False, cpu_offload_gb=0.1, **extra)
    assert 0 < len(client.core.executor.worker.streamer.views) < 12
    assert [generate(client, prompts, 40, at_once) for at_once in (1, 3, 16)] == expected
    client.shutdown()


def test_the_weights_are_never_all_on_the_device(tmp_path: Path) -> None:
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    plain = dummy(tmp_path, 40, enforce_eager=True)
    whole, peak = plain.info.weight_bytes, torch.cuda.max_memory_allocated() - before
    assert peak > whole
    plain.shutdown()
    del plain
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    client = dummy(tmp_path, 40, enforce_eager=True, cpu_offload_gb=0.5)
    assert client.info.weight_bytes <= whole - 2**29
    assert torch.cuda.max_memory_allocated() - before <= peak - 0.9 * 2**29
    client.shutdown()


@pytest.mark.parametrize("extra", [{}, {"enforce_eager": True}])
def test_a_step_takes_no_longer_than_its_copies(tmp_path: Path, extra: dict[str, Any]) -> None:
    """All layers streamed: one sequence decodes at the speed of the bus, computing beside it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("measures time: not beside other tests")
    client = dummy(tmp_path, 40, cpu_offload_gb=100.0, **extra)
    worker = client.core.executor.worker
    gib = sum(t.numel() * t.element_size() for t in worker.streamer.host_tensors) / 2**30
    generate(client, [[5, 6, 7]], 20, 1)
    began = time.perf_counter()
    generate(client, [[5, 6, 7]], 100, 1)
    rate = gib * 100 / (time.perf_counter() - began)
    print(f"{gib:.2f} GiB a step at {rate:.1f} GiB/s")
    assert rate > 8
    client.shutdown()
