"""Where a rank stands: its tensor-parallel group and its stage of the pipeline. Groups live in ``distributed``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline: a run of layers. The first stage embeds tokens, the last one makes logits and samples."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, total: int) -> range:
        """This stage's layers of ``total``. What does not divide goes to the stages before the last, which has the head."""
        base, extra = divmod(total, self.count)
        larger_from = self.count - 1 - extra
        start = self.index * base + max(0, self.index - larger_from)
        return range(start, start + base + (larger_from <= self.index < self.count - 1))

    def layers_elsewhere(self, prefix: str, total: int) -> list[str]:
        """Beginnings of the checkpoint names of all layers that are not this stage's."""
        own = self.layers(total)
        return [f"{prefix}.{layer}." for layer in range(total) if layer not in own]


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
