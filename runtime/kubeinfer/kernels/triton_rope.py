# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernel of `kubeinfer.kernels.rope`: one program a token and a few heads of q, k or v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.triton_launch import overlaps_launches


@triton.jit
def _store_page(ptr, offsets, x, factor, mask):
    if ptr.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x / factor, -448.0), 448.0)
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_blocks"])
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
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Columns of a head: two rotated halves ``[0, HALF)``, ``[HALF, 2 HALF)`` and the unrotated rest."""
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    Q_PARTS: tl.constexpr = (HQ + HEADS - 1) // HEADS
    K_PARTS: tl.constexpr = (HK + HEADS - 1) // HEADS
    half = tl.arange(0, HALF_PAD)
    rest = 2 * HALF + tl.arange(0, REST_PAD)
    heads = tl.arange(0, HEADS)
    is_q = part < Q_PARTS
    is_v = part >= Q_PARTS + K_PARTS
    if is_q:
        heads += part * HEADS
        source = q_ptr + t * STRIDE_Q
        inside = heads < HQ
    else:
        heads += (part - Q_PARTS - (K_PARTS if is_v else 0)) * HEADS
        inside = heads < HK
        if is_v:
            source = v_ptr + t * STRIDE_V
        else:
            source = k_ptr + t * STRIDE_K
    slot = tl.load(slots_ptr + t).to(tl.int64)
    half_mask = inside[:, None] & (half < HALF)[None, :]
    rest_mask = inside[:, None] & (rest < D)[None, :]
    first_at = heads[:, None] * D + half[None, :]
    rest_at = heads[:, None] * D + rest[None, :]
    if HALF > 0:
        first = tl.load(source + first_at, mask=half_mask, other=0.0).to(tl.float32)
        second = tl.load(source + first_at + HALF, mask=half_mask, other=0.0).to(tl.float32)
    else:
        first = tl.zeros([HEADS, HALF_PAD], tl.float32)
        second = first
    if 2 * HALF < D:
        other = tl.load(source + rest_at, mask=rest_mask, other=0.0).to(tl.float32)
    else:
        other = tl.zeros([HEADS, REST_PAD], tl.float32)
    if not is_v:
        if HAS_NORM:
            weight_ptr = k_weight_ptr
            if is_q:
                weight_ptr = q_weight_ptr
            square = tl.sum(first * first + second * second, 1) + tl.sum(other * other, 1)
            factor = tl.rsqrt(square / D + eps)[:, None]
            # Rounded as separate operations would have rounded it.
            kind = q_ptr.dtype.element_ty
            if HALF > 0:
                w1 = tl.load(weight_ptr + half, mask=half < HALF, other=0.0).to(tl.float32)
                w2 = tl.load(weight_ptr + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
                first = (first * factor * w1[None, :]).to(kind).to(tl.float32)
                second = (second * factor * w2[None, :]).to(kind).to(tl.float32)
            if 2 * HALF < D:
                w3 = tl.load(weight_ptr + rest, mask=rest < D, other=0.0).to(tl.float32)
                other = other * factor * w3[None, :]
        if HALF > 0:
            position = tl.load(positions_ptr + t).to(tl.int64)
            row = cos_sin_ptr + position * (2 * HALF)
            cos = tl.load(row + half, mask=half < HALF, other=0.0)[None, :]
            sin = tl.load(row + HALF + half, mask=half < HALF, other=0.0)[None, :]
            rotated = first * cos - second * sin
            second = second * cos + first * sin
            first = rotated
    if is_q:
        target = q_ptr + t * STRIDE_Q
        if HALF > 0:
            tl.store(target + first_at, first.to(q_ptr.dtype.element_ty), mask=half_mask)
            tl.store(target + first_at + HALF, second.to(q_ptr.dtype.element_ty), mask=half_mask)
        if HAS_NORM and 2 * HALF < D:
            tl.store(target + rest_at, other.to(q_ptr.dtype.element_ty), mask=rest_mask)
    elif slot >= 0:
        page = (slot // BLOCK_SIZE) * (HK * BLOCK_SIZE * D) + (slot % BLOCK_SIZE) * D
        scale = k_scale
        if is_v:
            page += num_blocks.to(tl.int64) * (HK * BLOCK_SIZE * D)
            scale = v_scale
        to = page + heads[:, None] * (BLOCK_SIZE * D)
        if HALF > 0:
            _store_page(kv_ptr, to + half[None, :], first, scale, half_mask)
            _store_page(kv_ptr, to + (half + HALF)[None, :], second, scale, half_mask)
        if 2 * HALF < D:
            _store_page(kv_ptr, to + rest[None, :], other, scale, rest_mask)


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
    # Few tokens: spread the heads over programs; many: let each program move more.
    heads = 4 if num_tokens <= 256 else 8
    parts = -(-num_heads // heads) + 2 * -(-num_kv_heads // heads)
    if cos_sin is None and q_norm_weight is None:
        # Nothing to do for q: no heads of it in the grid.
        parts, num_heads = 2 * -(-num_kv_heads // heads), 0
    pdl = overlaps_launches()
    _rope_kernel[(num_tokens, parts)](
        q, k, v, positions, cos_sin if cos_sin is not None else q, slot_mapping, kv_cache,
        q_norm_weight if q_norm_weight is not None else q, k_norm_weight if k_norm_weight is not None else q,
        kv_cache.shape[1], eps, k_scale, v_scale, STRIDE_Q=q.stride(0), STRIDE_K=k.stride(0), STRIDE_V=v.stride(0),
        HQ=num_heads, HK=num_kv_heads, D=head_dim, HALF=half, HALF_PAD=max(2, triton.next_power_of_2(half)),
        REST_PAD=max(2, triton.next_power_of_2(head_dim - 2 * half)), BLOCK_SIZE=kv_cache.shape[3], HEADS=heads,
        HAS_NORM=q_norm_weight is not None, PDL=pdl, num_warps=2, launch_pdl=pdl,
    )  # fmt: skip
