"""Full collections wait for the end of a call, and are not lost by it."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from kubeinfer.collector import no_full_collections


class Ring:
    def __init__(self) -> None:
        self.itself = self


def churn(times: int) -> list[list[int]]:
    """Objects enough that collections of every kind become due."""
    return [[i] for i in range(times * 1000)]


def test_full_collections_wait() -> None:
    before = gc.get_threshold()
    old = Ring()
    gc.collect()  # it is of the oldest generation now
    seen = weakref.ref(old)
    del old
    full = gc.get_stats()[2]["collections"]
    with no_full_collections():
        young = weakref.ref(Ring())
        kept = churn(200)
        assert gc.get_stats()[2]["collections"] == full
        assert young() is None
        assert seen() is not None
    assert gc.get_threshold() == before
    kept += churn(1000)
    assert seen() is None
    assert kept


def test_garbage_between_many_calls_goes() -> None:
    """As a program that answers turn by turn makes it: each call promotes what was made before it."""
    seen = []
    kept = []
    for _ in range(400):
        seen.append(weakref.ref(Ring()))
        kept.append(churn(1))
        with no_full_collections():
            kept.append(churn(2))
    assert sum(ring() is not None for ring in seen) < 200


def test_calls_in_threads_and_errors_leave_the_threshold() -> None:
    before = gc.get_threshold()
    with pytest.raises(RuntimeError), no_full_collections():
        raise RuntimeError
    assert gc.get_threshold() == before
    both = threading.Barrier(2, timeout=10)

    def call() -> None:
        with no_full_collections():
            both.wait()

    thread = threading.Thread(target=call)
    thread.start()
    with no_full_collections():
        both.wait()
        thread.join(10)
        assert gc.get_threshold() != before  # the other has ended, this has not
    assert gc.get_threshold() == before
