"""Where a rank stands: its tensor-parallel group and its stage of the pipeline. Groups live in ``distributed``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kubeinfer.kernels.norm import fused_add_rms_norm


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

    def reserve(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Get ready for sums of up to ``[rows, width]``; once, before the first of them."""

    def buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """Where the ``x [rows, width]`` of the next sum is best written, if it matters."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks; may write into ``x``."""

    def all_reduce_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """``residual += sum over ranks of x [T, H]`` in place; ``(rms_norm(residual), residual)``.

        Good until the next such call: the normed rows, and of ``residual`` only what that call needs.
        """

    def all_reduce_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + sum over ranks of x [T, H]``, where `all_reduce_norm` calls end; overwrites both."""

    def gather_buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """Where the ``x [rows, width]`` of the next `all_gather` is best written, if it matters."""

    def all_gather(self, x: Tensor, width: int, out: Tensor | None = None) -> Tensor:
        """All ranks' ``x [N, K]`` side by side, the first ``width`` of ``size * K`` columns; in ``out`` where given."""

    def smallest(self, value: int) -> int:
        """The smallest of all ranks' values."""


class SingleGroup:
    """One rank: nothing to exchange."""

    rank = 0
    size = 1

    def reserve(self, rows: int, width: int, dtype: torch.dtype) -> None:
        pass

    def buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        return None

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return fused_add_rms_norm(x, residual, weight, eps)

    def all_reduce_add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual.add_(x)

    def gather_buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        return None

    def all_gather(self, x: Tensor, width: int, out: Tensor | None = None) -> Tensor:
        return x[:, :width] if out is None else out.copy_(x[:, :width])

    def smallest(self, value: int) -> int:
        return value
