# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernels of `kubeinfer.kernels.sampling`.

Sampling is an arg-max over scores: the logits themselves for greedy rows, ``x - log(e)`` for sampled ones. The
vocabulary is cut over programs so that few rows fill the device too, and a second kernel takes the best of the parts.
Filters (top-k, top-p, min-p) become one threshold a row, found before by a search that narrows an interval to an
eighth with each pass over the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    x ^= x >> 16
    return x


@triton.jit
def _exponential(seed, position, index):
    """The variates ``e`` of the formula in `kubeinfer.kernels.sampling`."""
    golden = tl.full([], 0x9E3779B9, tl.uint32)
    key1 = _mix(seed.to(tl.uint32) + position.to(tl.uint32) * golden)
    key2 = _mix((seed >> 32).to(tl.uint32) ^ key1 ^ tl.full([], 0x85EBCA6B, tl.uint32))
    x = index.to(tl.uint32) * golden + key1
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x ^= key2
    x *= 0x735A2D97
    x ^= x >> 15
    u = (x.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0)))
    return tl.where(u < 0.0078125, series, -tl.log(1.0 - u))


@triton.jit(do_not_specialize=["part_blocks"])
def _score_kernel(
    logits_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    threshold_ptr,
    best_ptr,
    index_ptr,
    stride,
    vocab,
    part_blocks,
    BLOCK: tl.constexpr,
    SAMPLED: tl.constexpr,
    FILTERED: tl.constexpr,
):
    row = tl.program_id(1)
    part = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * stride
    begin = part * part_blocks * BLOCK
    end = tl.minimum(begin + part_blocks * BLOCK, vocab)
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    index = begin + lanes
    temperature = 0.0
    if SAMPLED:
        temperature = tl.load(temperature_ptr + row)
    if temperature > 0.0:
        inverse = 1.0 / temperature
        seed = tl.load(seeds_ptr + row)
        position = tl.load(positions_ptr + row)
        threshold = float("-inf")
        if FILTERED:
            threshold = tl.load(threshold_ptr + row)
        for start in range(begin, end, BLOCK):
            at = start + lanes
            x = tl.load(base + at, mask=at < end, other=float("-inf")).to(tl.float32) * inverse
            score = x - tl.log(_exponential(seed, position, at))
            if FILTERED:
                score = tl.where(x >= threshold, score, float("-inf"))
            better = score > best
            best = tl.where(better, score, best)
            index = tl.where(better, at, index)
    else:
        for start in range(begin, end, BLOCK):
            at = start + lanes
            x = tl.load(base + at, mask=at < end, other=float("-inf")).to(tl.float32)
            better = x > best
            best = tl.where(better, x, best)
            index = tl.where(better, at, index)
    top = tl.max(best, 0)
    chosen = tl.min(tl.where(best == top, index, 2147483647), 0)
    out = row * tl.num_programs(0) + part
    tl.store(best_ptr + out, top)
    tl.store(index_ptr + out, chosen)


@triton.jit(do_not_specialize=["parts"])
def _pick_kernel(best_ptr, index_ptr, out_ptr, parts, PARTS_PAD: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, PARTS_PAD)
    best = tl.load(best_ptr + row * parts + lanes, mask=lanes < parts, other=float("-inf"))
    index = tl.load(index_ptr + row * parts + lanes, mask=lanes < parts, other=2147483647)
    top = tl.max(best, 0)
    chosen = tl.min(tl.where(best == top, index, 2147483647), 0)
    # A row of NaN alone has no largest entry; its token must still be one.
    tl.store(out_ptr + row, tl.where(chosen == 2147483647, 0, chosen).to(tl.int64))


