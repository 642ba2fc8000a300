"""Weights as they are, in the model's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kubeinfer.kernels.fused_linear import (
    add_linear,
    add_linear_before_norm,
    adds_to_residual,
    gated_linear,
    norm_linear,
)
from kubeinfer.kernels.linear import linear, pack_weight
from kubeinfer.kernels.norm import NormBegun
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.layers.quantization.base import LinearMethod, LoadingWeight, Shard

if TYPE_CHECKING:
    from kubeinfer.layers.norm import RMSNorm


class DenseWeight(LoadingWeight):
    """``weight [N, K]`` in the store's dtype."""

    def __init__(self, store: ParameterStore, shard: Shard):
        self.weight = store.empty(shard.out_features, shard.in_features)
        for part in shard.parts:
            into = self.weight.narrow(0, part.offset, part.length)
            name = f"{part.name}.weight"
            if shard.splits_inputs:
                store.expect(name, into, 1, shard.in_start, shard.in_features)
            elif part.length < part.total:
                store.expect(name, into, 0, part.start, part.length)
            else:
                store.expect(name, into)

    def finish(self) -> DenseMethod:
        return DenseMethod(self.weight)


class DenseMethod(LinearMethod):
    """``weight [N, K]``, packed where a CPU kernel wants that."""

    def __init__(self, weight: Tensor):
        self.packed = pack_weight(weight)
        # Only the packed form is kept.
        self.weight = weight if self.packed is None else weight.new_empty(0)

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, self.weight, bias, self.packed)

    def apply_into(self, x: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        return linear(x, self.weight, bias, self.packed, out)

    def after_norm(
        self, x: Tensor, norm: RMSNorm, bias: Tensor | None, begun: NormBegun | None = None
    ) -> Tensor:
        return norm_linear(x, norm.weight, norm.eps, self.weight, bias, self.packed, begun)

    def gated(
        self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None, begun: NormBegun | None = None
    ) -> Tensor:
        if norm is None:
            return gated_linear(x, self.weight, bias, self.packed)
        return gated_linear(x, self.weight, bias, self.packed, norm.weight, norm.eps, begun)

    def adds(self, residual: Tensor) -> bool:
        return adds_to_residual(residual)

    def add_to(self, residual: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        return add_linear(residual, x, self.weight, bias, self.packed)

    def add_before_norm(
        self, residual: Tensor, x: Tensor, bias: Tensor | None, norm: RMSNorm
    ) -> NormBegun | None:
        return add_linear_before_norm(residual, x, self.weight, bias, self.packed, norm.weight)
