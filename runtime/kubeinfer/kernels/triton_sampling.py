# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernels of `kubeinfer.kernels.sampling`.

Sampling is an arg-max over scores: the logits themselves for greedy rows, ``x - log(e)`` for sampled ones. The
vocabulary is cut over programs so that few rows fill the device too, and a second kernel takes the best of the parts.
Filters (top-k, top-p, min-p) become one threshold a row. The row is read once for the largest entry and the weight of
each 32 neighbours; the threshold nearly always lies among the neighbourhoods of the largest entries, which one program
then holds in registers and bisects. Where it does not (a nucleus of thousands), the program searches the whole row,
narrowing an interval to an eighth with each pass over it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kubeinfer.kernels import sampling

NO_TOKEN = tl.constexpr(sampling.NO_TOKEN)
_NEIGHBOURS = 32
_COLLECTED = 512


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
            if FILTERED:
                # Most stretches hold nothing that is kept: no random numbers for them.
                if tl.max(x, 0) >= threshold:
                    score = x - tl.log(_exponential(seed, position, at))
                    better = (x >= threshold) & (score > best)
                    best = tl.where(better, score, best)
                    index = tl.where(better, at, index)
            else:
                score = x - tl.log(_exponential(seed, position, at))
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
    tl.store(out_ptr + row, tl.where(top > float("-inf"), chosen, NO_TOKEN).to(tl.int64))


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
def _limits(k_ptr, p_ptr, min_p_ptr, row, vocab):
    """(k, top_p, min_p, whether any filters) of a row; k is 0 where off."""
    k = tl.load(k_ptr + row)
    k = tl.where(k < vocab, tl.maximum(k, 0), 0)
    p = tl.load(p_ptr + row)
    share = tl.load(min_p_ptr + row)
    return k, p, share, (k > 0) | (p < 1.0) | (share > 0.0)


@triton.jit(do_not_specialize=["part_blocks"])
def _neighbours_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    top_ptr,
    mass_ptr,
    stride,
    vocab,
    groups,
    part_blocks,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """For every SIZE neighbours of a row: the largest ``x``, and ``sum(exp(x - largest))`` where top-p asks for it."""
    row = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    _, p, _, limited = _limits(top_k_ptr, top_p_ptr, min_p_ptr, row, vocab)
    if (temperature > 0.0) & limited:
        inverse = 1.0 / temperature
        base = logits_ptr + row.to(tl.int64) * stride
        first = tl.program_id(0) * part_blocks * GROUPS
        for start in range(first, tl.minimum(first + part_blocks * GROUPS, groups), GROUPS):
            group = start + tl.arange(0, GROUPS)
            at = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
            x = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * inverse
            top = tl.max(x, 1)
            shift = tl.where(top == float("-inf"), 0.0, top)
            tl.store(top_ptr + row * groups + group, top, mask=group < groups)
            if p < 1.0:
                tl.store(
                    mass_ptr + row * groups + group,
                    tl.sum(tl.exp(x - shift[:, None]), 1),
                    mask=group < groups,
                )


@triton.jit
def _key(x):
    """int32 that orders like the float."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _bisect(keys, weights, target, low, high):
    """The largest key in ``[low, high)`` with ``sum(weights[keys >= key]) >= target``; true of ``low``."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        if tl.sum(tl.sum(tl.where(keys >= middle, weights, 0.0), 1), 0) >= target:
            low = middle
        else:
            high = middle
    bits = low.to(tl.int32)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _stretch(base, at, vocab, inverse):
    return tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * inverse


