"""What a layer needs of its tensor-parallel group. Implementations live in ``distributed``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """Ranks that each hold a shard of every layer."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks; may write into ``x``."""

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' ``x [N, K]`` side by side: ``[N, size * K]``."""

    def smallest(self, value: int) -> int:
        """The smallest of all ranks' values."""


class SingleGroup:
    """One rank: nothing to exchange."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def smallest(self, value: int) -> int:
        return value