@triton.jit
def _search(base, vocab, inverse, top, low, floor, target, BLOCK: tl.constexpr, MASS: tl.constexpr):
    """The largest ``t`` in ``[low, top]`` whose entries ``x >= t`` weigh at least ``target``.

    ``MASS``: an entry at least ``floor`` weighs ``exp(x - top)``, others nothing; else every entry weighs 1. Those
    ``>= low`` must weigh enough. Invariant: entries ``>= low`` weigh enough, entries ``>= high`` do not.
    """
    lanes = tl.arange(0, BLOCK)
    high = top + float("inf")
    limit = top
    answer = low
    done = 0
    while done == 0:
        # While the largest entry of the interval is not known to weigh too little, it is the last one tried: so equal
        # entries end the search.
        inclusive = high > limit
        step = (limit - low) * tl.where(inclusive, 0.14285714285714285, 0.125)
        t0 = low + step
        t1 = low + step * 2.0
        t2 = low + step * 3.0
        t3 = low + step * 4.0
        t4 = low + step * 5.0
        t5 = low + step * 6.0
        t6 = tl.where(inclusive, limit, low + step * 7.0)
        w0 = tl.zeros([BLOCK], tl.float32)
        w1 = tl.zeros([BLOCK], tl.float32)
        w2 = tl.zeros([BLOCK], tl.float32)
        w3 = tl.zeros([BLOCK], tl.float32)
        w4 = tl.zeros([BLOCK], tl.float32)
        w5 = tl.zeros([BLOCK], tl.float32)
        w6 = tl.zeros([BLOCK], tl.float32)
        smallest = tl.full([BLOCK], float("inf"), tl.float32)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            at = start + lanes
            x = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * inverse
            if MASS:
                weight = tl.where(x >= floor, tl.exp(x - top), 0.0)
            else:
                weight = tl.where(at < vocab, 1.0, 0.0)
            w0 += tl.where(x >= t0, weight, 0.0)
            w1 += tl.where(x >= t1, weight, 0.0)
            w2 += tl.where(x >= t2, weight, 0.0)
            w3 += tl.where(x >= t3, weight, 0.0)
            w4 += tl.where(x >= t4, weight, 0.0)
            w5 += tl.where(x >= t5, weight, 0.0)
            w6 += tl.where(x >= t6, weight, 0.0)
            within = (x >= low) & (x < high)
            smallest = tl.minimum(smallest, tl.where(within, x, float("inf")))
            largest = tl.maximum(largest, tl.where(within, x, float("-inf")))
        bottom = tl.min(smallest, 0)
        ceiling = tl.max(largest, 0)
        before_low = low
        before_high = high
        low = bottom
        low = tl.where(tl.sum(w0, 0) >= target, tl.maximum(low, t0), low)
        low = tl.where(tl.sum(w1, 0) >= target, tl.maximum(low, t1), low)
        low = tl.where(tl.sum(w2, 0) >= target, tl.maximum(low, t2), low)
        low = tl.where(tl.sum(w3, 0) >= target, tl.maximum(low, t3), low)
        low = tl.where(tl.sum(w4, 0) >= target, tl.maximum(low, t4), low)
        low = tl.where(tl.sum(w5, 0) >= target, tl.maximum(low, t5), low)
        low = tl.where(tl.sum(w6, 0) >= target, tl.maximum(low, t6), low)
        high = tl.where(tl.sum(w6, 0) < target, tl.minimum(high, t6), high)
        high = tl.where(tl.sum(w5, 0) < target, tl.minimum(high, t5), high)
        high = tl.where(tl.sum(w4, 0) < target, tl.minimum(high, t4), high)
        high = tl.where(tl.sum(w3, 0) < target, tl.minimum(high, t3), high)
        high = tl.where(tl.sum(w2, 0) < target, tl.minimum(high, t2), high)
        high = tl.where(tl.sum(w1, 0) < target, tl.minimum(high, t1), high)
        high = tl.where(tl.sum(w0, 0) < target, tl.minimum(high, t0), high)
        limit = tl.minimum(high, ceiling)
        stuck = (low == before_low) & (high == before_high)
        if (bottom >= ceiling) | (low >= ceiling) | stuck | (low >= high):
            answer = tl.minimum(low, ceiling)
            done = 1
    return answer


