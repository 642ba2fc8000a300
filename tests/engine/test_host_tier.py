"""The second tier of the prefix cache, in host memory, against a simulated device."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.simulated_device import Engine, SimulatedDevice, expected, make, request
from kubeinfer.engine.host_tier import HostTier
from kubeinfer.engine.kv_cache import KVCacheManager
from kubeinfer.engine.request import Request
from kubeinfer.engine.scheduler import Scheduler, SchedulerConfig


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
