"""Our CPU kernels in C, if they were built and this processor has the instructions they need."""

from __future__ import annotations

from torch import Tensor


def pack_linear(weight: Tensor) -> Tensor | None:
    return None


def prefers_packed(rows: int, out_features: int, in_features: int) -> bool:
    return False


def linear_packed(x: Tensor, data: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
    raise RuntimeError("the CPU kernel library is not there")