@triton.jit
def _threshold_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    threshold_ptr,
    stride,
    vocab,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
):
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    if temperature <= 0:
        return
    k = 0
    p = 1.0
    share = 0.0
    if TOP_K:
        k = tl.load(top_k_ptr + row)
    if TOP_P:
        p = tl.load(top_p_ptr + row)
    if MIN_P:
        share = tl.load(min_p_ptr + row)
    limit_k = (k > 0) & (k < vocab)
    threshold = float("-inf")
    if limit_k | (p < 1.0) | (share > 0.0):
        inverse = 1.0 / temperature
        base = logits_ptr + row.to(tl.int64) * stride
        lanes = tl.arange(0, BLOCK)
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        least = tl.full([BLOCK], float("inf"), tl.float32)
        finite = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab, BLOCK):
            at = start + lanes
            x = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * inverse
            most = tl.maximum(most, x)
            real = x > float("-inf")
            least = tl.minimum(least, tl.where(real, x, float("inf")))
            finite += real.to(tl.int32)
        top = tl.max(most, 0)
        bottom = tl.min(least, 0)
        if share > 0.0:
            threshold = top + tl.log(share)
        if limit_k & (k <= tl.sum(finite, 0)):
            kth = _search(base, vocab, inverse, top, bottom, bottom, k * 1.0, BLOCK, False)
            threshold = tl.maximum(threshold, kth)
        if p < 1.0:
            floor = tl.maximum(threshold, bottom)
            mass = tl.zeros([BLOCK], tl.float32)
            kept = tl.full([BLOCK], float("inf"), tl.float32)
            for start in range(0, vocab, BLOCK):
                at = start + lanes
                x = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * inverse
                mass += tl.where(x >= floor, tl.exp(x - top), 0.0)
                kept = tl.minimum(kept, tl.where(x >= floor, x, float("inf")))
            target = tl.sum(mass, 0) * p
            nucleus = _search(base, vocab, inverse, top, tl.min(kept, 0), floor, target, BLOCK, True)
            threshold = tl.maximum(threshold, nucleus)
    tl.store(threshold_ptr + row, threshold)


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


def sample_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    any_sampled: bool,
    any_top_k: bool,
    any_top_p: bool,
    any_min_p: bool,
) -> Tensor:
    """`kubeinfer.kernels.sampling.sample` on CUDA tensors."""
    batch, vocab = logits.shape
    device = logits.device
    out = torch.empty(batch, dtype=torch.int64, device=device)
    if batch == 0:
        return out
    filtered = any_sampled and (any_top_k or any_top_p or any_min_p)
    threshold = temperature
    if filtered:
        threshold = torch.empty(batch, dtype=torch.float32, device=device)
        _threshold_kernel[(batch,)](
            logits, temperature, top_k, top_p, min_p, threshold, logits.stride(0), vocab, BLOCK=4096,
            TOP_K=any_top_k, TOP_P=any_top_p, MIN_P=any_min_p, num_warps=16,
        )  # fmt: skip
    # About eight programs a multiprocessor, at least one block each.
    block = 2048
    blocks = triton.cdiv(vocab, block)
    part_blocks = triton.cdiv(blocks, max(1, min(blocks, triton.cdiv(1056, batch))))
    parts = triton.cdiv(blocks, part_blocks)
    best = torch.empty(batch, parts, dtype=torch.float32, device=device)
    index = torch.empty(batch, parts, dtype=torch.int32, device=device)
    _score_kernel[(parts, batch)](
        logits, temperature, seeds, positions, threshold, best, index, logits.stride(0), vocab, part_blocks,
        BLOCK=block, SAMPLED=any_sampled, FILTERED=filtered, num_warps=8,
    )  # fmt: skip
    _pick_kernel[(batch,)](
        best, index, out, parts, PARTS_PAD=max(2, triton.next_power_of_2(parts)), num_warps=1
    )
    return out


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
