"""Paged attention over a blocked KV cache: prefill, chunked prefill and decode rows in one call.

Shapes used throughout: ``T`` tokens of the step, ``Hq`` query heads, ``Hk`` KV heads (``Hq % Hk == 0``), ``D`` head
size, ``B`` sequences. ``kv_cache`` is ``[2, num_blocks, Hk, block_size, D]`` (index 0 keys, 1 values), already
holding the keys and values of this step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.cpu import library as cpu
from kubeinfer.kernels.shared_prefix import SharedPrefix


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Scratch memory of the split decode kernel, allocated once and shared by all layers.

    Attributes:
        partial: fp32 ``[rows, D]``, one normalised partial output a sequence, head and split.
        lse: fp32 ``[rows]``, log2 of each split's softmax denominator.
        prefix_partial, prefix_lse: the same of a shared prefix.
        counters: int32, one a sequence and KV head: splits that are done; zero between launches.
    """

    partial: Tensor
    lse: Tensor
    prefix_partial: Tensor
    prefix_lse: Tensor
    counters: Tensor


def decode_workspace(
    max_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str
) -> DecodeWorkspace | None:
    """Scratch memory for up to ``max_seqs`` decode rows; ``None`` where the device's kernel needs none."""
    if torch.device(device).type != "cuda":
        return None
    from kubeinfer.kernels.triton_decode_attention import workspace_rows
    from kubeinfer.kernels.triton_shared_prefix import prefix_workspace_rows

    def scratch(rows: int) -> tuple[Tensor, Tensor]:
        partial = torch.empty(rows, head_dim, dtype=torch.float32, device=device)
        return partial, torch.empty(rows, dtype=torch.float32, device=device)

    prefix_rows = 0 if batch_invariant() else prefix_workspace_rows(max_seqs, num_heads, num_kv_heads)
    return DecodeWorkspace(
        *scratch(workspace_rows(max_seqs, num_heads, num_kv_heads, head_dim, torch.device(device))),
        *scratch(prefix_rows),
        torch.zeros(max_seqs * num_kv_heads, dtype=torch.int32, device=device),
    )


def plan_decodes(seq_lens: Tensor, num_decodes: int, max_seq_len: int, kv_cache: Tensor) -> Tensor | None:
    """What lets `paged_attention` cut the contexts of many decode rows evenly, for all layers of a step; None: it does without.

    Args:
        seq_lens: int32 ``[B]``; the first ``num_decodes`` are the decode rows'.
        max_seq_len: longest context (host integer); an upper bound is fine.
        kv_cache: a layer's.
    """
    if not seq_lens.is_cuda or num_decodes < 1:
        return None
    from kubeinfer.kernels.triton_decode_attention import plan_decodes_triton

    return plan_decodes_triton(seq_lens[:num_decodes], max_seq_len, kv_cache)


