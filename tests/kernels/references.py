"""What layers compute around a product, in float64: for the tests of kernels that take part of it into the product."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-5


def error(got: Tensor, want: Tensor) -> float:
    """How far ``got`` is from ``want``, relative to the size of ``want`` as a whole."""
    assert got.shape == want.shape
    return float((got.double().cpu() - want).norm() / want.norm())


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm with ``EPS``."""
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


def gated(y: Tensor) -> Tensor:
    """SiLU of the left half of each row, times the right half."""
    gate, up = y.chunk(2, 1)
    return gate * torch.sigmoid(gate) * up


def cos_sin_table(size: int, rotary: int) -> Tensor:
    """fp32 ``[size, rotary]``: of each position the cosines, then the sines."""
    angle = torch.arange(size)[:, None] * 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    return torch.cat((angle.cos(), angle.sin()), 1).float()
