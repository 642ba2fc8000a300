"""Normalisation layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels.fp8 import RowQuantizer
from kubeinfer.kernels.norm import fused_add_rms_norm, rms_norm
from kubeinfer.layers.parallel import Group
from kubeinfer.layers.parameters import ParameterStore


class RMSNorm:
    """Root mean square norm (Zhang and Sennrich 2019), fused with the residual addition before it."""

    def __init__(self, store: ParameterStore, name: str, size: int, eps: float):
        self.weight = store.empty(size)
        self.eps = eps
        self.quantizer: RowQuantizer | None = None
        store.expect(f"{name}.weight", self.weight)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(norm(x + residual), x + residual)``; without a residual ``(norm(x), x)``.

        With a ``quantizer`` that wants them the first is `QuantizedRows`.
        """
        if self.quantizer is not None and self.quantizer.wants(x):
            quantized = self.quantizer.rms_norm(x, residual, self.weight, self.eps)
            return quantized, x if residual is None else residual
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return fused_add_rms_norm(x, residual, self.weight, self.eps)

    def of_sum(self, group: Group, partial: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """As a call with the sum of the ranks' ``partial``; see `Group.all_reduce_norm` for how long it is good."""
        if self.quantizer is not None and group.size == 1:
            return self(partial, residual)
        return group.all_reduce_norm(partial, residual, self.weight, self.eps)


class LayerNorm:
    """Layer norm with weight and bias."""

    def __init__(self, store: ParameterStore, name: str, size: int, eps: float = 1e-5):
        self.weight, self.bias, self.eps = store.empty(size), store.empty(size), eps
        store.expect(f"{name}.weight", self.weight)
        store.expect(f"{name}.bias", self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
