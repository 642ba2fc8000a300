"""The scheduler and KV cache against a simulated device that remembers which token each cache slot holds."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeinfer.engine.free_list import FreeList
from kubeinfer.engine.host_tier import HostTier
from kubeinfer.engine.kv_cache import DUMMY_BLOCK, KVCacheManager
from kubeinfer.engine.messages import EngineOutput, EngineRequest
from kubeinfer.engine.plan import StepPlan, StepResult
from kubeinfer.engine.request import Request
from kubeinfer.engine.scheduler import Scheduler, SchedulerConfig
from kubeinfer.sampling_params import SamplingParams

VOCAB = 50


def next_token(tokens: list[int]) -> int:
    """The simulated model: depends on every token before, so a wrong cache slot shows in the output."""
    return hash(tuple(tokens)) % VOCAB


class SimulatedDevice:
    """Executes plans: writes tokens to cache slots, and samples from what it reads back out of them."""

    def __init__(self, block_size: int, max_rows: int):
        self.block_size = block_size
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}  # (block, offset) -> (position, token)
        self.tables: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.last: dict[int, int] = {}
        self.host: dict[tuple[int, int], tuple[int, int]] = {}  # likewise, of host blocks
        self.max_rows = max_rows

    def _copy(self, pairs: list[tuple[int, int]], source: dict, target: dict) -> None:
        """All pairs at once, as a device may do it: no block is written twice."""
        assert len({to for _, to in pairs}) == len(pairs)
        read = {(to, i): source.get((block, i)) for block, to in pairs for i in range(self.block_size)}
        for at, value in read.items():
            assert value is not None, "a full block was copied that was never written"
            target[at] = value

    def execute(self, plan: StepPlan) -> StepResult:
        self._copy(plan.copies_out, self.slots, self.host)
        self._copy(plan.copies_in, self.host, self.slots)
        assert len(set(plan.rows)) == len(plan.rows) <= self.max_rows
        for row in plan.released_rows:
            self.tables.pop(row, None)
        for new in plan.new_rows:
            self.tables[new.row] = list(new.block_ids)
            self.tokens[new.row] = list(new.token_ids)
            self.last[new.row] = new.token_ids[-1]
        for row, start, ids in plan.new_blocks:
            assert len(self.tables[row]) == start, "block tables are append-only"
            self.tables[row] += ids
        # every row's keys are written before any row attends, as each layer does
        for i, (row, start, count) in enumerate(zip(plan.rows, plan.starts, plan.num_tokens)):
            known = [self.last[row]] if i < plan.num_decodes else self.tokens[row][start : start + count]
            assert len(known) == count
            for position, token in enumerate(known, start):
                block = self.tables[row][position // self.block_size]
                assert block != DUMMY_BLOCK
                self.slots[block, position % self.block_size] = (position, token)
        sampled = []
        for i in plan.sampled:
            row, end = plan.rows[i], plan.starts[i] + plan.num_tokens[i]
            read = []
            for position in range(end):
                at = self.slots[self.tables[row][position // self.block_size], position % self.block_size]
                assert at[0] == position
                read.append(at[1])
            self.last[row] = next_token(read)
            sampled.append(self.last[row])
        return StepResult(sampled)


def request(name: str, prompt: list[int], max_tokens: int, **extra: object) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return EngineRequest(
        request_id=name, prompt_token_ids=prompt, params=params, seed=0, max_tokens=max_tokens, **extra
    )


def make(
    blocks: int,
    block_size: int,
    seqs: int,
    tokens: int,
    host_blocks: int = 0,
    max_copies_in: int = 1000,
    **extra: object,
) -> tuple[Scheduler, SimulatedDevice]:
    config = SchedulerConfig(
        max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=(blocks - 1) * block_size, **extra
    )
    kv_cache = KVCacheManager(blocks, block_size, num_host_blocks=host_blocks, max_copies_in=max_copies_in)
    return Scheduler(config, kv_cache), SimulatedDevice(block_size, seqs)


class Engine:
    """A core loop over the simulated device, with one or two steps in flight."""

    def __init__(self, scheduler: Scheduler, device: SimulatedDevice, depth: int):
        self.scheduler, self.device, self.depth = scheduler, device, depth
        self.pending: deque[StepResult] = deque()
        self.plans: list[StepPlan] = []

    def step(self) -> list[EngineOutput]:
        plan = self.scheduler.schedule()
        if plan is not None:
            assert plan.total_tokens <= self.scheduler.config.max_num_batched_tokens
            self.plans.append(plan)
            self.pending.append(self.device.execute(plan))
        outputs = []
        if self.pending and (plan is None or len(self.pending) >= self.depth):
            outputs = self.scheduler.update(self.pending.popleft())
        self.scheduler.check_integrity()
        return outputs

    def run(self, limit: int = 3000) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for _ in range(limit):
            if not self.scheduler.has_unfinished():
                return found
            for output in self.step():
                found.setdefault(output.request_id, []).extend(output.new_token_ids)
        raise AssertionError(f"not done after {limit} steps")


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    depth=st.sampled_from([1, 2]),
    stages=st.sampled_from([1, 1, 2, 3, 4]),
    block_size=st.sampled_from([2, 4, 8]),
    tight=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
    threshold=st.sampled_from([0, 3]),
    host_blocks=st.sampled_from([0, 1, 3, 20, 500]),
    max_copies_in=st.sampled_from([1, 3, 1000]),
)
def test_every_request_gets_its_own_tokens_whatever_runs_beside_it(
    seed: int,
    depth: int,
    stages: int,
    block_size: int,
    tight: bool,
    policy: str,
    threshold: int,
    host_blocks: int,
    max_copies_in: int,
) -> None:
    rng = random.Random(seed)
    longest = 40
    blocks = -(-longest // block_size) + 2 if tight else 200
    scheduler, device = make(
        blocks,
        block_size,
        rng.randint(1, 6),
        rng.randint(6, 30),
        host_blocks,
        max_copies_in=max_copies_in,
        policy=policy,
        long_prefill_token_threshold=threshold,
        num_stages=stages,
        wait_for_tokens=depth == 1,
    )
    engine = Engine(scheduler, device, stages - 1 + depth)
    shared = [rng.randrange(VOCAB) for _ in range(16)]
    wanted: dict[str, list[int]] = {}
    got: dict[str, list[int]] = {}
    aborted: set[str] = set()
    earlier: list[list[int]] = []
    for i in range(rng.randint(1, 12)):
        prompt = shared[: rng.randint(0, 16)] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 10))]
        if earlier and rng.random() < 0.4:  # an earlier prompt again, whose blocks may be in the host by now
            prompt = rng.choice(earlier)
        earlier.append(prompt)
        count = rng.randint(1, longest - len(prompt) - 1)
        name = f"r{i}"
        wanted[name] = expected(prompt, count)
        scheduler.add(request(name, prompt, count, priority=rng.randint(0, 2), arrival_time=float(i)))
        if rng.random() < 0.05:
            scheduler.kv_cache.reset_prefix_cache()
        for _ in range(rng.randint(0, 5)):
            for output in engine.step():
                got.setdefault(output.request_id, []).extend(output.new_token_ids)
        if rng.random() < 0.15 and scheduler.requests:
            victim = rng.choice(sorted(scheduler.requests))
            aborted.add(victim)
            assert [o.finish_reason for o in scheduler.abort([victim])] == ["abort"]
            scheduler.check_integrity()
    for name, tokens in engine.run().items():
        got.setdefault(name, []).extend(tokens)
    for name, tokens in wanted.items():
        if name in aborted:
            assert got.get(name, []) == tokens[: len(got.get(name, []))]
        else:
            assert got[name] == tokens
    assert scheduler.kv_cache.num_free == scheduler.kv_cache.num_usable
    scheduler.check_integrity()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_each_stage_of_a_pipeline_has_an_equal_share_of_the_decodes(stages: int, overlap: bool) -> None:
    scheduler, device = make(1000, 4, 64, 512, num_stages=stages, wait_for_tokens=not overlap)
    engine = Engine(scheduler, device, stages + overlap)
    for i in range(26):
        scheduler.add(request(f"r{i}", [i, 1, 2], 100))
    for _ in range(60):
        engine.step()
    share = -(-26 // stages)
    for first in range(30, 50):
        together = [set(plan.rows) for plan in engine.plans[first : first + stages]]
        assert sum(map(len, together)) == len(set.union(*together)) == 26  # every request once, none twice
        assert all(0 < len(rows) <= share for rows in together)
    engine.run()


def test_a_pipeline_with_fewer_requests_than_stages_still_plans_ahead() -> None:
    scheduler, device = make(100, 4, 8, 64, num_stages=4)
    engine = Engine(scheduler, device, 5)
    scheduler.add(request("a", [1, 2, 3], 20))
    assert engine.step() == engine.step() == engine.step() == []
    assert len(engine.pending) == 3
    assert engine.run()["a"] == expected([1, 2, 3], 20)


def test_prefix_hits_are_used_and_counted() -> None:
    scheduler, device = make(100, 4, 8, 1000)
    engine = Engine(scheduler, device, 1)
    prompt = list(range(40))
    scheduler.add(request("a", prompt, 4))
    engine.run()
    scheduler.add(request("b", [*prompt[:32], 7, 8], 4))
    assert engine.run()["b"] == expected([*prompt[:32], 7, 8], 4)
    assert scheduler.kv_cache.prefix_hits == 32
    assert engine.plans[-4].starts[0] >= 32


def test_a_whole_prompt_in_the_cache_still_computes_one_token() -> None:
    scheduler, device = make(100, 4, 8, 1000)
    engine = Engine(scheduler, device, 1)
    prompt = list(range(16))
    for name in ("a", "b"):
        scheduler.add(request(name, prompt, 3))
        assert engine.run()[name] == expected(prompt, 3)
    assert scheduler.kv_cache.prefix_hits == 12


def test_salted_prompts_share_nothing() -> None:
    scheduler, device = make(100, 4, 8, 1000)
    engine = Engine(scheduler, device, 1)
    for name, salt in (("a", "x"), ("b", "y")):
        scheduler.add(request(name, list(range(16)), 2, cache_salt=salt))
        engine.run()
    assert scheduler.kv_cache.prefix_hits == 0
    scheduler.add(request("c", list(range(16)), 2, cache_salt="x"))
    engine.run()
    assert scheduler.kv_cache.prefix_hits == 12


def test_running_streams_get_a_token_in_every_step_while_long_prompts_arrive() -> None:
    scheduler, device = make(4000, 4, 80, 64)
    engine = Engine(scheduler, device, 1)
    for i in range(20):
        scheduler.add(request(f"stream{i}", [i, 1, 2], 200))
    while len(scheduler.running) < 20 or any(r.num_output == 0 for r in scheduler.running):
        engine.step()
    for i in range(10):
        scheduler.add(request(f"long{i}", [i] * 500, 1))
    for _ in range(60):
        names = {o.request_id for o in engine.step()}
        assert {f"stream{i}" for i in range(20)} <= names


def test_priority_runs_the_lower_value_first() -> None:
    scheduler, device = make(100, 4, 1, 100, policy="priority")
    engine = Engine(scheduler, device, 1)
    for name, priority in (("late", 5), ("soon", 1), ("middle", 3)):
        scheduler.add(request(name, [1, 2, 3], 2, priority=priority))
    finished = []
    while scheduler.has_unfinished():
        finished += [o.request_id for o in engine.step() if o.finish_reason]
    assert finished == ["soon", "middle", "late"]


def test_without_chunked_prefill_a_prompt_runs_in_one_step() -> None:
    scheduler, device = make(100, 4, 4, 60, enable_chunked_prefill=False)
    engine = Engine(scheduler, device, 1)
    for i in range(3):
        scheduler.add(request(f"r{i}", list(range(i, i + 45)), 2))
    engine.run()
    prefills = [n for plan in engine.plans for n in plan.num_tokens if n > 1]
    assert prefills == [45, 45, 45] or sum(prefills) < 135  # prefix hits may shorten the later ones
    assert all(len([n for n in plan.num_tokens if n > 1]) <= 1 for plan in engine.plans)


def test_unknown_aborts_are_ignored_and_a_waiting_request_can_be_aborted() -> None:
    scheduler, device = make(100, 4, 1, 100)
    engine = Engine(scheduler, device, 2)
    scheduler.add(request("a", [1, 2], 8))
    scheduler.add(request("b", [3, 4], 8))
    engine.step()
    assert scheduler.abort(["nobody"]) == []
    assert scheduler.abort(["b"])[0].finish_reason == "abort"
    assert engine.run()["a"][-1] == expected([1, 2], 8)[-1]


@pytest.mark.parametrize("stop", [True, False])
def test_stop_ids_end_a_request_only_after_min_tokens(stop: bool) -> None:
    scheduler, device = make(100, 4, 1, 100)
    tokens = expected([5, 6, 7], 12)
    at = 3
    params = SamplingParams(
        max_tokens=12, stop_token_ids=[tokens[at]], min_tokens=0 if stop else 12, temperature=0
    )
    scheduler.add(
        EngineRequest(request_id="a", prompt_token_ids=[5, 6, 7], params=params, seed=0, max_tokens=12)
    )
    engine = Engine(scheduler, device, 2)
    first = tokens.index(tokens[at])
    assert engine.run()["a"] == (tokens[: first + 1] if stop else tokens)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 19)), max_size=200))
def test_the_free_list_keeps_the_order_of_freeing(operations: list[tuple[bool, int]]) -> None:
    free, model = FreeList(20), list(range(20))
    for take, block in operations:
        if take and model:
            assert free.pop_left() == model.pop(0)
        elif block in model:
            free.remove(block)
            model.remove(block)
        else:
            free.append(block)
            model.append(block)
        assert list(free) == model
        assert len(free) == len(model)
        assert (block in free) == (block in model)


def test_integrity_finds_damage() -> None:
    scheduler, device = make(20, 4, 2, 50)
    engine = Engine(scheduler, device, 1)
    scheduler.add(request("a", list(range(10)), 5))
    engine.step()
    scheduler.running[0].block_ids.append(scheduler.running[0].block_ids[0])
    with pytest.raises(AssertionError, match="twice"):
        scheduler.check_integrity()


# ---- the host tier ----


def serve(engine: Engine, name: str, prompt: list[int], count: int = 2) -> None:
    engine.scheduler.add(request(name, prompt, count))
    assert engine.run()[name] == expected(prompt, count)


def test_evicted_blocks_come_back_from_the_host() -> None:
    scheduler, device = make(12, 4, 4, 1000, host_blocks=100)
    engine, cache = Engine(scheduler, device, 2), scheduler.kv_cache
    first = list(range(32))
    serve(engine, "a", first)
    serve(engine, "other", [9] * 36)  # pushes all but the first of a's blocks out
    assert cache.host_hits == 0
    assert cache.num_copied_out == 7
    serve(engine, "b", [*first[:24], 1, 2])
    assert (cache.host_hits, cache.prefix_hits) == (20, 24)
    assert sum(len(plan.copies_in) for plan in engine.plans) == 5
    # What was brought back is in the host still: evicted again, it is not copied again.
    serve(engine, "again", [8] * 36)
    serve(engine, "c", first)
    assert cache.prefix_hits == 24 + 28
    keys = len(cache._host)
    assert cache.num_copied_out == keys, "each block was copied out once"


def test_the_host_keeps_what_was_used_last() -> None:
    scheduler, device = make(12, 4, 4, 1000, host_blocks=6)
    engine, cache = Engine(scheduler, device, 1), scheduler.kv_cache
    for i in range(6):
        serve(engine, f"r{i}", [i] * 17)
    assert cache.host_usage == 1.0
    serve(engine, "old", [0] * 17)
    assert cache.host_hits == 0
    serve(engine, "young", [3] * 17)
    assert cache.host_hits >= 12


def test_a_prefix_partly_on_the_device_and_partly_in_the_host() -> None:
    scheduler, device = make(12, 4, 4, 1000, host_blocks=100)
    engine, cache = Engine(scheduler, device, 1), scheduler.kv_cache
    prompt = list(range(33))
    serve(engine, "a", prompt)
    serve(engine, "b", [7] * 18)  # evicts the end of a's blocks: a beginning is evicted last
    found = cache.match_prefix(Request(request("c", prompt, 2), 0, 100))
    assert len(found) == 8
    assert found[0] >= 0 > found[-1]
    serve(engine, "c", prompt)
    assert 0 < cache.host_hits < cache.prefix_hits == 32


def test_running_streams_do_not_wait_for_many_copies() -> None:
    scheduler, device = make(60, 4, 8, 1000, host_blocks=100, max_copies_in=3)
    engine, cache = Engine(scheduler, device, 2), scheduler.kv_cache
    prompt = [*range(48), 1]
    serve(engine, "a", prompt)
    serve(engine, "b", [9] * 230)  # pushes a's blocks out
    scheduler.add(request("stream", [5, 6, 7], 30))
    while not scheduler.requests["stream"].num_output:
        engine.step()
    start = len(engine.plans)
    scheduler.add(request("c", prompt, 4))
    found: dict[str, list[int]] = {}
    while "c" in scheduler.requests:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.new_token_ids)
    assert found["c"] == expected(prompt, 4)
    copies = [len(plan.copies_in) for plan in engine.plans[start:]]
    assert max(copies) == 3
    assert sum(copies) * 4 == cache.host_hits >= 36
    assert all(plan.num_decodes >= 1 for plan in engine.plans[start:]), (
        "the stream gets a token in every step"
    )
    assert engine.run()["stream"]


def test_reset_prefix_cache_clears_both_tiers() -> None:
    scheduler, device = make(12, 4, 4, 1000, host_blocks=100)
    engine, cache = Engine(scheduler, device, 1), scheduler.kv_cache
    serve(engine, "a", list(range(32)))
    serve(engine, "b", [9] * 36)
    assert cache.host_usage > 0
    cache.reset_prefix_cache()
    scheduler.check_integrity()
    assert cache.host_usage == 0
    serve(engine, "c", list(range(32)))
    assert cache.prefix_hits == 0


def test_without_prefix_caching_nothing_is_copied() -> None:
    kv_cache = KVCacheManager(12, 4, enable_prefix_caching=False, num_host_blocks=50)
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=100, max_model_len=40)
    engine = Engine(Scheduler(config, kv_cache), SimulatedDevice(4, 4), 1)
    for i in range(4):
        serve(engine, f"r{i}", [3] * 30)
    assert kv_cache.num_copied_out == 0
    assert not any(plan.copies_in for plan in engine.plans)


@settings(max_examples=100, deadline=None)
@given(
    operations=st.lists(
        st.tuples(st.sampled_from(["put", "hold", "end", "clear"]), st.integers(0, 9)), max_size=80
    ),
    size=st.integers(0, 5),
)
def test_the_host_tier_forgets_the_least_recently_used(operations: list[tuple[str, int]], size: int) -> None:
    tier = HostTier(size)
    model: dict[bytes, int] = {}  # oldest use first
    held: set[bytes] = set()
    for what, number in operations:
        key = bytes([number])
        if what == "put":
            block = tier.put(key)
            if key in model:
                assert block is None
                if key not in held:
                    model[key] = model.pop(key)
            elif block is not None:
                for old in [k for k, b in model.items() if b == block]:
                    assert old == next(k for k in model if k not in held)
                    del model[old]
                model[key] = block
                held.add(key)
            else:
                assert len(held) == size or not size
        elif what == "hold" and (block := tier.get(key)) is not None:
            tier.hold(block)
            if key not in held:
                model[key] = model.pop(key)
                held.add(key)
        elif what == "end":
            tier.end_step()
            for key in [k for k in model if k in held]:
                model[key] = model.pop(key)
            held.clear()
        elif what == "clear" and not held:
            tier.clear()
            model.clear()
        assert {k: tier.get(k) for k in model} == model
        assert len(tier) == len(model)
        tier.check_integrity()
