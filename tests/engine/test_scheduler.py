"""The scheduler and KV cache against a simulated device that remembers which token each cache slot holds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.simulated_device import VOCAB, Engine, expected, make, request
from kubeinfer.engine.free_list import FreeList
from kubeinfer.engine.messages import EngineRequest
from kubeinfer.engine.plan import StepPlan, StepResult
from kubeinfer.engine.request import Request
from kubeinfer.sampling_params import SamplingParams


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
    failing: dict[str, int] = {}  # after so many samples their steps have no token
    execute = device.execute

    def execute_with_failures(plan: StepPlan) -> StepResult:
        result = execute(plan)
        names = {running.row: running.request_id for running in scheduler.running}
        for i, at in enumerate(plan.sampled):
            name = names[plan.rows[at]]
            failing[name] = failing.get(name, 1000) - 1
            if failing[name] < 0:
                result.token_ids[i] = -1
        return result

    device.execute = execute_with_failures  # type: ignore[method-assign]
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
        if rng.random() < 0.1:
            failing[name] = rng.randint(0, count)
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
        if name in aborted or failing[name] < 0:
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


def test_long_prompts_do_not_push_each_other_out() -> None:
    """Each begins only when the whole of it has room beside what runs: chunk by chunk all would begin, and none would end."""
    prompts = {f"r{i}": [(7 * i + j) % VOCAB for j in range(160)] for i in range(8)}
    scheduler, device = make(102, 4, 20, 1000, enable_prefix_caching=False)  # two prompts and a half
    engine = Engine(scheduler, device, 1)
    for name, prompt in prompts.items():
        scheduler.add(request(name, prompt, 5))
    done = engine.run()
    assert done == {name: expected(prompt, 5) for name, prompt in prompts.items()}
    assert scheduler.num_preemptions == 0
    assert sum(sum(plan.num_tokens) for plan in engine.plans) == 8 * (160 + 4)


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


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("host_blocks", [0, 20])
def test_a_request_whose_step_has_no_token_fails_alone_and_nobody_meets_its_blocks(
    depth: int, host_blocks: int
) -> None:
    scheduler, device = make(12, 2, 4, 30, host_blocks, wait_for_tokens=depth == 1)
    engine = Engine(scheduler, device, depth)
    prompts = {name: [i, 1, 2, 3, 4, 5] for i, name in enumerate(("bad", "good", "late"))}
    for name, prompt in prompts.items():
        scheduler.add(request(name, prompt, 8))
    execute, seen = device.execute, 0

    def without_the_third(plan: StepPlan) -> StepResult:
        nonlocal seen
        result = execute(plan)
        for i, at in enumerate(plan.sampled):
            if device.tokens[plan.rows[at]][:6] == prompts["bad"]:
                seen += 1
                if seen >= 3:
                    result.token_ids[i] = -1
        return result

    device.execute = without_the_third  # type: ignore[method-assign]
    found: dict[str, list[int]] = {name: [] for name in prompts}
    errors: dict[str, str | None] = {}
    while scheduler.has_unfinished():
        for output in engine.step():
            found[output.request_id] += output.new_token_ids
            if output.finish_reason == "error":
                errors[output.request_id] = output.error
    assert list(errors) == ["bad"]
    assert "no token has a score" in str(errors["bad"])
    assert found == {
        name: expected(prompt, 8)[: 2 if name == "bad" else 8] for name, prompt in prompts.items()
    }
    assert scheduler.num_generation_tokens == 18
    again = Request(request("again", prompts["bad"], 8), 9, 40)
    assert scheduler.kv_cache.match_prefix(again) == []
    assert scheduler.kv_cache.num_free == scheduler.kv_cache.num_usable


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
