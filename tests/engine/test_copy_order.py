"""Copies on side streams against every order that their events allow (``fixtures/simulated_streams.py``)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.simulated_streams import SimulatedTorch
from kubeinfer.engine.kv_cache import KVCacheManager
from kubeinfer.engine.messages import EngineRequest
from kubeinfer.engine.plan import StepPlan
from kubeinfer.engine.scheduler import Scheduler, SchedulerConfig
from kubeinfer.kernels.block_copy import gather_blocks_reference, page_bytes, scatter_blocks_reference
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.worker import block_swapper, host_pool, weight_streamer
from kubeinfer.worker.block_swapper import BlockSwapper
from kubeinfer.worker.weight_streamer import WeightStreamer

LAYERS, BLOCK_SIZE = 2, 4


def install(patch: pytest.MonkeyPatch, simulated: SimulatedTorch) -> None:
    def copy(into: torch.Tensor, source: torch.Tensor) -> None:
        simulated.queue(into.copy_, source)

    for module in (block_swapper, weight_streamer):
        patch.setattr(module, "torch", simulated)
        patch.setattr(module, "copy_async", copy)
    patch.setattr(
        block_swapper,
        "gather_blocks",
        lambda kv, _, *args: simulated.queue(gather_blocks_reference, kv, *args),
    )
    patch.setattr(
        block_swapper,
        "scatter_blocks",
        lambda kv, _, *args: simulated.queue(scatter_blocks_reference, kv, *args),
    )
    patch.setattr(BlockSwapper, "_to_device", lambda self, blocks: torch.tensor(blocks, dtype=torch.int32))
    patch.setattr(host_pool.HostPool, "start", lambda self: [ready.set() for ready in self._ready])


class Device:
    """Queues each plan's copies and its step, which checks at its time that every block it reads is what it must be."""

    def __init__(self, simulated: SimulatedTorch, swapper: BlockSwapper, num_blocks: int, host_blocks: int):
        self.simulated, self.swapper = simulated, swapper
        shape = (2, num_blocks, 1, BLOCK_SIZE, 1)
        self.caches = [torch.full(shape, -1, dtype=torch.int64) for _ in range(LAYERS)]
        swapper.start(self.caches, host_blocks)
        self.tables: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.reads = 0

    def execute(self, plan: StepPlan) -> list[int]:
        self.swapper.apply(plan)
        for new in plan.new_rows:
            self.tables[new.row], self.tokens[new.row] = list(new.block_ids), list(new.token_ids)
        for row, _, ids in plan.new_blocks:
            self.tables[row] += ids
        sampled = set(plan.sampled)
        writes, reads, result = [], [], []
        for i, (row, start, count) in enumerate(zip(plan.rows, plan.starts, plan.num_tokens)):
            tokens, table = self.tokens[row], list(self.tables[row])
            code, codes = 0, []
            for token in tokens[: start + count]:
                code = hash((code, token)) % 2**40  # stands for keys that depend on all tokens before
                codes.append(code)
            writes += [
                (table[p // BLOCK_SIZE], p % BLOCK_SIZE, codes[p]) for p in range(start, start + count)
            ]
            reads += [(table[p // BLOCK_SIZE], p % BLOCK_SIZE, codes[p]) for p in range(start + count)]
            if i in sampled:
                tokens.append(code % 50)
                result.append(code % 50)
        self.simulated.queue(self._step, writes, reads)
        return result

    def _step(self, writes: list[tuple[int, int, int]], reads: list[tuple[int, int, int]]) -> None:
        for layer, cache in enumerate(self.caches):
            for block, offset, code in writes:
                cache[:, block, 0, offset, 0] = torch.tensor([code + layer, -code])
            for block, offset, code in reads:
                assert cache[:, block, 0, offset, 0].tolist() == [code + layer, -code]
                self.reads += 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), host_blocks=st.sampled_from([3, 8, 40]), depth=st.sampled_from([1, 2]))
def test_blocks_are_whole_when_they_are_read(seed: int, host_blocks: int, depth: int) -> None:
    from kubeinfer.engine.plan import StepResult

    rng, simulated, num_blocks = random.Random(seed), SimulatedTorch(), 14
    with pytest.MonkeyPatch.context() as patch:
        install(patch, simulated)
        per_block = LAYERS * 2 * page_bytes([torch.empty(2, 1, 1, BLOCK_SIZE, 1, dtype=torch.int64)])
        patch.setattr(block_swapper, "_STAGING_BYTES", per_block * rng.choice((1, 2, 20)))
        patch.setattr(host_pool, "_CHUNK_BYTES", per_block * rng.choice((1, 3, 100)))
        device = Device(
            simulated, BlockSwapper(host_blocks, per_block, torch.device("cuda")), num_blocks, host_blocks
        )
        cache = KVCacheManager(
            num_blocks, BLOCK_SIZE, num_host_blocks=host_blocks, max_copies_in=rng.choice((1, 4, 99))
        )
        scheduler = Scheduler(SchedulerConfig(3, 30, (num_blocks - 1) * BLOCK_SIZE), cache)
        beginnings = [[rng.randrange(50) for _ in range(20)] for _ in range(4)]
        for i in range(16):
            prompt = [*rng.choice(beginnings)[: rng.randrange(1, 21)], rng.randrange(50)]
            params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
            scheduler.add(
                EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params, seed=0, max_tokens=3)
            )
        pending: list[list[int]] = []
        while scheduler.has_unfinished():
            plan = scheduler.schedule()
            if plan is not None:
                pending.append(device.execute(plan))
            if pending and (plan is None or len(pending) >= depth):
                scheduler.update(StepResult(pending.pop(0)))
            if rng.random() < 0.1:
                simulated.run(rng)
        simulated.run(rng)
        assert device.reads > 100


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), layers=st.integers(3, 9), steps=st.integers(1, 4))
def test_weights_are_whole_when_a_layer_reads_them(seed: int, layers: int, steps: int) -> None:
    rng, simulated = random.Random(seed), SimulatedTorch()
    tensors = [[torch.full((4, 3), i), torch.full((2, 5 + i % 2), i)] for i in range(layers)]
    seen: list[Any] = []

    def compute(views: list[torch.Tensor], i: int) -> None:
        seen.append(all(bool((view == i).all()) for view in views))

    with pytest.MonkeyPatch.context() as patch:
        install(patch, simulated)
        streamer = WeightStreamer(tensors, torch.device("cuda"))
        for _ in range(steps):
            streamer.begin()
            for i in range(layers):
                streamer.enter(i)
                # a layer is two pieces of work, either of which reads its weights
                simulated.queue(compute, streamer.views[i], i)
                simulated.queue(compute, streamer.views[i], i)
                streamer.leave(i)
        simulated.run(rng)
    assert seen == [True] * (2 * layers * steps)
