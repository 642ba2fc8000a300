"""Queue, writer, conditions, pods and settings."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_world import pod_status

from kubeinfer_operator import conditions
from kubeinfer_operator.config import read_settings
from kubeinfer_operator.controller import read_progress, worth_telling
from kubeinfer_operator.pods import problem
from kubeinfer_operator.store import Cache, quantity, same_quantity, subset
from kubeinfer_operator.workqueue import WorkQueue
from kubeinfer_operator.writer import difference, is_so_already, stamped

JSON = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("ab", max_size=2), inner, max_size=3)
    ),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text("abc", min_size=1, max_size=2), JSON, max_size=4)


def merge_patch(target: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """RFC 7396."""
    out = dict(target)
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict):
            out[key] = merge_patch(out[key] if isinstance(out.get(key), dict) else {}, value)
        else:
            out[key] = value
    return out


@given(OBJECTS, OBJECTS)
def test_the_patch_makes_the_one_of_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert merge_patch(before, difference(before, after)) == after
    assert difference(after, after) == {}


@given(OBJECTS, OBJECTS)
def test_what_was_applied_needs_no_apply(content: dict[str, Any], added: dict[str, Any]) -> None:
    manifest = {"metadata": {"name": "x", "labels": {"a": "b"}}, "spec": content}
    wanted = stamped(manifest)
    live = {**wanted, "spec": {**added, **content}, "status": {}}
    assert is_so_already(wanted, live)
    changed = stamped({**manifest, "spec": {**content, "new": 1}})
    assert not is_so_already(changed, live)


def test_drift_is_noticed() -> None:
    wanted = stamped({"metadata": {"name": "x"}, "spec": {"replicas": 2, "list": [{"a": 1}]}})
    assert not is_so_already(wanted, {**wanted, "spec": {"replicas": 3, "list": [{"a": 1}]}})
    assert not is_so_already(wanted, {**wanted, "spec": {"replicas": 2, "list": [{"a": 1}, {"a": 2}]}})
    assert is_so_already(
        wanted, {**wanted, "spec": {"replicas": 2, "list": [{"a": 1, "default": 0}], "more": 1}}
    )


def test_quantities() -> None:
    assert quantity("1500m") == 1.5
    assert quantity("2Gi") == 2 << 30
    assert same_quantity("1000m", "1")
    assert same_quantity("1024Mi", "1Gi")
    assert not same_quantity("x", "1")
    assert subset({"cpu": "0.5"}, {"cpu": "500m"})
    with pytest.raises(ValueError):
        quantity("many")


async def test_queue_has_a_key_once_and_works_on_it_alone() -> None:
    queue = WorkQueue()
    queue.add(("a", "b"))
    queue.add(("a", "b"))
    key, _ = await queue.take()
    queue.add(key)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(), 0.05)
    queue.done(key)
    again, _ = await asyncio.wait_for(queue.take(), 1)
    assert again == key
    queue.done(key)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(), 0.05)


async def test_queue_earliest_wins() -> None:
    queue = WorkQueue()
    queue.add(("a", "late"), 30)
    queue.add(("a", "soon"), 0.05)
    queue.add(("a", "late"), 0.1)
    queue.add(("a", "late"), 20)
    assert (await asyncio.wait_for(queue.take(), 1))[0] == ("a", "soon")
    assert (await asyncio.wait_for(queue.take(), 1))[0] == ("a", "late")
    assert queue.oldest() == 0


async def test_queue_wakes_several_workers() -> None:
    queue = WorkQueue()
    workers = [asyncio.create_task(queue.take()) for _ in range(4)]
    await asyncio.sleep(0)
    for number in range(4):
        queue.add(("a", str(number)))
    done = await asyncio.wait_for(asyncio.gather(*workers), 1)
    assert sorted(key[1] for key, _ in done) == ["0", "1", "2", "3"]


NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = datetime(2026, 1, 2, tzinfo=UTC)


def test_conditions_keep_their_time_while_their_status_stays() -> None:
    first = conditions.merge([], [conditions.no("Ready", "Starting", "a")], 1, NOW)
    second = conditions.merge(first, [conditions.no("Ready", "Probing", "b")], 2, LATER)
    assert second[0]["lastTransitionTime"] == first[0]["lastTransitionTime"]
    assert second[0]["observedGeneration"] == 2
    third = conditions.merge(second, [conditions.yes("Ready", "Answering", "")], 2, LATER)
    assert third[0]["lastTransitionTime"] == "2026-01-02T00:00:00Z"
    assert third[0]["message"] == "Answering", "some API servers take an empty string for none"
    assert conditions.transitions(second, third) == third
    assert conditions.transitions(third, third) == []


def test_events_are_for_what_matters() -> None:
    ready = {"type": "Ready", "status": "True", "reason": "Answering"}
    lost = {"type": "Ready", "status": "False", "reason": "EngineFailed"}
    assert worth_telling(lost, ready)
    assert not worth_telling(lost, None)
    assert not worth_telling({"type": "Planned", "status": "Unknown", "reason": "Resolving"}, None)


def test_pod_problems() -> None:
    def of(status: dict[str, Any]) -> tuple[str, bool] | None:
        found = problem({"metadata": {"name": "p"}, "status": status}, "runtime")
        return (found.reason, found.fatal) if found else None

    assert of(pod_status("ready")) is None
    assert of(pod_status("starting")) is None
    assert of(pod_status("crash")) == ("EngineFailed", True)
    assert of(pod_status("image")) == ("ImagePullFailed", False)
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    assert of({"containerStatuses": [{"name": "runtime", "state": killed, "restartCount": 0}]}) == (
        "OutOfMemory",
        False,
    )


def test_progress_lines() -> None:
    text = 'noise\n{"event": "progress", "bytesDone": 5, "bytesTotal": 10, "rate": 2, "eta": null}\n{"half'
    progress = read_progress(text)
    assert progress is not None
    assert (progress.done, progress.total, progress.rate, progress.eta) == (5, 10, 2, None)
    assert read_progress("nothing") is None


def test_an_older_version_does_not_overwrite_a_newer_one() -> None:
    cache = Cache("app")
    new = {"metadata": {"name": "x", "uid": "1", "resourceVersion": "10"}}
    old = {"metadata": {"name": "x", "uid": "1", "resourceVersion": "9"}}
    assert cache.put(new)
    assert not cache.put(old)
    assert cache.get("", "x") is new
    assert cache.put(old, force=True)
    assert cache.put({"metadata": {"name": "x", "uid": "2", "resourceVersion": "3"}}), (
        "another object of the name"
    )


def test_settings_from_flags_and_environment(capsys: pytest.CaptureFixture[str]) -> None:
    found = read_settings(
        ["--workers", "3"],
        {"WATCH_NAMESPACES": "a, b", "KUBEINFER_WORKERS": "5", "HF_ENDPOINT": "http://hub"},
    )
    assert (found.workers, found.watch_namespaces, found.hf_endpoint) == (3, ("a", "b"), "http://hub")
    with pytest.raises(SystemExit):
        read_settings([], {"KUBEINFER_WORKERS": "many"})
    assert "KUBEINFER_WORKERS" in capsys.readouterr().err
