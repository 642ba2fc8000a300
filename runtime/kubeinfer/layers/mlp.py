"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kubeinfer.kernels.norm import NormBegun
from kubeinfer.layers.linear import ColumnLinear, GatedLinear, RowLinear
from kubeinfer.layers.norm import RMSNorm
from kubeinfer.layers.parameters import ParameterStore


class GatedMLP:
    """``down(silu(gate(x)) * up(x))``, gate and up in one weight (SwiGLU: Shazeer 2020)."""

    def __init__(
        self, store: ParameterStore, prefix: str, hidden: int, intermediate: int, bias: bool = False
    ):
        self.gate_up = GatedLinear(
            store, f"{prefix}.gate_proj", f"{prefix}.up_proj", intermediate, hidden, bias
        )
        self.down = RowLinear(store, f"{prefix}.down_proj", hidden, intermediate, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.gate_up(x))

    def partial(self, x: Tensor) -> Tensor:
        """This rank's part of the result."""
        return self.down.partial(self.gate_up(x))

    def add_to(
        self,
        residual: Tensor,
        norm: RMSNorm,
        begun: NormBegun | None = None,
        next_norm: RMSNorm | None = None,
    ) -> NormBegun | None:
        """``residual += self(norm(residual))`` in place; a group of one rank only.

        ``begun`` is ``norm(residual)`` if the layer before began it; ``next_norm`` of the sum may be begun for the next.
        """
        return self.down.add_to(residual, self.gate_up.after_norm(residual, norm, begun), next_norm)


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
