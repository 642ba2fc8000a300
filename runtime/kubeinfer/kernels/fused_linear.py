"""Linear layers with what stands before and after them: RMS norm, gated activation, residual addition.

A few tokens on a GPU take one kernel each (`kubeinfer.kernels.triton_linear`), which also spares the rounding between the
parts, and so do product and gate of some tens (`kubeinfer.kernels.gluon_gated_columns`) and of many
(`kubeinfer.kernels.gluon_gated_matmul`); all else runs the parts one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kubeinfer.kernels.activation import silu_and_mul
from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.linear import (
    MAX_FEW_ROWS,
    PackedWeight,
    few_rows,
    few_rows_config,
    linear,
    whole_waves,
)
from kubeinfer.kernels.norm import NormBegun, rms_norm

# The fewest tokens from which on our gated product takes any number: of fewer, those whose tiles fill the GPU.
MIN_MANY_ROWS = 1024
# From so many tokens on it pays that the product before a norm reads the residual stream, and not the norm.
_MIN_ADDED_ROWS = 512


@dataclass(frozen=True, slots=True)
class GatedForm:
    """How the gated product of many tokens is shared out.

    Attributes:
        group: rows of tiles that share weights in the L2 cache.
        paired: whether two programs share them in their shared memories too.
    """

    group: int
    paired: bool = False


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: PackedWeight | None = None,
    begun: NormBegun | None = None,
) -> Tensor:
    """``rms_norm(x) @ weight.T + bias``: ``x [T, K]``, ``weight [N, K]`` -> ``[T, N]`` in ``x``'s dtype.

    ``begun`` is that norm, if the product before began it.
    """
    config = few_rows_config(x, weight, weight.shape[0], "plain")
    if config is None:
        return linear(rms_norm(x, norm_weight, eps), weight, bias, packed)
    from kubeinfer.kernels.triton_linear import linear_triton

    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    return linear_triton(x, weight, bias, out, config, norm_weight, eps, begun=begun)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: PackedWeight | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    begun: NormBegun | None = None,
) -> Tensor:
    """``silu(gate) * up`` of one projection: ``x [T, K]``, ``weight [2 I, K]`` (gates first) -> ``[T, I]``.

    With a ``norm_weight [K]``, of ``rms_norm(x)``; ``begun`` is that norm, if the product before began it.
    """
    inner = weight.shape[0] // 2
    config = few_rows_config(x, weight, inner, "gated")
    if config is None:
        if norm_weight is not None:
            x = rms_norm(x, norm_weight, eps)
        many = many_rows_form(x, weight, inner)
        if many is None:
            return silu_and_mul(linear(x, weight, bias, packed))
        from kubeinfer.kernels.gluon_gated_matmul import gated_matmul_gluon

        return gated_matmul_gluon(x, weight, bias, x.new_empty(x.shape[0], inner), many)
    from kubeinfer.kernels.triton_linear import linear_triton

    out = torch.empty(x.shape[0], inner, dtype=x.dtype, device=x.device)
    return linear_triton(x, weight, bias, out, config, norm_weight, eps, gated=True, begun=begun)


def many_rows_form(x: Tensor, weight: Tensor, inner: int) -> GatedForm | None:
    """The form of our GPU kernel for the gated product of many tokens; None where cuBLAS serves it.

    ``x [T, K]``, ``weight [2 inner, K]``.
    """
    if not x.is_cuda or x.dim() != 2 or x.shape[0] <= MAX_FEW_ROWS or batch_invariant():
        return None
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return None
    # What the copy engine takes.
    if any(t.stride(1) != 1 or t.stride(0) % 8 or t.data_ptr() % 16 for t in (x, weight)):
        return None
    from kubeinfer.kernels.triton_launch import runs_gluon

    if not runs_gluon():
        return None
    from kubeinfer.kernels.gluon_gated_matmul import find_gated_form

    return find_gated_form(inner, x.shape[1], x.shape[0])


def adds_to_residual(x: Tensor) -> bool:
    """Whether products that add to the residual stream ``x [T, H]`` cost less than a norm that does."""
    if few_rows(x):
        return True
    return (
        x.is_cuda
        and x.shape[0] >= _MIN_ADDED_ROWS
        and x.dtype in (torch.bfloat16, torch.float16)
        and not batch_invariant()
    )


def add_linear(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: PackedWeight | None = None,
) -> Tensor:
    """``residual += x @ weight.T + bias`` in place, and returned: ``residual [T, N]``, ``x [T, K]``, ``weight [N, K]``."""
    add_linear_before_norm(residual, x, weight, bias, packed, None)
    return residual


def add_linear_before_norm(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: PackedWeight | None,
    norm_weight: Tensor | None,
) -> NormBegun | None:
    """`add_linear`; the RMS norm of the sum, whose weight is ``norm_weight [N]``, is begun if that costs no kernel."""
    config = few_rows_config(x, weight, weight.shape[0], "plain")
    if config is not None:
        from kubeinfer.kernels.triton_linear import add_linear_triton

        return add_linear_triton(residual, x, weight, bias, config, norm_weight)
    if packed is None and bias is None and not batch_invariant():
        cut = whole_waves(x.shape[0], weight.shape[0], x.shape[1]) if x.is_cuda else 0
        for part in (slice(0, cut), slice(cut, None)) if cut else (slice(None),):
            residual[:, part].addmm_(x, weight[part].t())
    else:
        residual.add_(linear(x, weight, bias, packed))
    return None
