"""Gated activations of the MLP: the input holds gate and up projections side by side."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels.cpu import library as cpu


def silu_and_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """``silu(x[..., :I]) * x[..., I:]`` of ``x [..., 2I]``, computed in fp32; returns ``[..., I]``."""
    if x.is_cuda:
        from kubeinfer.kernels.triton_activation import silu_and_mul_triton

        return silu_and_mul_triton(x, out)
    if out is None and x.dim() == 2 and cpu.usable(x):
        return cpu.silu_and_mul(x)
    return silu_and_mul_reference(x, out)


def silu_and_mul_reference(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`silu_and_mul` in torch."""
    gate, up = x.float().chunk(2, -1)
    result = F.silu(gate) * up
    if out is None:
        return result.to(x.dtype)
    out.copy_(result)
    return out
