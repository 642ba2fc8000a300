"""KV blocks kept in host memory: the real engine with a second tier gives the outputs it gives without one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fixtures.host_tier_worker import HOST_BLOCKS, HostTierWorker
from fixtures.tiny_models import tiny_model
from kubeinfer.engine.client import EngineClient, make_client
from kubeinfer.engine.messages import EngineRequest
from kubeinfer.engine.plan import StepPlan
from kubeinfer.errors import OptionError
from kubeinfer.kernels.block_copy import page_bytes
from kubeinfer.options import EngineOptions
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.worker import memory
from kubeinfer.worker.block_swapper import BlockSwapper
from kubeinfer.worker.host_pool import HostPool

pytestmark = pytest.mark.usefixtures("forked_ranks")

COUNT = 10


def prompts(seed: int = 3) -> list[list[int]]:
    """Eight beginnings of 60 tokens, each met several times: more than the device holds, less than the host."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(5, 500) for _ in range(60)] for _ in range(6)]
    return [
        beginnings[i % 6] + [rng.randrange(5, 500) for _ in range(rng.randrange(1, 20))] for i in range(30)
    ]


def generate(client: EngineClient, some: list[list[int]], at_once: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
    found: dict[str, list[int]] = {str(i): [] for i in range(len(some))}
    waiting = [
        EngineRequest(request_id=str(i), prompt_token_ids=p, params=params, seed=0, max_tokens=COUNT)
        for i, p in enumerate(some)
    ]
    for first in range(0, len(waiting), at_once):
        client.add_requests(waiting[first : first + at_once])
        while client.has_unfinished_requests():
            for output in client.step().outputs:
                found[output.request_id] += output.new_token_ids
        client.check_integrity()
    return [found[str(i)] for i in range(len(some))]


def make(name: str, **options: Any) -> Any:
    options = {"block_size": 8, "num_gpu_blocks_override": 30, "max_model_len": 128, **options}
    return make_client(EngineOptions(model=str(tiny_model(name)), device="cpu", dtype="float32", **options))


@pytest.fixture
def host_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubeinfer.worker.worker.Worker", HostTierWorker)


_expected: dict[str, list[list[int]]] = {}


def expected(name: str) -> list[list[int]]:
    if name not in _expected:
        client = make(name, num_gpu_blocks_override=2000, enable_prefix_caching=False)
        _expected[name] = generate(client, prompts(), 30)
        client.shutdown()
    return _expected[name]


@pytest.mark.parametrize("at_once", [1, 7, 30])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_outputs_are_the_same(host_tier: None, name: str, overlap: bool, at_once: int) -> None:
    wanted = expected(name)
    client = make(name, async_scheduling=overlap, max_num_seqs=16, max_num_batched_tokens=48)
    assert generate(client, prompts(), at_once) == wanted
    stats = client.core.scheduler.stats()
    assert stats.prefix_cache_host_hits > 300
    assert stats.blocks_copied_out > HOST_BLOCKS  # some were given up again
    assert stats.host_cache_usage == 1.0
    if at_once == 30:
        assert stats.num_preemptions > 0
    client.reset_prefix_cache()
    assert generate(client, prompts(), at_once) == wanted
    assert client.core.scheduler.stats().prefix_cache_host_hits > stats.prefix_cache_host_hits
    client.shutdown()


def test_every_rank_copies_its_shard(host_tier: None) -> None:
    wanted = expected("llama")
    client = make("llama", tensor_parallel_size=2)
    assert generate(client, prompts(), 7) == wanted
    stats = client.core.scheduler.stats()
    assert stats.prefix_cache_host_hits > 300
    assert client.core.scheduler.kv_cache._host.num_blocks == HOST_BLOCKS, "the smallest of all ranks"
    client.shutdown()


def test_small_staging_memory_takes_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks in a plan than staging memory holds, and host blocks over several chunks."""
    monkeypatch.setattr("kubeinfer.worker.host_pool._CHUNK_BYTES", 5000)
    caches = [torch.randn(2, 40, 2, 8, 4) for _ in range(3)]
    per_block = 3 * 2 * page_bytes(caches)
    monkeypatch.setattr("kubeinfer.worker.block_swapper._STAGING_BYTES", 4 * per_block)
    swapper = BlockSwapper(25, per_block, torch.device("cpu"))
    swapper.start(caches, 25)
    before = [c.clone() for c in caches]
    rng = random.Random(1)
    device, host = rng.sample(range(1, 40), 22), rng.sample(range(25), 22)
    plan = StepPlan(1, [], [], [], 0, [], [], [], [], [], list(zip(device, host)), [])
    swapper.apply(plan)
    for cache in caches:
        cache.normal_()
    targets = rng.sample(range(1, 40), 22)
    swapper.apply(StepPlan(2, [], [], [], 0, [], [], [], [], [], [], list(zip(host, targets))))
    for cache, old in zip(caches, before):
        assert torch.equal(cache[:, targets], old[:, device])
    swapper.close()


def test_runs_are_slices_of_one_chunk() -> None:
    pool = HostPool(10, 2**27, torch.device("cpu"))  # two blocks a chunk
    pool.start()
    assert [(first, len(rows)) for first, rows in pool.runs([0, 1, 2, 5, 7, 8, 9])] == [
        (0, 2), (2, 1), (3, 1), (4, 1), (5, 2),
    ]  # fmt: skip
    pool.close()


def options(gib: float) -> EngineOptions:
    return EngineOptions(model="m", device="cuda", swap_space=gib)


def test_the_host_pool_is_as_large_as_asked() -> None:
    free = 100 * 2**30
    assert memory.host_kv_blocks(options(4), 2**20, 1, free) == 4096
    assert memory.host_kv_blocks(options(45), 2**20, 2, free) == 45 * 1024
    with pytest.raises(OptionError, match=r"Lower --swap-space to 45 or less") as refused:
        memory.host_kv_blocks(options(46), 2**20, 2, free)
    assert refused.value.option == "swap_space"
    with pytest.raises(OptionError, match="less than one KV block"):
        memory.host_kv_blocks(options(0.0001), 2**20, 1, free)


def test_page_cache_that_may_be_dropped_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "/sys/fs/cgroup/memory.max": "10000", "/sys/fs/cgroup/memory.current": "7000",
        "/sys/fs/cgroup/memory.stat": "anon 4000\nfile 2500\ninactive_file 2000\n",
    }  # fmt: skip
    monkeypatch.setattr(memory, "_read_text", texts.get)
    assert memory.free_host_bytes() == 5000
