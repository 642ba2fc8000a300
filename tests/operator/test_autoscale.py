"""Replicas by load: bounds, windows, and sleep."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kubeinfer_operator.api.v1alpha1 import AutoscalingSpec
from kubeinfer_operator.autoscale import Demand, History, Load, decide, recommend
from kubeinfer_operator.loads import parse_metrics


def spec(**fields: Any) -> AutoscalingSpec:
    return AutoscalingSpec.model_validate({"maxReplicas": 8, "targetRequests": 10, **fields})


LOADS = st.lists(st.builds(Load, st.floats(0, 200), st.floats(0, 200), st.floats(0, 1)), max_size=6)
DEMANDS = st.builds(Demand, st.integers(0, 50), st.integers(0, 50), st.one_of(st.none(), st.floats(0, 5000)))


@given(
    st.lists(st.tuples(LOADS, DEMANDS, st.integers(0, 3), st.floats(0.5, 30)), min_size=1, max_size=30),
    st.integers(0, 3),
    st.integers(3, 6),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_always_within_bounds_and_never_down_too_soon(
    steps: list[tuple[list[Load], Demand, int, float]], low: int, high: int, up: int, down: int
) -> None:
    scaling = spec(
        minReplicas=low, maxReplicas=high, scaleUpDelay=up, scaleDownDelay=down, scaleToZeroDelay=20
    )
    history, now, current = History(), 0.0, max(low, 1)
    started = now
    for loads, demand, unread, pause in steps:
        now += pause
        wanted = decide(scaling, current, loads[:current], unread, 0, demand, history, now)
        assert low <= wanted <= high
        if wanted < current:
            assert unread == 0, "who did not answer may be the busiest"
            assert now - started >= down or now - steps[0][3] >= down
            window = [n for at, n in history.recommended if now - at <= down]
            assert max(window) <= wanted or wanted == 1
        if wanted == 0 and current > 0:
            assert not demand.waiting
            assert not demand.inflight
        current = wanted


def test_up_at_once_and_down_after_the_window() -> None:
    scaling, history = spec(scaleDownDelay=60), History()
    busy = [Load(25, 10, 0.2)]
    assert decide(scaling, 1, busy, 0, 0, Demand(), history, 0) == 4
    idle = [Load(1, 0, 0.1)] * 4
    assert decide(scaling, 4, idle, 0, 0, Demand(), history, 30) == 4
    assert decide(scaling, 4, idle, 0, 0, Demand(), history, 59) == 4
    assert decide(scaling, 4, idle, 0, 0, Demand(), history, 61) == 1


def test_cache_pressure_counts() -> None:
    assert recommend(spec(), 2, [Load(1, 0, 0.95), Load(1, 0, 0.95)], 0, Demand()) == 3
    assert recommend(spec(), 1, [Load(1, 0, 0.5)], 0, Demand()) == 1


def test_sleeps_and_wakes() -> None:
    scaling, history = spec(minReplicas=0, scaleDownDelay=1, scaleToZeroDelay=10), History()
    idle = [Load(0, 0, 0)]
    assert decide(scaling, 1, idle, 0, 0, Demand(), history, 0) == 1
    assert decide(scaling, 1, idle, 0, 0, Demand(idle_for=5), history, 8) == 1
    assert decide(scaling, 1, idle, 0, 0, Demand(idle_for=9), history, 12) == 1, "somebody asked 9 s ago"
    assert decide(scaling, 1, idle, 0, 0, Demand(idle_for=13), history, 16) == 0
    assert decide(scaling, 0, [], 0, 0, Demand(), history, 20) == 0
    assert decide(scaling, 0, [], 0, 0, Demand(waiting=1), history, 21) == 1


def test_a_pod_that_still_loads_is_not_taken_away() -> None:
    scaling, history = spec(minReplicas=0, scaleDownDelay=0, scaleToZeroDelay=5), History()
    for now in range(0, 600, 10):
        assert decide(scaling, 1, [], 0, 1, Demand(), history, now) == 1
    assert decide(scaling, 1, [Load(0, 0, 0)], 0, 0, Demand(), history, 593) == 1, "it has only just come up"


def test_metrics_page() -> None:
    page = """# TYPE kubeinfer:num_requests_running gauge
kubeinfer:num_requests_running{model_name="a"} 3.0
kubeinfer:num_requests_waiting{model_name="a"} 2
kubeinfer:kv_cache_usage_perc{model_name="a"} 0.25
kubeinfer:num_requests_running_total 99
"""
    assert parse_metrics(page) == Load(3, 2, 0.25)
    assert parse_metrics("up 1") is None
