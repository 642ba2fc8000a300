# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernels of `kubeinfer.kernels.sampling` beside the choice itself: penalties and log-probabilities."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _penalty_kernel(
    logits_ptr,
    prompt_ptr,
    counts_ptr,
    row_index_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    stride,
    stride_prompt,
    stride_counts,
    vocab,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    row = tl.load(row_index_ptr + i).to(tl.int64)
    presence = tl.load(presence_ptr + i)
    frequency = tl.load(frequency_ptr + i)
    repetition = tl.load(repetition_ptr + i)
    if (row >= 0) & ((presence != 0) | (frequency != 0) | (repetition != 1)):
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = at < vocab
        target = logits_ptr + i.to(tl.int64) * stride + at
        x = tl.load(target, mask=mask, other=0.0)
        count = tl.load(counts_ptr + row * stride_counts + at, mask=mask, other=0)
        prompt = tl.load(prompt_ptr + row * stride_prompt + at, mask=mask, other=0)
        seen = (prompt != 0) | (count > 0)
        x = tl.where(seen, tl.where(x > 0, x / repetition, x * repetition), x)
        x = x - frequency * count.to(tl.float32) - tl.where(count > 0, presence, 0.0)
        tl.store(target, x, mask=mask)


@triton.jit
def _logprob_kernel(
    logits_ptr,
    token_ids_ptr,
    chosen_ptr,
    rank_ptr,
    norm_ptr,
    stride,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * stride
    token = tl.load(token_ids_ptr + row)
    mine = tl.load(base + token).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        at = start + lanes
        x = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, x)
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        top = new
        above += (x > mine).to(tl.int32)
    largest = tl.max(top, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    norm = shift + tl.log(tl.sum(total * tl.exp(top - shift), 0))
    tl.store(norm_ptr + row, norm)
    tl.store(chosen_ptr + row, mine - norm)
    tl.store(rank_ptr + row, tl.sum(above, 0).to(tl.int64) + 1)


def apply_penalties_triton(
    logits: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    row_index: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> Tensor:
    """`kubeinfer.kernels.sampling.apply_penalties` on CUDA tensors."""
    batch, vocab = logits.shape
    if batch:
        _penalty_kernel[(batch, triton.cdiv(vocab, 2048))](
            logits, prompt_mask.view(torch.uint8), output_counts, row_index, presence, frequency, repetition,
            logits.stride(0), prompt_mask.stride(0), output_counts.stride(0), vocab, BLOCK=2048, num_warps=4,
        )  # fmt: skip
    return logits


def logprobs_triton(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kubeinfer.kernels.sampling.logprobs` on CUDA tensors."""
    batch, vocab = logits.shape
    chosen = torch.empty(batch, dtype=torch.float32, device=logits.device)
    norm = torch.empty_like(chosen)
    rank = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch:
        _logprob_kernel[(batch,)](
            logits, token_ids, chosen, rank, norm, logits.stride(0), vocab, BLOCK=4096, num_warps=16
        )
    best = logits.topk(k, dim=1)
    return chosen, rank, best.values.float() - norm.unsqueeze(1), best.indices
