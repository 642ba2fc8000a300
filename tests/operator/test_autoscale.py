"""Replicas by load: bounds, windows, and sleep."""

from __future__ import annotations

import socket
import time
from typing import Any

from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from kubeinfer_operator.api.v1alpha1 import AutoscalingSpec
from kubeinfer_operator.autoscale import Demand, History, Load, decide, recommend
from kubeinfer_operator.loads import Reader, parse_metrics


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


def test_no_sleep_while_a_gateway_does_not_answer() -> None:
    scaling, history = spec(minReplicas=0, scaleDownDelay=1, scaleToZeroDelay=10), History()
    idle = [Load(0, 0, 0)] * 2
    for now in range(0, 60, 5):
        least = 2 if now == 0 else 1
        assert decide(scaling, 2 if now == 0 else 1, idle, 0, 0, Demand(silent=1), history, now) == least
    assert decide(scaling, 1, idle, 0, 0, Demand(), history, 64) == 1, "it may have had requests until 55"
    assert decide(scaling, 1, idle, 0, 0, Demand(), history, 66) == 0
    at_once, history = spec(minReplicas=0, scaleDownDelay=0, scaleToZeroDelay=0), History()
    assert [decide(at_once, 1, idle, 0, 0, Demand(silent=1), history, now) for now in range(3)] == [1, 1, 1]
    assert decide(at_once, 1, idle, 0, 0, Demand(), history, 3) == 0


async def test_what_gateways_say_and_why_others_do_not() -> None:
    now = time.time()
    models = {
        "a/one": {"waiting": 2, "inflight": 1, "last_request": now - 5},
        "a/two": {"waiting": 0, "inflight": 0, "last_request": None},
    }
    answers = {
        "127.0.0.1": web.json_response({"models": models}),
        "127.0.0.2": web.json_response({"models": models}),
        "127.0.0.3": web.Response(status=404),
        "127.0.0.4": web.Response(text="hello"),
    }

    async def answer(request: web.Request) -> web.Response:
        given = answers[request.url.host or ""]
        return web.Response(body=given.body, status=given.status)

    app = web.Application()
    app.router.add_get("/demand", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    for address in answers:
        await web.TCPSite(runner, address, port).start()
    reader = Reader()
    try:
        demand, silent = await reader.demand([*answers, "127.0.0.5"], port)
    finally:
        await reader.close()
        await runner.cleanup()
    assert set(demand) == {"a/one", "a/two"}
    assert (demand["a/one"].waiting, demand["a/one"].inflight) == (4, 2)
    assert 4 < (demand["a/one"].idle_for or 0) < 30
    assert demand["a/two"] == Demand()
    assert silent.keys() == {"127.0.0.3", "127.0.0.4", "127.0.0.5"}
    assert silent["127.0.0.3"] == f"http://127.0.0.3:{port}/demand answered 404"
    assert "no demand" in silent["127.0.0.4"]
    assert silent["127.0.0.5"].startswith(f"http://127.0.0.5:{port}/demand: ")


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
