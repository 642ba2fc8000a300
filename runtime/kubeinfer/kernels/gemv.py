"""A linear layer of one token: the weights are read once, at the memory's speed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for a single row, accumulated in fp32.

    Args:
        x: ``[1, K]``, contiguous.
        weight: ``[N, K]`` of ``x``'s dtype, rows contiguous; on CUDA ``K`` must be a multiple of 8.
        bias: ``[N]``.
        out: ``[1, N]``, written when given; may have another floating dtype.

    Returns:
        ``[1, N]``.
    """
    if x.is_cuda:
        from kubeinfer.kernels.triton_gemv import gemv_triton

        return gemv_triton(x, weight, bias, out)
    result = F.linear(x, weight, bias)
    return result if out is None else out.copy_(result)


def fits_gemv(x: Tensor, weight: Tensor) -> bool:
    """Whether `gemv` is the fast way: one row of 16-bit numbers on a GPU."""
    return bool(
        x.is_cuda
        and x.shape[0] == 1
        and x.dim() == 2
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and weight.shape[1] % 8 == 0
    )
