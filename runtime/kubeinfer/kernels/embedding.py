"""Embedding gather from one shard of the vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def vocab_parallel_embedding(
    ids: Tensor, weight: Tensor, vocab_start: int = 0, vocab_end: int | None = None
) -> Tensor:
    """Rows ``ids - vocab_start`` of ``weight``; zero rows for ids outside ``[vocab_start, vocab_end)``.

    The sum of all shards' results is the whole embedding.

    Args:
        ids: int32 or int64 ``[T]``.
        weight: ``[rows, H]``, this shard; ``rows >= vocab_end - vocab_start`` (padding rows are never read).
        vocab_end: default: the shard is the whole vocabulary.

    Returns:
        ``[T, H]`` of ``weight``'s dtype.
    """
    if ids.is_cuda:
        from kubeinfer.kernels.triton_embedding import embedding_triton

        return embedding_triton(ids, weight, vocab_start, weight.shape[0] if vocab_end is None else vocab_end)
    return embedding_reference(ids, weight, vocab_start, vocab_end)


def embedding_reference(ids: Tensor, weight: Tensor, vocab_start: int, vocab_end: int | None) -> Tensor:
    """`vocab_parallel_embedding` in torch."""
    if vocab_end is None:
        return F.embedding(ids, weight)
    inside = (ids >= vocab_start) & (ids < vocab_end)
    rows = F.embedding((ids - vocab_start).where(inside, 0), weight)
    return rows.masked_fill_(~inside.unsqueeze(-1), 0)
