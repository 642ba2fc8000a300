"""Python's garbage collector, and long lists of token ids.

A full collection visits every element of every list there is: of some hundred long prompts that takes as long as several steps, and
it finds nothing, as nothing here refers to itself.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_NEVER = 1 << 30  # collections of the middle generation after which one of all is due
_lock = threading.Lock()
_inside = 0
_before = (0, 0, 0)


@contextmanager
def no_full_collections() -> Iterator[None]:
    """Within, in any thread, the collector looks at young objects only. What became due meanwhile is done afterwards."""
    global _inside, _before
    with _lock:
        if not _inside:
            _before = gc.get_threshold()
            gc.set_threshold(*_before[:2], _NEVER)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                gc.set_threshold(*_before)
