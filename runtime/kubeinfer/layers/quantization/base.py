"""What a linear layer asks of its weight, whatever form that has."""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kubeinfer.kernels.activation import silu_and_mul
from kubeinfer.kernels.fp8 import RowQuantizer
from kubeinfer.kernels.linear import PackedWeight, few_rows
from kubeinfer.kernels.norm import NormBegun, rms_norm

if TYPE_CHECKING:
    from kubeinfer.layers.norm import RMSNorm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Outputs ``start : start + length`` of the checkpoint's layer ``name`` are outputs ``offset :`` of this one."""

    name: str
    offset: int
    start: int
    length: int
    total: int


@dataclass(frozen=True)
class Shard:
    """What of the checkpoint this rank's layer holds: parts one under the other, a range of inputs common to all."""

    parts: tuple[Part, ...]
    in_features: int
    in_start: int
    in_total: int

    @property
    def out_features(self) -> int:
        return sum(part.length for part in self.parts)

    @property
    def splits_inputs(self) -> bool:
        return self.in_features < self.in_total


class LoadingWeight(ABC):
    """A layer's weight while it is loaded: makes its tensors in the store and says which checkpoint tensor goes where."""

    @abstractmethod
    def finish(self) -> LinearMethod:
        """The weight, now loaded, in the form its kernel reads fastest."""


class LinearMethod(ABC):
    """Products with one weight ``[N, K]``. Inputs are ``x [T, K]``; a bias is ``[N]`` in ``x``'s dtype or None.

    What comes besides ``apply`` may be one kernel, and is two here. A ``quantizer`` says that of more than a few tokens ``x``
    may come quantized by it. ``begun``, where given, is ``norm(x)`` as the product before left it, and need not be used.
    """

    quantizer: RowQuantizer | None = None
    packed: PackedWeight | None = None  # the weight in the CPU kernels' layout, if it is in that

    @abstractmethod
    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + bias`` -> ``[T, N]``."""

    def apply_into(self, x: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """`apply`, written to ``out [T, N]`` where given."""
        y = self.apply(x, bias)
        return y if out is None else out.copy_(y)

    def after_norm(
        self, x: Tensor, norm: RMSNorm, bias: Tensor | None, begun: NormBegun | None = None
    ) -> Tensor:
        """``apply(norm(x))``."""
        return self.apply(rms_norm(x, norm.weight, norm.eps), bias)

    def gated(
        self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None, begun: NormBegun | None = None
    ) -> Tensor:
        """``silu(gate) * up`` of ``apply(norm(x))``, gates first -> ``[T, N / 2]``."""
        y = self.apply(x, bias) if norm is None else self.after_norm(x, norm, bias)
        return silu_and_mul(y)

    def adds(self, residual: Tensor) -> bool:
        """Whether `add_to` to such a residual stream costs less than a norm that does the addition."""
        return few_rows(residual)

    def add_to(self, residual: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """``residual += apply(x)`` in place, and returned."""
        return residual.add_(self.apply(x, bias))

    def add_before_norm(
        self, residual: Tensor, x: Tensor, bias: Tensor | None, norm: RMSNorm
    ) -> NormBegun | None:
        """`add_to`; ``norm`` of the sum is begun where that costs nothing."""
        self.add_to(residual, x, bias)
        return None


@functools.cache
def say_once(message: str) -> None:
    """Log ``message``: every layer would say the same."""
    logger.warning("%s", message)
