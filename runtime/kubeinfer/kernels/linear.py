"""Dense matrix products: cuBLAS on GPUs, oneDNN or our own kernels on CPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels.cpu import library as cpu


@dataclass(slots=True)
class PackedWeight:
    """A weight in the layout of our CPU kernel, made once at load."""

    data: Tensor
    out_features: int
    in_features: int


def pack_weight(weight: Tensor, bias: Tensor | None) -> PackedWeight | None:
    """The packed form of ``weight [N, K]`` where our CPU kernel serves it, else None."""
    if weight.is_cuda:
        return None
    data = cpu.pack_linear(weight)
    return None if data is None else PackedWeight(data, weight.shape[0], weight.shape[1])


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: PackedWeight | None = None
) -> Tensor:
    """``x [T, K] @ weight[N, K]^T + bias[N]`` -> ``[T, N]`` in ``x``'s dtype."""
    if packed is not None and cpu.prefers_packed(x.shape[0], packed.out_features, packed.in_features):
        return cpu.linear_packed(x, packed.data, packed.out_features, bias)
    return F.linear(x, weight, bias)
