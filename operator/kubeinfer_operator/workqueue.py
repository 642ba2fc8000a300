"""A queue of keys: each is in it once, is worked on by one worker at a time, and may be due later."""

from __future__ import annotations

import asyncio
import heapq
import time

from kubeinfer_operator.store import Key


class WorkQueue:
    """``add`` while a key is being worked on makes it due again afterwards; the earliest due time wins."""

    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        self._busy: set[Key] = set()
        self._wake = asyncio.Event()

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Make ``key`` due in ``delay`` seconds, or earlier if it is so already."""
        when = time.monotonic() + delay
        if key in self._due and self._due[key] <= when:
            return
        self._due[key] = when
        if key not in self._busy:
            heapq.heappush(self._heap, (when, key))
            self._wake.set()

    async def take(self) -> tuple[Key, float]:
        """The next key that is due, and for how many seconds it has been. Give it back with :meth:`done`."""
        while True:
            now = time.monotonic()
            while self._heap:
                when, key = self._heap[0]
                if key in self._busy or self._due.get(key) != when:
                    heapq.heappop(self._heap)  # rescheduled since
                    continue
                if when > now:
                    break
                heapq.heappop(self._heap)
                del self._due[key]
                self._busy.add(key)
                if self._heap:
                    self._wake.set()
                return key, now - when
            self._wake.clear()
            timeout = self._heap[0][0] - now if self._heap else None
            try:
                await asyncio.wait_for(self._wake.wait(), timeout)
            except TimeoutError:
                pass

    def done(self, key: Key) -> None:
        self._busy.discard(key)
        if key in self._due:
            heapq.heappush(self._heap, (self._due[key], key))
            self._wake.set()

    def forget(self, key: Key) -> None:
        """Drop what is due later for ``key``."""
        self._due.pop(key, None)

    def depth(self) -> int:
        """Keys that are due now."""
        now = time.monotonic()
        return sum(when <= now for when in self._due.values())

    def oldest(self) -> float:
        """Seconds for which the longest waiting key has been due."""
        now = time.monotonic()
        waits = [now - when for key, when in self._due.items() if key not in self._busy]
        return max(waits, default=0.0) if waits and max(waits) > 0 else 0.0
