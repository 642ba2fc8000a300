# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernel of `kubeinfer.kernels.rope`: rows of a tile are heads of q, k and v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches


@triton.jit
def _store_page(ptr, offsets, x, factor, mask):
    if ptr.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x / factor, -448.0), 448.0)
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_sin_ptr,
    slots_ptr,
    kv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    num_tokens,
    num_blocks,
    eps,
    k_scale,
    v_scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows are the heads of q, then k, then v, of one token after the other.

    Columns of a head: two rotated halves ``[0, HALF)``, ``[HALF, 2 HALF)`` and the unrotated rest.
    """
    HEADS: tl.constexpr = HQ + 2 * HK
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = row // HEADS
    head = row % HEADS
    inside = t < num_tokens
    is_q = inside & (head < HQ)
    is_v = inside & (head >= HQ + HK)
    is_k = inside & (head >= HQ) & (head < HQ + HK)
    t = t.to(tl.int64)
    kv_head = (head - HQ) % HK
    source = tl.where(
        is_q,
        q_ptr + t * STRIDE_Q + head * D,
        tl.where(is_v, v_ptr + t * STRIDE_V + kv_head * D, k_ptr + t * STRIDE_K + kv_head * D),
    )
    half = tl.arange(0, HALF_PAD)
    rest = 2 * HALF + tl.arange(0, REST_PAD)
    half_mask = inside[:, None] & (half < HALF)[None, :]
    rest_mask = inside[:, None] & (rest < D)[None, :]
    slot = tl.load(slots_ptr + t, mask=inside, other=-1).to(tl.int64)
    first = tl.zeros([ROWS, HALF_PAD], tl.float32)
    second = first
    other = tl.zeros([ROWS, REST_PAD], tl.float32)
    if HALF > 0:
        position = tl.load(positions_ptr + t, mask=inside, other=0).to(tl.int64)
        first = tl.load(source[:, None] + half[None, :], mask=half_mask, other=0.0).to(tl.float32)
        second = tl.load(source[:, None] + (half + HALF)[None, :], mask=half_mask, other=0.0).to(tl.float32)
    if 2 * HALF < D:
        other = tl.load(source[:, None] + rest[None, :], mask=rest_mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        square = tl.sum(first * first + second * second, 1) + tl.sum(other * other, 1)
        factor = tl.where(is_v, 1.0, tl.rsqrt(square / D + eps))[:, None]
        weight = tl.where(is_q, q_weight_ptr + tl.zeros_like(t), k_weight_ptr + tl.zeros_like(t))[:, None]
        normed = (is_q | is_k)[:, None]
        # Rounded as separate operations would have rounded it.
        kind = q_ptr.dtype.element_ty
        if HALF > 0:
            w1 = tl.load(weight + half[None, :], mask=normed & half_mask, other=1.0).to(tl.float32)
            w2 = tl.load(weight + (half + HALF)[None, :], mask=normed & half_mask, other=1.0).to(tl.float32)
            first = (first * factor * w1).to(kind).to(tl.float32)
            second = (second * factor * w2).to(kind).to(tl.float32)
        if 2 * HALF < D:
            other = (
                other
                * factor
                * tl.load(weight + rest[None, :], mask=normed & rest_mask, other=1.0).to(tl.float32)
            )
    if HALF > 0:
        angle = cos_sin_ptr + position[:, None] * (2 * HALF) + half[None, :]
        turned = half_mask & ((head < HQ + HK) & inside)[:, None]
        cos = tl.load(angle, mask=turned, other=1.0)
        sin = tl.load(angle + HALF, mask=turned, other=0.0)
        rotated = first * cos - second * sin
        second = second * cos + first * sin
        first = rotated
    stored = (slot >= 0) & (is_k | is_v)
    page = (slot // BLOCK_SIZE) * (HK * BLOCK_SIZE * D) + (slot % BLOCK_SIZE) * D + kv_head * (BLOCK_SIZE * D)
    page = (page + tl.where(is_v, num_blocks.to(tl.int64) * (HK * BLOCK_SIZE * D), 0))[:, None]
    scale = tl.where(is_v, v_scale, k_scale)[:, None]
    kind = q_ptr.dtype.element_ty
    if HALF > 0:
        tl.store(source[:, None] + half[None, :], first.to(kind), mask=half_mask & is_q[:, None])
        tl.store(source[:, None] + (half + HALF)[None, :], second.to(kind), mask=half_mask & is_q[:, None])
        _store_page(kv_ptr, page + half[None, :], first, scale, half_mask & stored[:, None])
        _store_page(kv_ptr, page + (half + HALF)[None, :], second, scale, half_mask & stored[:, None])
    if 2 * HALF < D:
        if HAS_NORM:
            tl.store(source[:, None] + rest[None, :], other.to(kind), mask=rest_mask & is_q[:, None])
        _store_page(kv_ptr, page + rest[None, :], other, scale, rest_mask & stored[:, None])


_ROPE = Kernel(_rope_kernel)


def rope_and_cache_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
    k_scale: float,
    v_scale: float,
) -> None:
    """`kubeinfer.kernels.rope.rope_and_cache` on CUDA tensors."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if num_tokens == 0:
        return
    half = cos_sin.shape[1] // 2 if cos_sin is not None else 0
    if cos_sin is not None and cos_sin.dtype != torch.float32:
        raise TypeError(f"cos_sin must be float32, not {cos_sin.dtype}")
    if cos_sin is None and q_norm_weight is None:
        num_heads = 0  # nothing to do for q
    # Few tokens: spread the heads over programs; many: let each program move more.
    total = num_tokens * (num_heads + 2 * num_kv_heads)
    few = total <= 8192 or batch_invariant()
    rows, num_warps = (4, 1) if few else (16, 2) if head_dim > 64 else (32, 2)
    pdl = overlaps_launches()
    _ROPE.launch(
        (triton.cdiv(total, rows), 1, 1),
        (
            q, k, v, positions, cos_sin if cos_sin is not None else q, slot_mapping, kv_cache,
            q_norm_weight if q_norm_weight is not None else q, k_norm_weight if k_norm_weight is not None else q,
            num_tokens, kv_cache.shape[1], eps, k_scale, v_scale,
        ),
        (
            q.stride(0), k.stride(0), v.stride(0), num_heads, num_kv_heads, head_dim, half,
            max(2, triton.next_power_of_2(half)), max(2, triton.next_power_of_2(head_dim - 2 * half)),
            kv_cache.shape[3], rows, q_norm_weight is not None, pdl,
        ),
        num_warps,
        pdl=pdl,
    )  # fmt: skip
