"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kubeinfer.kernels.activation import silu_and_mul
from kubeinfer.layers.linear import ColumnLinear, RowLinear
from kubeinfer.layers.parameters import ParameterStore


class GatedMLP:
    """``down(silu(gate(x)) * up(x))``, gate and up in one weight (SwiGLU: Shazeer 2020)."""

    def __init__(
        self, store: ParameterStore, prefix: str, hidden: int, intermediate: int, bias: bool = False
    ):
        self.gate_up = ColumnLinear(
            store, [f"{prefix}.gate_proj", f"{prefix}.up_proj"], [intermediate, intermediate], hidden, bias
        )
        self.down = RowLinear(store, f"{prefix}.down_proj", hidden, intermediate, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(silu_and_mul(self.gate_up(x)))


class PlainMLP:
    """``fc2(act(fc1(x)))``."""

    def __init__(
        self,
        store: ParameterStore,
        prefix: str,
        hidden: int,
        intermediate: int,
        activation: Callable[[Tensor], Tensor],
        bias: bool = True,
    ):
        self.fc1 = ColumnLinear(store, [f"{prefix}.fc1"], [intermediate], hidden, bias)
        self.fc2 = RowLinear(store, f"{prefix}.fc2", hidden, intermediate, bias)
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))
