"""Decode rows that begin with the same blocks: attention over those blocks for all of them at once.

Rows whose block tables begin alike (prefix caching: the same system prompt) would each read the same keys and values. One
pass over the shared blocks takes the query heads of all such rows as the rows of one tile, so the blocks are read once a
tile and multiplied on tensor cores; it leaves for each query head a partial output and its log-sum-exp, which the row's own
attention, over what follows the shared blocks, joins to its result (Juravsky et al. 2024, "Hydragen: High-Throughput LLM
Inference with Shared Prefixes", arXiv:2402.05099; the joining is that of split decoding).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Which of a step's ``N`` decode rows share a prefix. A captured step reads both tensors anew at each replay.

    Attributes:
        members: int32 ``[N]``, indices of the rows that share, then -1; all -1 where none do. A member's block table
            begins with the first member's blocks.
        tokens: int32 ``[N]``, of each row how many tokens its prefix has: for members the same number, full blocks
            before the row's query; 0 for others.
    """

    members: Tensor
    tokens: Tensor


def prefix_attention_reference(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    shared: SharedPrefix,
    *,
    scale: float,
    soft_cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Attention of the members' queries over the shared prefix alone, in torch.

    Args:
        q: ``[N or more, Hq, D]``; row ``i`` is the query of decode row ``i``.
        kv_cache: ``[2, num_blocks, Hk, block_size, D]``.
        block_table: int32 ``[N, max_blocks]``.

    Returns:
        Outputs fp32 ``[N, Hq, D]`` and the log2 of the softmax denominators, fp32 ``[N, Hq]``; 0 and ``-inf`` in rows
        that share nothing.
    """
    rows, (_, num_heads, head_dim) = len(shared.members), q.shape
    out = torch.zeros(rows, num_heads, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.full((rows, num_heads), float("-inf"), dtype=torch.float32, device=q.device)
    members = shared.members[shared.members >= 0].long()
    if not len(members):
        return out, lse
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    blocks = block_table[members[0], : int(shared.tokens[members[0]]) // block_size].long()

    def gathered(which: int, factor: float) -> Tensor:
        pages = kv_cache[which].view(torch.uint8) if kv_cache.element_size() == 1 else kv_cache[which]
        found = pages[blocks].view(kv_cache.dtype).float() * factor
        heads = found.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
        return heads.repeat_interleave(num_heads // num_kv_heads, 0)

    logits = torch.einsum("nhd,hmd->nhm", q[members].float(), gathered(0, k_scale)) * scale
    if soft_cap > 0:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    out[members] = torch.einsum("nhm,hmd->nhd", logits.softmax(-1), gathered(1, v_scale))
    lse[members] = logits.logsumexp(-1) * 1.4426950408889634
    return out, lse
