"""Dense matrix products: cuBLAS on GPUs, our own kernels for some tens of tokens; our own kernel or oneDNN on CPUs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels import tuned
from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.cpu import library as cpu

if TYPE_CHECKING:
    from kubeinfer.kernels.triton_linear import AnyConfig

# The most tokens that our GPU kernels for few take, and the one for some tens (of a gated product).
MAX_FEW_ROWS = 64
MAX_TENS_ROWS = 128
_COMPUTED_AGAIN = 64  # of a token's logits


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

    ``out`` (on GPUs) is written where given, and returned.
    """
    if batch_invariant() and packed is None:
        return _linear_by_rows(x, weight, bias, out)
    config = few_rows_config(x, weight, weight.shape[0], "plain")
    if config is not None:
        from kubeinfer.kernels.triton_linear import linear_triton

        return linear_triton(x, weight, bias, _new(x, weight.shape[0]) if out is None else out, config)
    if x.is_cuda:
        cut = whole_waves(x.shape[0], weight.shape[0], x.shape[1])
        if cut:
            out = _new(x, weight.shape[0]) if out is None else out
            for part in (slice(0, cut), slice(cut, None)):
                if bias is None:
                    torch.mm(x, weight[part].t(), out=out[:, part])
                else:
                    torch.addmm(bias[part], x, weight[part].t(), out=out[:, part])
            return out
    if out is not None:
        if bias is not None:
            return torch.addmm(bias, x, weight.t(), out=out)
        return torch.mm(x, weight.t(), out=out)
    if packed is not None:
        return cpu.linear(x, packed.data, packed.out_features, bias)
    return F.linear(x, weight, bias)


def logits(
    hidden: Tensor, weight: Tensor, packed: PackedWeight | None = None, out: Tensor | None = None
) -> Tensor:
    """``hidden [N, H] @ weight[V, H]^T`` -> ``[N, V]``; in fp32 on CPUs, as 16 bits would make near values equal."""
    if packed is not None and out is None:
        return cpu.logits(hidden.contiguous(), packed.data, packed.out_features)
    if out is None and not hidden.is_cuda and hidden.dtype != torch.float32:
        return _largest_again(linear(hidden, weight).float(), hidden, weight)
    return linear(hidden, weight, None, packed, out)


def _largest_again(found: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """``found``, `logits` that were rounded to 16 bits; those that may be chosen are computed again in fp32."""
    largest = found.topk(min(_COMPUTED_AGAIN, found.shape[1])).indices
    for row, ids, x in zip(found, largest, hidden, strict=True):
        row[ids] = weight[ids].float() @ x.float()
    return found


def _linear_by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """`linear`, each row for itself: on GPUs one tile and one order of sums for any ``T``, on CPUs a row at a time."""
    if x.is_cuda:
        from kubeinfer.kernels.triton_matmul import matmul_triton

        x = x if x.stride(-1) == 1 else x.contiguous()
        return matmul_triton(x, weight, bias, _new(x, weight.shape[0]) if out is None else out)
    if not x.shape[0]:
        return _new(x, weight.shape[0])
    # Cloned, as the order of sums may depend on how a row is aligned too.
    return torch.cat([F.linear(row.clone(), weight, bias) for row in x.split(1)])


def few_rows(x: Tensor, most: int = MAX_FEW_ROWS) -> bool:
    """Whether ``x`` is at most so many tokens of 16-bit numbers on a GPU: what our kernels may serve."""
    return (
        x.is_cuda
        and not batch_invariant()
        and x.dim() == 2
        and 0 < x.shape[0] <= most
        and x.dtype in (torch.bfloat16, torch.float16)
    )


def few_rows_config(x: Tensor, weight: Tensor, n: int, kind: str) -> AnyConfig | None:
    """The launch configuration of our GPU kernel for this product; None where cuBLAS serves it.

    ``n`` outputs; ``kind`` is ``plain`` or ``gated`` (then ``weight`` has ``2 n`` rows).
    """
    most = MAX_TENS_ROWS if kind == "gated" else MAX_FEW_ROWS
    if not few_rows(x, most) or weight.dtype != x.dtype or weight.stride(-1) != 1 or x.stride(1) != 1:
        return None
    k = x.shape[1]
    if k % 8 or x.stride(0) % 8 or weight.stride(0) % 8:
        return None
    from kubeinfer.kernels.triton_linear import find_config

    return find_config(x.shape[0], n, k, kind)


@functools.cache
def whole_waves(m: int, n: int, k: int) -> int:
    """How many of ``n`` outputs fill whole waves of cuBLAS's tiles, where computing the rest apart is faster; else 0.

    Known for the batch sizes of captured decode steps and tuned shapes (``benchmarks/gpu_split.py``).
    """
    found = tuned.lookup("linear", f"split/{n}x{k}/m{m}")
    return 0 if found is None else found["columns"]


def _new(x: Tensor, n: int) -> Tensor:
    return torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
