"""Which endpoint a request goes to: consistent hashing with bounded loads, or least load.

Consistent hashing with bounded loads is from Mirrokni, Thorup and Zadimoghaddam (2016): the request goes to the first
endpoint clockwise of its key whose load stays under a bound a little above the mean. No state is shared, so several
gateways send equal keys to the same endpoint without talking to each other.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from math import ceil
from typing import Generic, Protocol, TypeVar


class Loaded(Protocol):
    """What is routed to: a stable name on the ring and the number of requests in flight."""

    @property
    def id(self) -> str: ...
    @property
    def inflight(self) -> int: ...


T = TypeVar("T", bound=Loaded)


def hash_key(key: bytes) -> int:
    """A 64-bit hash, equal in every process and version."""
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big")


class Ring(Generic[T]):
    """A hash ring; each member stands on it at `points` places, found from its id only."""

    def __init__(self, members: Iterable[T] = (), points: int = 160) -> None:
        placed = sorted(
            (
                (hash_key(f"{member.id}#{point}".encode()), member.id, member)
                for member in members
                for point in range(points)
            ),
            key=lambda place: place[:2],
        )
        self._hashes = [place[0] for place in placed]
        self._members = [place[2] for place in placed]
        self.size = len({member.id for member in self._members})

    def clockwise(self, key: bytes) -> Iterable[T]:
        """Every member once, nearest clockwise of the key first."""
        count = len(self._hashes)
        if not count:
            return
        start = bisect_right(self._hashes, hash_key(key))
        seen: set[str] = set()
        for step in range(count):
            member = self._members[(start + step) % count]
            if member.id not in seen:
                seen.add(member.id)
                yield member
                if len(seen) == self.size:
                    return


def load_bound(total: int, members: int, factor: float, floor: int) -> int:
    """The most requests that one of `members` may have in flight once one more than `total` is placed."""
    return max(floor, ceil(factor * (total + 1) / members))


def choose_by_key(
    ring: Ring[T], key: bytes, usable: Callable[[T], bool], candidates: Sequence[T], factor: float, floor: int
) -> T | None:
    """The first usable member clockwise of the key that is under the bound. None only where none is usable."""
    if not candidates:
        return None
    bound = load_bound(sum(member.inflight for member in candidates), len(candidates), factor, floor)
    for member in ring.clockwise(key):
        if usable(member) and member.inflight < bound:
            return member
    return choose_least_loaded(candidates)


def choose_least_loaded(candidates: Sequence[T]) -> T | None:
    """A candidate with the fewest requests in flight, at random among equals."""
    if not candidates:
        return None
    least = min(member.inflight for member in candidates)
    return random.choice([member for member in candidates if member.inflight == least])
