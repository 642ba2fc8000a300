"""RMSNorm, RMSNorm fused with the residual addition, LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels.cpu import library as cpu


@dataclass(frozen=True, slots=True)
class NormBegun:
    """The RMS norm of ``x [T, H]`` as the product that computed ``x`` leaves it to the next one: rows are not divided yet.

    Attributes:
        scaled: ``x * weight`` ``[T, H]`` in ``x``'s dtype.
        squares: fp32 ``[parts, rows]``, ``rows >= T``: sums of squares of parts of a row, which together are the row's.
    """

    scaled: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, x: Tensor, parts: int, rows: int) -> NormBegun:
        """For a kernel to write."""
        scaled = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return cls(scaled, torch.empty(parts, rows, dtype=torch.float32, device=x.device))


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension, computed in fp32.

    Args:
        x: ``[..., H]``, rows contiguous.
        weight: ``[H]``.
        eps: added to the mean square.
        out: written when given (may be ``x``), else a new tensor of ``x``'s dtype.
    """
    if x.is_cuda:
        from kubeinfer.kernels.triton_norm import rms_norm_triton

        return rms_norm_triton(x, None, weight, eps, out)
    if out is None and x.dim() == 2 and cpu.usable(x, weight):
        return cpu.rms_norm(x, None, weight, eps)
    return rms_norm_reference(x, weight, eps, out)


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``residual += x`` in place, then RMSNorm of the sum.

    Args:
        x, residual: ``[..., H]`` of one dtype.
        out: where the normalised rows go (may be ``x``); a new tensor when missing.

    Returns:
        the normalised rows, and ``residual`` (the same tensor, updated).
    """
    if x.is_cuda:
        from kubeinfer.kernels.triton_norm import rms_norm_triton

        return rms_norm_triton(x, residual, weight, eps, out), residual
    if out is None and x.dim() == 2 and cpu.usable(x, residual, weight):
        return cpu.rms_norm(x, residual, weight, eps), residual
    residual.add_(x)
    return rms_norm_reference(residual, weight, eps, out), residual


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """`rms_norm` in torch."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    if out is None:
        return wide.to(x.dtype)
    out.copy_(wide)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension (torch's own kernel on every device)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