@triton.jit
def _threshold_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    top_ptr,
    mass_ptr,
    list_ptr,
    threshold_ptr,
    stride,
    vocab,
    groups,
    GROUPS_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    COLLECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    k, p, share, limited = _limits(top_k_ptr, top_p_ptr, min_p_ptr, row, vocab)
    threshold = float("-inf")
    if (temperature > 0.0) & limited:
        inverse = 1.0 / temperature
        base = logits_ptr + row.to(tl.int64) * stride
        group = tl.arange(0, GROUPS_PAD)
        tops = tl.load(top_ptr + row * groups + group, mask=group < groups, other=float("-inf"))
        top = tl.max(tops, 0)

        # The lowest level that not more than COLLECTED groups reach: all entries above it are in those groups.
        keys = _key(tops)
        low = tl.min(keys, 0).to(tl.int64) - 1
        high = tl.max(keys, 0).to(tl.int64) + 1
        while high - low > 1:
            middle = (low + high) >> 1
            if tl.sum((keys >= middle).to(tl.int32), 0) <= COLLECTED:
                high = middle
            else:
                low = middle
        chosen = keys >= high
        slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(
            list_ptr + row * COLLECTED + slot, group, mask=chosen & (group < groups) & (slot < COLLECTED)
        )
        tl.debug_barrier()
        everything = tl.sum((keys < high).to(tl.int32), 0) == 0
        count = tl.sum((chosen & (group < groups)).to(tl.int32), 0)
        slots = tl.arange(0, COLLECTED)
        member = tl.load(list_ptr + row * COLLECTED + slots, mask=slots < count, other=0)
        position = member[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        inside = (slots < count)[:, None] & (position < vocab)
        x = tl.load(base + position, mask=inside, other=float("-inf")).to(tl.float32) * inverse
        entries = _key(x)
        real = inside & (x > float("-inf")) & (everything | (entries >= high))
        floor = tl.min(tl.min(tl.where(real, entries, 2147483647), 1), 0)
        ceiling = _key(top) + 1
        settled = count > 0

        if share > 0.0:
            threshold = top + tl.log(share)
        if settled & (k > 0):
            if tl.sum(tl.sum(real.to(tl.int32), 1), 0) >= k:
                ones = tl.where(real, 1.0, 0.0)
                threshold = tl.maximum(threshold, _bisect(entries, ones, k * 1.0, floor, ceiling))
            else:
                settled = everything
        if settled & (p < 1.0):
            kept = real & (x >= threshold)
            weights = tl.where(kept, tl.exp(x - top), 0.0)
            mass = tl.sum(tl.sum(weights, 1), 0)
            target = mass * p
            # Entries below the level count too, unless a filter has put the threshold above it.
            complete = everything | (_key(threshold) >= high)
            if (not complete) & (threshold == float("-inf")):
                masses = tl.load(mass_ptr + row * groups + group, mask=group < groups, other=0.0)
                target = p * tl.sum(masses * tl.exp(tops - top), 0)
                complete = True
            settled = complete & (mass >= target)
            if settled:
                threshold = tl.maximum(threshold, _bisect(entries, weights, target, floor, ceiling))

        if not settled:
            lanes = tl.arange(0, BLOCK)
            threshold = float("-inf")
            if share > 0.0:
                threshold = top + tl.log(share)
            smallest = tl.full([BLOCK], float("inf"), tl.float32)
            finite = tl.zeros([BLOCK], tl.int32)
            for start in range(0, vocab, BLOCK):
                y = _stretch(base, start + lanes, vocab, inverse)
                smallest = tl.minimum(smallest, tl.where(y > float("-inf"), y, float("inf")))
                finite += (y > float("-inf")).to(tl.int32)
            bottom = tl.min(smallest, 0)
            if (k > 0) & (k <= tl.sum(finite, 0)):
                kth = _search(base, vocab, inverse, top, bottom, bottom, k * 1.0, BLOCK, False)
                threshold = tl.maximum(threshold, kth)
            if p < 1.0:
                level = tl.maximum(threshold, bottom)
                total = tl.zeros([BLOCK], tl.float32)
                lowest = tl.full([BLOCK], float("inf"), tl.float32)
                for start in range(0, vocab, BLOCK):
                    y = _stretch(base, start + lanes, vocab, inverse)
                    total += tl.where(y >= level, tl.exp(y - top), 0.0)
                    lowest = tl.minimum(lowest, tl.where(y >= level, y, float("inf")))
                goal = tl.sum(total, 0) * p
                nucleus = _search(base, vocab, inverse, top, tl.min(lowest, 0), level, goal, BLOCK, True)
                threshold = tl.maximum(threshold, nucleus)
    tl.store(threshold_ptr + row, threshold)


def sample_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    any_sampled: bool,
    any_filtered: bool,
) -> Tensor:
    """`kubeinfer.kernels.sampling.sample` on CUDA tensors; ``any_filtered``: some row has a top-k, top-p or min-p.

    Kernels have three variants for a type of logits: which filters a row has, and a greedy step's placeholders, make no more.
    """
    batch, vocab = logits.shape
    device = logits.device
    out = torch.empty(batch, dtype=torch.int64, device=device)
    if batch == 0:
        return out
    # About eight programs a multiprocessor, at least one block each. Nothing that depends on the batch is compiled in: a
    # batch of another size must not wait for a compiler.
    block = 2048
    blocks = triton.cdiv(vocab, block)
    part_blocks = triton.cdiv(blocks, max(1, min(blocks, triton.cdiv(1056, batch))))
    parts = triton.cdiv(blocks, part_blocks)
    filtered = any_sampled and any_filtered
    threshold = temperature
    if not any_sampled:
        seeds = positions = out  # not read; their types would make another variant
    if filtered:
        groups = triton.cdiv(vocab, _NEIGHBOURS)
        threshold = torch.empty(batch, dtype=torch.float32, device=device)
        tops = torch.empty(2, batch, groups, dtype=torch.float32, device=device)
        members = torch.empty(batch, _COLLECTED, dtype=torch.int32, device=device)
        _neighbours_kernel[(parts, batch)](
            logits, temperature, top_k, top_p, min_p, tops[0], tops[1], logits.stride(0), vocab, groups, part_blocks,
            GROUPS=block // _NEIGHBOURS, SIZE=_NEIGHBOURS, num_warps=8,
        )  # fmt: skip
        _threshold_kernel[(batch,)](
            logits, temperature, top_k, top_p, min_p, tops[0], tops[1], members, threshold, logits.stride(0), vocab,
            groups, GROUPS_PAD=triton.next_power_of_2(groups), SIZE=_NEIGHBOURS, COLLECTED=_COLLECTED, BLOCK=4096,
            num_warps=16,
        )  # fmt: skip
    best = torch.empty(batch, parts, dtype=torch.float32, device=device)
    index = torch.empty(batch, parts, dtype=torch.int32, device=device)
    _score_kernel[(parts, batch)](
        logits, temperature, seeds, positions, threshold, best, index, logits.stride(0), vocab, part_blocks,
        BLOCK=block, SAMPLED=any_sampled, FILTERED=filtered, num_warps=8,
    )  # fmt: skip
    _pick_kernel[(batch,)](
        best, index, out, parts, PARTS_PAD=max(2, triton.next_power_of_2(blocks)), num_warps=1
    )
    return out
