"""Rotary embedding, optional query/key RMSNorm and the write to the KV cache, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kubeinfer.kernels.cpu import library as cpu


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Normalise (optional) and rotate ``q`` in place; write the normalised, rotated ``k`` and ``v`` to the cache.

    ``k`` itself may be overwritten on the way: attention reads the cache only.

    Args:
        q: ``[T, Hq, D]``; a view of a fused qkv tensor will do (any row stride, heads contiguous).
        k, v: ``[T, Hk, D]``, likewise.
        positions: int32 or int64 ``[T]``.
        cos_sin: fp32 ``[max_pos, R]``, ``R <= D`` rotary dimensions: ``R / 2`` cosines then ``R / 2`` sines
            (neox style: dimension ``i`` pairs with ``i + R / 2``). ``None``: no rotation.
        slot_mapping: int32 or int64 ``[T]``: ``block * block_size + offset``; -1: do not write.
        kv_cache: ``[2, num_blocks, Hk, block_size, D]``, the model's dtype or float8_e4m3fn.
        q_norm_weight, k_norm_weight: ``[D]``; both or none.
        eps: of the RMSNorm.
        k_scale, v_scale: keys and values are divided by it before they are stored as float8.
    """
    if q.is_cuda:
        from kubeinfer.kernels.triton_rope import rope_and_cache_triton

        rope_and_cache_triton(
            q,
            k,
            v,
            positions,
            cos_sin,
            slot_mapping,
            kv_cache,
            q_norm_weight,
            k_norm_weight,
            eps,
            k_scale,
            v_scale,
        )
        return
    if cpu.rope_and_cache(
        q, k, v, positions, cos_sin, slot_mapping, kv_cache, q_norm_weight, k_norm_weight, eps
    ):
        return
    rope_and_cache_reference(
        q,
        k,
        v,
        positions,
        cos_sin,
        slot_mapping,
        kv_cache,
        q_norm_weight,
        k_norm_weight,
        eps,
        k_scale,
        v_scale,
    )


def rope_and_cache_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """`rope_and_cache` in torch."""
    if q_norm_weight is not None:
        q.copy_(_normalise(q, q_norm_weight, eps))
    if k_norm_weight is not None:
        k = _normalise(k, k_norm_weight, eps)
    if cos_sin is not None:
        half = cos_sin.shape[1] // 2
        rows = cos_sin[positions.long()].unsqueeze(1)
        cos, sin = rows[..., :half], rows[..., half:]
        q.copy_(_rotate(q, cos, sin))
        k = _rotate(k, cos, sin)
    write_kv(k, v, slot_mapping, kv_cache, k_scale, v_scale)


def write_kv(
    k: Tensor, v: Tensor, slot_mapping: Tensor, kv_cache: Tensor, k_scale: float = 1.0, v_scale: float = 1.0
) -> None:
    """Store ``k, v [T, Hk, D]`` at ``slot_mapping [T]`` of the cache; rows of slot -1 are skipped."""
    slots = slot_mapping.long()
    kept = slots >= 0
    if not bool(kept.all()):
        k, v, slots = k[kept], v[kept], slots[kept]
    block_size = kv_cache.shape[3]
    block, offset = slots // block_size, slots % block_size
    if kv_cache.dtype == torch.float8_e4m3fn:
        largest = torch.finfo(kv_cache.dtype).max
        stored = kv_cache.view(torch.uint8)
        k = (k.float() / k_scale).clamp(-largest, largest).to(kv_cache.dtype).view(torch.uint8)
        v = (v.float() / v_scale).clamp(-largest, largest).to(kv_cache.dtype).view(torch.uint8)
    else:
        stored = kv_cache
    stored[0][block, :, offset] = k.to(stored.dtype)
    stored[1][block, :, offset] = v.to(stored.dtype)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    return torch.cat((rotated, x[..., 2 * half :]), -1) if 2 * half < x.shape[-1] else rotated
