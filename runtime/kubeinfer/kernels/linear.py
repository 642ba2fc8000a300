"""Dense matrix products: cuBLAS on GPUs, our own kernel or oneDNN on CPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels.cpu import library as cpu


@dataclass(slots=True)
class PackedWeight:
    """A weight in the layout of our CPU kernel, made once at load."""

    data: Tensor
    out_features: int


def pack_weight(weight: Tensor) -> PackedWeight | None:
    """The packed form of ``weight [N, K]`` where our CPU kernel serves it, else None."""
    if weight.is_cuda:
        return None
    data = cpu.pack_linear(weight)
    return None if data is None else PackedWeight(data, weight.shape[0])


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: PackedWeight | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``x [T, K] @ weight[N, K]^T + bias[N]`` -> ``[T, N]`` in ``x``'s dtype; ``packed`` stands for ``weight``.

    ``out`` (without a bias, on GPUs) is written where given, and returned.
    """
    if out is not None:
        return torch.mm(x, weight.t(), out=out)
    if packed is not None:
        return cpu.linear(x, packed.data, packed.out_features, bias)
    return F.linear(x, weight, bias)
