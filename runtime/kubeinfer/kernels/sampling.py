"""Penalties, token sampling and log-probabilities over rows of logits, without a sort.

Random numbers are counter-based: the number of a vocabulary entry depends on the request's seed, the position of the
token being sampled and the entry's index only, never on the batch or the device. With 32-bit wrapping arithmetic::

    mix(x):  x ^= x >> 16;  x *= 0x85EBCA6B;  x ^= x >> 13;  x *= 0xC2B2AE35;  x ^= x >> 16     (murmur3's finaliser)
    key1   = mix(low word of seed + 0x9E3779B9 * position)
    key2   = mix(high word of seed ^ key1 ^ 0x85EBCA6B)
    x      = 0x9E3779B9 * index + key1
    x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15;  x ^= key2;  x *= 0x735A2D97;  x ^= x >> 15
    u      = (x + 0.5) * 2**-32                  (fp32)
    e      = -log(1 - u), an exponential variate (by its series where u < 2**-7, which keeps small values exact)

and the token is the one of largest ``logit / temperature - log(e)`` (the Gumbel-max method as an exponential race).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.cpu import library as cpu

# Candidates looked at before the whole row is searched: most distributions are settled by their largest entries.
_CANDIDATES = 1024
# Of a row without a number above minus infinity: where the model computes NaN, or where every token is forbidden. It reads as an
# embedding of zeros.
NO_TOKEN = -1


def apply_penalties(
    logits: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    row_index: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> Tensor:
    """Repetition, frequency and presence penalties, in place.

    A logit of a token seen in prompt or output is divided by ``repetition`` where positive and multiplied where
    negative; then ``frequency`` times the number of times it was output, and ``presence`` if it was output at all,
    are subtracted.

    Args:
        logits: fp32 ``[B, V]``, contiguous rows.
        prompt_mask: bool ``[rows, V']``, ``V' >= V``: the tokens of each request's prompt.
        output_counts: int32 ``[rows, V']``.
        row_index: int32 or int64 ``[B]``: which table row belongs to each logits row; negative: leave the row alone.
        presence, frequency, repetition: fp32 ``[B]`` (off: 0, 0, 1).

    Returns:
        ``logits``.
    """
    if logits.is_cuda:
        from kubeinfer.kernels.triton_logits import apply_penalties_triton

        return apply_penalties_triton(
            logits, prompt_mask, output_counts, row_index, presence, frequency, repetition
        )
    return apply_penalties_reference(
        logits, prompt_mask, output_counts, row_index, presence, frequency, repetition
    )


def apply_penalties_reference(
    logits: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    row_index: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> Tensor:
    """`apply_penalties` in torch."""
    active = (row_index >= 0) & ((presence != 0) | (frequency != 0) | (repetition != 1))
    for i in torch.nonzero(active).flatten().tolist():
        row, size = int(row_index[i]), logits.shape[1]
        counts = output_counts[row, :size]
        x = logits[i]
        seen = prompt_mask[row, :size] | (counts > 0)
        x = torch.where(seen, torch.where(x > 0, x / repetition[i], x * repetition[i]), x)
        logits[i] = x - frequency[i] * counts - presence[i] * (counts > 0)
    return logits


def count_tokens(output_counts: Tensor, row_index: Tensor, token_ids: Tensor) -> None:
    """``output_counts[row_index[i], token_ids[i]] += 1`` for every row and token that is not negative (each row once)."""
    ones = ((row_index >= 0) & (token_ids >= 0)).to(output_counts.dtype)
    flat = row_index.long().clamp(min=0) * output_counts.stride(0) + token_ids.clamp(min=0)
    output_counts.view(-1).scatter_add_(0, flat, ones)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    any_sampled: bool = True,
    any_top_k: bool = True,
    any_top_p: bool = True,
    any_min_p: bool = True,
) -> Tensor:
    """One token id a row.

    Temperature 0 takes the largest logit, the lowest index among equals. Otherwise, with ``x = logits /
    temperature``: entries less likely than ``min_p`` times the likeliest go; then all below the ``top_k``-th largest;
    then, of what is left and renormalised, the entry ``i`` stays if the entries above it hold less than ``top_p``.
    Entries equal to the last one kept are kept too.

    Args:
        logits: ``[B, V]`` bf16, fp16 or fp32, contiguous rows (any row stride).
        temperature: fp32 ``[B]``.
        top_k: int32 ``[B]``; 0 or at least ``V``: off.
        top_p: fp32 ``[B]``; 1: off.
        min_p: fp32 ``[B]``; 0: off.
        seeds: int64 ``[B]``.
        positions: int32 or int64 ``[B]``, the position the sampled token will have.
        any_sampled, any_top_k, any_top_p, any_min_p: false where the host knows that no (sampled) row uses it, which
            skips work.

    Returns:
        int64 ``[B]``; `NO_TOKEN` for a row of NaN or of minus infinity.
    """
    if logits.is_cuda:
        from kubeinfer.kernels.triton_sampling import sample_triton

        # Under batch invariance one variant of the kernel, whatever other rows ask for.
        any_filtered = any_top_k or any_top_p or any_min_p or batch_invariant()
        return sample_triton(
            logits, temperature, top_k, top_p, min_p, seeds, positions, any_sampled, any_filtered
        )
    tensors = [logits, temperature, top_k, top_p, min_p, seeds, positions]
    flags = {
        "any_sampled": any_sampled, "any_top_k": any_top_k, "any_top_p": any_top_p, "any_min_p": any_min_p,
    }  # fmt: skip
    if batch_invariant() and any_sampled:  # sums over the vocabulary may depend on the number of rows
        rows = zip(*(t.split(1) for t in tensors), strict=True)
        return torch.cat([sample_reference(*row, **flags) for row in rows])
    return sample_reference(*tensors, **flags)


def sample_reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    any_sampled: bool = True,
    any_top_k: bool = True,
    any_top_p: bool = True,
    any_min_p: bool = True,
) -> Tensor:
    """`sample` in torch."""
    ours = not logits.is_cuda and logits.dtype == torch.float32 and cpu.library() is not None
    result = cpu.argmax(logits) if ours else logits.argmax(-1)
    if not any_sampled:
        return _if_scored(logits, result)
    rows = torch.nonzero(temperature > 0).flatten()
    if rows.numel() == 0:
        return _if_scored(logits, result)
    x = logits[rows].float() * (1.0 / temperature[rows]).unsqueeze(1)
    threshold = sampling_threshold(
        x,
        top_k[rows] if any_top_k else None,
        top_p[rows] if any_top_p else None,
        min_p[rows] if any_min_p else None,
    )
    scores = x - exponential_noise(seeds[rows], positions[rows], x.shape[1]).log_()
    if threshold is not None:
        scores.masked_fill_(x < threshold.unsqueeze(1), float("-inf"))
    result[rows] = scores.argmax(-1)
    return _if_scored(logits, result)


def _if_scored(logits: Tensor, token_ids: Tensor) -> Tensor:
    """``token_ids``, or `NO_TOKEN` where the chosen logit is no number."""
    chosen = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return token_ids.where(chosen > float("-inf"), NO_TOKEN)


def exponential_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The exponential variates ``e`` of the module's formula, fp32 ``[B, vocab_size]``."""
    mask = 0xFFFFFFFF

    def mix(x: Tensor) -> Tensor:
        x = x ^ (x >> 16)
        x = x * 0x85EBCA6B & mask
        x = x ^ (x >> 13)
        x = x * 0xC2B2AE35 & mask
        return x ^ (x >> 16)

    # int64 holds the unsigned words; a product wraps modulo 2**64, so its low word is right.
    seeds, positions = seeds.long(), positions.long()
    key1 = mix((seeds & mask) + positions * 0x9E3779B9 & mask)
    key2 = mix(seeds >> 32 & mask ^ key1 ^ 0x85EBCA6B)
    index = torch.arange(vocab_size, device=seeds.device)
    x = index * 0x9E3779B9 + key1.unsqueeze(1) & mask
    x ^= x >> 16
    x.mul_(0x21F0AAAD).bitwise_and_(mask)
    x ^= x >> 15
    x ^= key2.unsqueeze(1)
    x.mul_(0x735A2D97).bitwise_and_(mask)
    x ^= x >> 15
    u = (x.float() + 0.5) * 2.0**-32
    return torch.where(u < 2.0**-7, u * (1 + u * (0.5 + u * (1.0 / 3.0))), -torch.log(1 - u))


def sampling_threshold(
    x: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor | None:
    """The smallest entry each row keeps, fp32 ``[B]``; ``None`` when nothing filters.

    Args:
        x: fp32 ``[B, V]``, logits over temperature.
        top_k, top_p, min_p: as in `sample`; ``None``: off for all rows.
    """
    if top_k is None and top_p is None and min_p is None:
        return None
    vocab_size = x.shape[1]
    # One partial selection settles nearly every row; what it cannot settle is searched whole.
    best = x.topk(min(_CANDIDATES, vocab_size), dim=1).values
    threshold = torch.full_like(best[:, 0], float("-inf"))
    if min_p is not None:
        threshold = torch.where(min_p > 0, best[:, 0] + torch.log(min_p), threshold)
    if top_k is not None:
        limited = (top_k > 0) & (top_k < vocab_size)
        rank = top_k.long().clamp(1, best.shape[1]).unsqueeze(1) - 1
        kth = best.gather(1, rank).squeeze(1)
        deep = torch.nonzero(limited & (top_k > best.shape[1])).flatten()
        if deep.numel():
            kth[deep] = _largest_threshold(x[deep], torch.ones_like(x[deep]), top_k[deep])
        threshold = torch.where(limited, torch.maximum(threshold, kth), threshold)
    if top_p is not None:
        weights = torch.exp(x - best[:, :1]).masked_fill_(x < threshold.unsqueeze(1), 0)
        target = weights.sum(1, dtype=torch.float64) * top_p
        mass = torch.exp(best - best[:, :1]).masked_fill_(best < threshold.unsqueeze(1), 0)
        mass = mass.cumsum(1, dtype=torch.float64)
        first = (mass < target.unsqueeze(1)).sum(1)
        nucleus = best.gather(1, first.clamp(max=best.shape[1] - 1).unsqueeze(1)).squeeze(1)
        limited = top_p < 1
        deep = torch.nonzero(limited & (first >= best.shape[1])).flatten()
        if deep.numel():
            nucleus[deep] = _largest_threshold(x[deep], weights[deep], target[deep])
        threshold = torch.where(limited, torch.maximum(threshold, nucleus), threshold)
    return threshold


def _largest_threshold(x: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """The largest entry ``t`` of each row with ``sum(weights[x >= t]) >= target``, by bisection on the bits."""
    keys = x.view(torch.int32)
    keys = torch.where(keys >= 0, keys, keys ^ 0x7FFFFFFF)  # orders like the floats
    low, high = keys.min(1).values.long(), keys.max(1).values.long() + 1
    target = target.double()
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        mass = torch.where(keys >= middle.unsqueeze(1), weights, 0).sum(1, dtype=torch.float64)
        enough = mass >= target
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    bits = low.int()
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).view(torch.float32)


def logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the chosen tokens and of the ``k`` likeliest.

    Args:
        logits: ``[B, V]`` bf16, fp16 or fp32.
        token_ids: int64 ``[B]``.
        k: 0 gives empty ``[B, 0]`` tensors.

    Returns:
        chosen log-probability fp32 ``[B]``; its rank int64 ``[B]`` (1: nothing is likelier); the ``k`` largest
        log-probabilities fp32 ``[B, k]``, descending; their ids int64 ``[B, k]``.
    """
    if logits.is_cuda:
        from kubeinfer.kernels.triton_logits import logprobs_triton

        return logprobs_triton(logits, token_ids, k)
    return logprobs_reference(logits, token_ids, k)


def logprobs_reference(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`logprobs` in torch."""
    x = logits.float()
    norm = torch.logsumexp(x, 1, keepdim=True)
    chosen = x.gather(1, token_ids.unsqueeze(1))
    rank = (x > chosen).sum(1) + 1
    best = x.topk(k, dim=1)
    return (chosen - norm).squeeze(1), rank, best.values - norm, best.indices
