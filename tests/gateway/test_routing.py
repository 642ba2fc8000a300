"""The ring's promises: bounded load, minimal movement, the same choice everywhere; and names and ejection."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeinfer_gateway.registry import EndpointSpec, ModelSpec, Registry, RoutingPolicy
from kubeinfer_gateway.routing import Ring, choose_by_key, choose_least_loaded, load_bound

keys = st.binary(max_size=40)


@dataclass(eq=False)
class Member:
    id: str
    inflight: int = 0


def members(count: int) -> list[Member]:
    return [Member(f"10.0.0.{number}:8000") for number in range(count)]


@given(keys, st.integers(1, 12))
def test_clockwise_is_a_permutation_that_order_of_members_does_not_change(key: bytes, count: int) -> None:
    one = members(count)
    other = list(one)
    random.shuffle(other)
    walk = [member.id for member in Ring(one).clockwise(key)]
    assert sorted(walk) == sorted(member.id for member in one)
    assert walk == [member.id for member in Ring(other).clockwise(key)]


@given(st.lists(keys, max_size=30), st.integers(2, 10), st.data())
@settings(deadline=None)
def test_leaving_moves_only_the_leavers_keys(asked: list[bytes], count: int, data: st.DataObject) -> None:
    all_members = members(count)
    leaver = data.draw(st.sampled_from(all_members))
    before, after = Ring(all_members), Ring(m for m in all_members if m is not leaver)
    for key in asked:
        owner = next(iter(before.clockwise(key)))
        expected = [member for member in before.clockwise(key) if member is not leaver]
        assert list(after.clockwise(key)) == expected
        if owner is not leaver:
            assert next(iter(after.clockwise(key))) is owner


@pytest.mark.parametrize("count", [2, 3, 8, 16])
def test_keys_spread(count: int) -> None:
    ring = Ring(members(count))
    share: dict[str, int] = {}
    for number in range(20_000):
        owner = next(iter(ring.clockwise(b"prompt %d" % number)))
        share[owner.id] = share.get(owner.id, 0) + 1
    assert max(share.values()) < 1.35 * 20_000 / count
    assert min(share.values()) > 0.65 * 20_000 / count


@given(
    st.integers(1, 8),
    st.lists(st.tuples(keys, st.booleans()), max_size=150),
    st.floats(1.0, 3.0),
    st.integers(1, 6),
)
@settings(deadline=None)
def test_no_load_exceeds_the_bound(
    count: int, arrivals: list[tuple[bytes, bool]], factor: float, floor: int
) -> None:
    """Whatever the keys, and with requests ending in between, a choice never lifts a member over the bound."""
    all_members = members(count)
    ring = Ring(all_members)
    for key, ends in arrivals:
        total = sum(member.inflight for member in all_members)
        bound = load_bound(total, count, factor, floor)
        chosen = choose_by_key(ring, key, lambda member: True, all_members, factor, floor)
        assert chosen is not None
        chosen.inflight += 1
        assert chosen.inflight <= bound
        owner = next(iter(ring.clockwise(key)))
        assert chosen is owner or owner.inflight >= bound
        if ends:
            random.choice([member for member in all_members if member.inflight]).inflight -= 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_least_load(loads: list[int]) -> None:
    candidates = [Member(str(index), load) for index, load in enumerate(loads)]
    chosen = choose_least_loaded(candidates)
    assert chosen is not None
    assert chosen.inflight == min(loads)
    assert choose_least_loaded([]) is None


def model(count: int, policy: RoutingPolicy | None = None, names: tuple[str, ...] = ("m",)) -> Registry:
    registry = Registry(policy or RoutingPolicy())
    endpoints = tuple(EndpointSpec(str(number), f"10.0.0.{number}", 8000) for number in range(count))
    registry.put(ModelSpec("default/m", names, 1.0, endpoints))
    return registry


@given(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=60))
@settings(deadline=None)
def test_the_last_endpoint_is_never_ejected(count: int, failures: list[int]) -> None:
    here = model(count, RoutingPolicy(eject_after=2, eject_seconds=1000)).models["default/m"]
    endpoints = list(here.endpoints.values())
    for index in failures:
        here.failed(endpoints[index % count])
        now = time.monotonic()
        assert any(endpoint.ejected_until <= now for endpoint in endpoints)
        picked = here.pick("m", b"key")
        assert picked is not None
        assert picked.ejected_until <= now


def test_ejection_backs_off_and_success_forgives() -> None:
    here = model(2, RoutingPolicy(eject_after=3, eject_seconds=10, eject_max_seconds=25)).models["default/m"]
    bad = next(iter(here.endpoints.values()))
    pauses = []
    for _ in range(3):
        while not here.failed(bad):
            pass
        pauses.append(round(bad.ejected_until - time.monotonic()))
        assert here.pick("m", b"any") is not bad
        bad.ejected_until = 0.0
    assert pauses == [10, 20, 25]
    here.succeeded(bad)
    assert [here.failed(bad) for _ in range(3)] == [False, False, True]
    assert round(bad.ejected_until - time.monotonic()) == 10


def test_equal_prefixes_meet_until_the_load_is_uneven() -> None:
    here = model(4, RoutingPolicy(floor=4)).models["default/m"]
    first = here.pick("m", b"same")
    assert first is not None
    for _ in range(4):
        assert here.pick("m", b"same") is first
        first.inflight += 1
    assert here.pick("m", b"same") is not first


def test_while_a_model_is_renamed_each_name_goes_to_the_pods_that_have_it() -> None:
    registry = Registry()
    old = EndpointSpec("old", "10.0.0.1", 8000, names=("foo",))
    new = EndpointSpec("new", "10.0.0.2", 8000, names=("bar", "baz"))

    def picked(name: str) -> str | None:
        found = registry.find(name)
        endpoint = found.pick(name, b"") if found is not None else None
        return endpoint.id if endpoint is not None else None

    registry.put(ModelSpec("default/m", ("foo",), 1.0, (old,)))
    registry.put(ModelSpec("default/m", ("bar", "baz"), 1.0, (old,)))
    assert (picked("foo"), picked("bar")) == ("old", None), "bar is known, and waited for"
    registry.put(ModelSpec("default/m", ("bar", "baz"), 1.0, (old, new)))
    assert (picked("foo"), picked("bar"), picked("baz")) == ("old", "new", "new")
    # Who asks for a name comes before who only still has it.
    other = EndpointSpec("other", "10.0.0.3", 8000, names=("foo",))
    registry.put(ModelSpec("default/n", ("foo",), 2.0, (other,)))
    assert picked("foo") == "other"
    registry.remove("default/n")
    assert picked("foo") == "old"
    registry.put(ModelSpec("default/m", ("bar", "baz"), 1.0, (new,)))
    assert registry.names() == ["bar", "baz"]


def test_models_of_one_second_have_names_in_the_operators_order() -> None:
    registry = Registry()
    for key in ("team-a/x", "team/x"):
        registry.put(ModelSpec(key, ("name",), 1.0))
    assert registry.find("name") is registry.models["team/x"]


def test_an_endpoint_that_comes_back_is_known_again() -> None:
    registry = model(2)
    here = registry.models["default/m"]
    endpoint = here.endpoints["0"]
    endpoint.inflight = 3
    registry.put(ModelSpec("default/m", ("m",), 1.0, (EndpointSpec("1", "10.0.0.1", 8000),)))
    assert endpoint.gone
    registry.put(ModelSpec("default/m", ("m",), 1.0, (EndpointSpec("0", "10.0.0.0", 8000),)))
    assert here.endpoints["0"] is endpoint
    assert not endpoint.gone


spec = st.builds(
    lambda key, names, created: ModelSpec(f"default/{key}", tuple(dict.fromkeys(names)), float(created)),
    st.sampled_from("abcd"),
    st.lists(st.sampled_from("xyz"), min_size=1, max_size=3),
    st.integers(0, 3),
)


@given(st.lists(st.one_of(spec, st.sampled_from("abcd")), max_size=40))
def test_a_name_always_belongs_to_the_oldest_that_claims_it(steps: list[ModelSpec | str]) -> None:
    registry = Registry()
    there: dict[str, ModelSpec] = {}
    for step in steps:
        if isinstance(step, str):
            registry.remove(f"default/{step}")
            there.pop(f"default/{step}", None)
        else:
            registry.put(step)
            there[step.key] = step
        for name in "xyz":
            claims = [(s.created, s.key) for s in there.values() if name in s.served_names]
            found = registry.find(name)
            assert (found.key if found else None) == (min(claims)[1] if claims else None)
    assert registry.names() == sorted({name for s in there.values() for name in s.served_names})
