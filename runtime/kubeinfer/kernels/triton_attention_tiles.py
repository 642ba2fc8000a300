# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What the attention kernels share: the loop over tiles of keys for many query rows, and how a context is cut."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def capped(x, SOFT_CAP: tl.constexpr):
    # In units of log2: x = logits * log2(e). tanh through exp2, saturating on both sides.
    LOG2E: tl.constexpr = 1.4426950408889634
    z = x * (2.0 / SOFT_CAP)
    e = tl.exp2(tl.minimum(tl.maximum(z, -60.0), 60.0))
    return (SOFT_CAP * LOG2E) * (1.0 - 2.0 / (e + 1.0))


@triton.jit
def cut(keys, splits, BLOCK_N: tl.constexpr):
    """A context of ``keys`` over at most ``splits`` splits of whole tiles: keys a split, splits used."""
    tiles = tl.cdiv(keys, BLOCK_N)
    tiles_per_split = tl.maximum(tl.cdiv(tiles, splits), 1)
    return tiles_per_split * BLOCK_N, tl.cdiv(tiles, tiles_per_split)


@triton.jit
def joined(acc, total, m, part, lse):
    """A running result (its sum, how much that is divided by, in units of 2 to the power ``m``) and another's, normed with its
    log-sum-exp."""
    m_new = tl.maximum(m, lse)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    old, new = tl.exp2(m - shift), tl.exp2(lse - shift)
    return acc * old[:, None] + part * new[:, None], total * old + new, m_new


@triton.jit
def paged_rows(
    k_ptr, v_ptr, table, keys, inside, HK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Keys and values ``[BLOCK_N, D_PAD]`` of one KV head at the sequence's positions ``keys``; zeros where not ``inside``."""
    dims = tl.arange(0, D_PAD)
    page = tl.load(table + keys // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    offsets = (page * (HK * BLOCK_SIZE * D) + (keys % BLOCK_SIZE) * D)[:, None] + dims[None, :]
    mask = inside[:, None]
    if D != D_PAD:
        mask = mask & (dims < D)[None, :]
    return tl.load(k_ptr + offsets, mask=mask, other=0.0), tl.load(v_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def attend_keys(
    acc, total, m, q, k, v, keys, inside, seq_len, qk_scale, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of a sequence, at its positions ``keys`` where ``inside``, for query rows of its last position."""
    visible = inside
    if WINDOW > 0:
        visible = inside & (keys >= seq_len - WINDOW)
    s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * qk_scale
    if SOFT_CAP > 0:
        s = capped(s, SOFT_CAP)
    s = tl.where(visible[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    if WINDOW > 0:
        # The first tile of a window may hold no visible key at all.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        shift = m_new
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m - shift)
    total = total * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * alpha[:, None], input_precision=PRECISION)
    return acc, total, m_new


@triton.jit
def attend_tiles(
    acc,
    total,
    m,
    q,
    k_source,
    v_source,
    table,
    row_start,
    positions,
    begin,
    end,
    seq_len,
    qk_scale,
    HK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Sources are tensor descriptors (``TMA``, the sequence's rows begin at ``row_start``) or pointers."""
    dims = tl.arange(0, D_PAD)
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        keys = start + tl.arange(0, BLOCK_N)
        if TMA:
            k = k_source.load([row_start + start, 0])
            if D >= 128:  # the pipeline of wide heads wants both loads together, that of narrow ones does not
                v = v_source.load([row_start + start, 0])
        else:
            if MASKED:
                inside = keys < seq_len
                page = tl.load(table + keys // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            else:
                page = tl.load(table + keys // BLOCK_SIZE).to(tl.int64)
            offsets = (page * (HK * BLOCK_SIZE * D) + (keys % BLOCK_SIZE) * D)[:, None] + dims[None, :]
            if MASKED or D != D_PAD:
                mask = (dims < D)[None, :]
                if MASKED:
                    # Values past the end may be anything, NaN too: zero times them must be zero.
                    mask = mask & inside[:, None]
                k = tl.load(k_source + offsets, mask=mask, other=0.0)
                v = tl.load(v_source + offsets, mask=mask, other=0.0)
            else:
                k = tl.load(k_source + offsets)
                v = tl.load(v_source + offsets)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if SOFT_CAP > 0:
            s = capped(s * qk_scale, SOFT_CAP)
        if MASKED:
            visible = keys[None, :] <= positions[:, None]
            if WINDOW > 0:
                visible = visible & (keys[None, :] > positions[:, None] - WINDOW)
            s = tl.where(visible, s, float("-inf"))
        if SOFT_CAP > 0:
            m_new = tl.maximum(m, tl.max(s, 1))
        else:
            m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
        if MASKED and WINDOW > 0:
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        else:
            shift = m_new
        if SOFT_CAP > 0:
            p = tl.exp2(s - shift[:, None])
        else:
            p = tl.exp2(s * qk_scale - shift[:, None])
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.sum(p, 1)
        if TMA and D < 128:
            v = v_source.load([row_start + start, 0])
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return acc, total, m
