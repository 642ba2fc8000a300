"""Objects are set aside for the time of a call, and not for longer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from kubeinfer.collector import Unvisited


class Ring:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def nothing_set_aside() -> Iterator[None]:
    """Tests before may have started servers, which set aside what they were started with."""
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_what_exists_is_left_alone_and_looked_at_again_afterwards() -> None:
    before = Ring()
    seen = weakref.ref(before)
    with Unvisited() as unvisited:
        del before
        inside = weakref.ref(Ring())
        gc.collect()
        assert seen() is not None  # set aside
        assert inside() is None
        inside = weakref.ref(Ring())
        unvisited.extend()
        gc.collect()
        assert inside() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert seen() is None
    assert inside() is None


def test_an_error_inside_changes_nothing() -> None:
    with pytest.raises(RuntimeError), Unvisited():
        raise RuntimeError
    assert gc.get_freeze_count() == 0


def test_what_the_process_has_set_aside_itself_stays_so() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with Unvisited() as unvisited:
        unvisited.extend()
    assert gc.get_freeze_count() == count