def rope_and_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    *,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    workspace: DecodeWorkspace | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> bool:
    """`kubeinfer.kernels.rope.rope_and_cache`, then `paged_attention` of rows of one query token, in one kernel less.

    That serves few rows on a GPU; with any other False is returned, and nothing was done. Arguments are of those two; ``seq_lens``
    count the token itself, and all that came before it was written to the cache by steps before this one. ``q`` is not changed.
    """
    if not q.is_cuda:
        return False
    from kubeinfer.kernels.triton_rope_decode import rope_decode_triton, takes_rope_decode

    if not takes_rope_decode(q, kv_cache):
        return False
    rope_decode_triton(
        q, k, v, positions, cos_sin, slot_mapping, kv_cache, seq_lens, block_table, out, q_norm_weight, k_norm_weight,
        eps, scale, sliding_window, soft_cap, workspace,
    )  # fmt: skip
    return True


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    *,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    num_decodes: int | None = None,
    workspace: DecodeWorkspace | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    prefill_kv_tokens: int | None = None,
    shared: SharedPrefix | None = None,
    units: Tensor | None = None,
) -> Tensor:
    """Causal attention of every query token over its sequence's cached keys and values.

    Args:
        q: ``[T, Hq, D]`` fp16, bf16 or fp32; the last dimension contiguous, rows may be strided.
        kv_cache: ``[2, num_blocks, Hk, block_size, D]`` in ``q``'s dtype or float8_e4m3fn.
        query_start: int32 ``[B + 1]``; the queries of sequence ``i`` are ``query_start[i]:query_start[i + 1]``.
        seq_lens: int32 ``[B]``, context after this step, new tokens included. Rows of 0 give zeros.
        block_table: int32 ``[B, max_blocks]``.
        out: ``[T, Hq, D]``, written.
        scale: factor on the logits, usually ``D ** -0.5``.
        max_query_len: longest query of the batch (host integer).
        max_seq_len: longest context of the batch (host integer); an upper bound is fine.
        sliding_window: ``W > 0``: a query at position ``p`` sees keys ``p - W + 1 .. p``. 0: all.
        soft_cap: ``c > 0``: logits become ``c * tanh(logits / c)``.
        num_decodes: the first so many sequences have one query token; ``None``: all if ``max_query_len == 1``,
            else none (which is right for any batch, only slower).
        workspace: from `decode_workspace`; allocated at each call when missing.
        k_scale, v_scale: what stored float8 keys and values are multiplied by.
        prefill_kv_tokens: sum of ``seq_lens`` after the first ``num_decodes`` (host integer), where known: long
            prompts of uneven length are faster with it.
        shared: blocks that decode rows share, so that a GPU may read them once for all; ``None``: unknown, each row
            reads its own. Layers with a sliding window, batch-invariant attention and CPUs make no use of it.
        units: from `plan_decodes` of the same ``seq_lens`` and ``num_decodes``; None: each row is a program's of its own.

    Returns:
        ``out``.
    """
    if q.is_cuda:
        from kubeinfer.kernels.triton_attention import paged_attention_triton

        if num_decodes is None:
            num_decodes = seq_lens.shape[0] if max_query_len == 1 else 0
        return paged_attention_triton(
            q, kv_cache, query_start, seq_lens, block_table, out, scale, max_query_len, max_seq_len,
            sliding_window, soft_cap, num_decodes, workspace, k_scale, v_scale,
            prefill_kv_tokens, shared, units,
        )  # fmt: skip
    if soft_cap == 0.0 and cpu.attention(
        q, kv_cache, query_start, seq_lens, block_table, out, scale, sliding_window
    ):
        return out
    return paged_attention_reference(
        q, kv_cache, query_start, seq_lens, block_table, out, scale=scale, sliding_window=sliding_window,
        soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def paged_attention_reference(
    q: Tensor,
    kv_cache: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    *,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """`paged_attention` in torch, sequence by sequence."""
    starts = query_start.tolist()
    for i, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[i], starts[i + 1]
        if end <= begin:
            continue
        if seq_len <= 0:
            out[begin:end].zero_()
            continue
        out[begin:end] = _attend(
            q[begin:end],
            _gather(kv_cache[0], block_table[i], seq_len, q.dtype, k_scale),
            _gather(kv_cache[1], block_table[i], seq_len, q.dtype, v_scale),
            scale,
            sliding_window,
            soft_cap,
        )
    return out


def _gather(cache: Tensor, blocks: Tensor, seq_len: int, dtype: torch.dtype, factor: float) -> Tensor:
    """One sequence's keys or values, ``[Hk, seq_len, D]``."""
    block_size, head_dim = cache.shape[2], cache.shape[3]
    ids = blocks[: -(-seq_len // block_size)].long()
    if cache.dtype == torch.float8_e4m3fn:  # torch indexes no float8 on every device
        pages = (cache.view(torch.uint8)[ids].view(cache.dtype).float() * factor).to(dtype)
    else:
        pages = cache[ids]
    return pages.transpose(0, 1).reshape(cache.shape[1], -1, head_dim)[:, :seq_len]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, soft_cap: float) -> Tensor:
    """``q [n, Hq, D]`` are the last ``n`` positions of ``k, v [Hk, m, D]``; returns ``[n, Hq, D]``."""
    n, m = q.shape[0], k.shape[1]
    mask: Tensor | None = None
    if n > 1 or (0 < window < m):
        # Keys that no query sees are dropped first: a window bounds the work whatever the context.
        first = max(0, m - n - window + 1) if window > 0 else 0
        k, v = k[:, first:], v[:, first:]
        query_pos = torch.arange(m - n, m, device=q.device)[:, None]
        key_pos = torch.arange(first, m, device=q.device)[None, :]
        mask = key_pos <= query_pos
        if window > 0:
            mask &= key_pos > query_pos - window
    heads = q.transpose(0, 1)
    if soft_cap > 0:
        group = q.shape[1] // k.shape[0]
        logits = heads.float() @ k.float().repeat_interleave(group, 0).transpose(1, 2) * scale
        logits = soft_cap * torch.tanh(logits / soft_cap)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        result = torch.softmax(logits, -1) @ v.float().repeat_interleave(group, 0)
        return result.to(q.dtype).transpose(0, 1)
    causal = mask is not None and n == m and window <= 0
    result = F.scaled_dot_product_attention(
        heads[None],
        k[None],
        v[None],
        attn_mask=None if causal else mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[0],
    )
    return result[0].transpose(0, 1)
