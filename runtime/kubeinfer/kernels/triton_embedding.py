# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernel of `kubeinfer.kernels.embedding`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kubeinfer.kernels.triton_launch import Kernel


@triton.jit(do_not_specialize=["vocab_start", "vocab_end"])
def _embedding_kernel(
    ids_ptr,
    weight_ptr,
    out_ptr,
    vocab_start,
    vocab_end,
    STRIDE_WEIGHT: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids_ptr + t).to(tl.int64)
    inside = (token >= vocab_start) & (token < vocab_end)
    mask = columns < H
    row = tl.load(weight_ptr + (token - vocab_start) * STRIDE_WEIGHT + columns, mask=mask & inside, other=0.0)
    tl.store(out_ptr + t * H + columns, row, mask=mask)


_EMBEDDING = Kernel(_embedding_kernel)


def embedding_triton(ids: Tensor, weight: Tensor, vocab_start: int, vocab_end: int) -> Tensor:
    """`kubeinfer.kernels.embedding.vocab_parallel_embedding` on CUDA tensors."""
    num_tokens, width = ids.shape[0], weight.shape[1]
    out = torch.empty(num_tokens, width, dtype=weight.dtype, device=weight.device)
    if num_tokens:
        block = min(1024, triton.next_power_of_2(width))
        _EMBEDDING.launch(
            (num_tokens, triton.cdiv(width, block), 1),
            (ids, weight, out, vocab_start, vocab_end),
            (weight.stride(0), width, block),
            2,
        )
    return out
