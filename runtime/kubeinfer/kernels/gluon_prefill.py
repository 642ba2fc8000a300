# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Prefill attention for Hopper in Gluon, after FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608).

Triton waits for each product before the next instruction that could overlap with it. Here a warp fetches tiles of keys and
values into a ring in shared memory, and two warpgroups of 64 rows each issue a tile's ``q @ k.T`` and the ``p @ v`` of the
tile before together: while the second runs, they turn the first's result into weights. (That the warpgroups take turns at issuing, as
there, was tried and is 2% slower here.)

Rows, their order and the search for a tile's sequence are those of `kubeinfer.kernels.triton_attention`, whose gathered
keys and values this reads. Step ``i`` of the ring holds the keys of tile ``i`` and the values of tile ``i - 1``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kubeinfer.kernels.triton_launch import Kernel

_BLOCK_M = 128
# A third of a multiprocessor's registers for each of three warpgroups: the consumers take what the producer gives up.
_REGISTERS = 168


@gluon.jit
def _fetch(k_rows, v_rows, ring, row, step, K: gl.constexpr, V: gl.constexpr):
    """Have the copy engine bring a step's keys and the values of the tile before to the step's place in the ring."""
    k, v, ready, free = ring
    STAGES: gl.constexpr = k.shape[0]
    BLOCK_N: gl.constexpr = k.shape[1]
    at = step % STAGES
    # The first round waits for the phase before a barrier's first, which counts as over.
    mbarrier.wait(free.index(at), (step // STAGES & 1) ^ 1)
    mbarrier.expect(ready.index(at), k_rows.block_type.nbytes * (K + V))
    if K:
        tma.async_copy_global_to_shared(k_rows, [row + step * BLOCK_N, 0], ready.index(at), k.index(at))
    if V:
        tma.async_copy_global_to_shared(v_rows, [row + (step - 1) * BLOCK_N, 0], ready.index(at), v.index(at))


@gluon.jit
def _produce(k_rows, v_rows, ring, row, tiles):
    if tiles > 0:
        _fetch(k_rows, v_rows, ring, row, 0, 1, 0)
        for step in range(1, tiles):
            _fetch(k_rows, v_rows, ring, row, step, 1, 1)
        _fetch(k_rows, v_rows, ring, row, tiles, 0, 1)


@gluon.jit
def _masked(s, positions, start):
    """Logits of keys that come after a row's position become minus infinity."""
    keys = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    return gl.where(keys[None, :] <= (positions - start)[:, None], s, float("-inf"))


@gluon.jit
def _softmax(s, m, total, qk_scale):
    """A tile's logits to weights; the running maximum and sum, and what sums over earlier tiles are to be multiplied by."""
    m_new = gl.maximum(m, gl.max(s, 1) * qk_scale)
    p = gl.exp2(s * qk_scale - m_new[:, None])
    alpha = gl.exp2(m - m_new)
    return p, m_new, total * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _as_operand(p, DTYPE: gl.constexpr):
    return gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, p.type.layout, 2), assert_trivial=True)


@gluon.jit
def _consume(
    q_ptr,
    out_ptr,
    q_buffers,
    ring,
    place,
    qk_scale,
    v_scale,
    STRIDE_Q: gl.constexpr,
    STRIDE_OUT: gl.constexpr,
    GROUP: gl.constexpr,
    PART: gl.constexpr,
):
    """The rows of one warpgroup: ``PART`` 0 or 1."""
    k, v, ready, free = ring
    head, query_begin, query_len, first_token, context, tiles = place
    DTYPE: gl.constexpr = k.dtype
    STAGES: gl.constexpr = k.shape[0]
    BLOCK_N: gl.constexpr = k.shape[1]
    D: gl.constexpr = k.shape[2]
    M: gl.constexpr = q_buffers.shape[1]
    BLOCK_Q: gl.constexpr = M * q_buffers.shape[0] // GROUP
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    # Other threads' rows than at the end: their addresses are not worth keeping in registers.
    LOADED: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    rows = M * PART + gl.arange(0, M, gl.SliceLayout(1, LOADED))
    dims = gl.arange(0, D, gl.SliceLayout(0, LOADED))
    token = first_token + rows // GROUP
    inside = (rows < BLOCK_Q * GROUP) & (token < query_len)
    offsets = (query_begin + token).to(gl.int64) * STRIDE_Q + (head * GROUP + rows % GROUP) * D
    q = q_buffers.index(PART)
    q.store(gl.load(q_ptr + offsets[:, None] + dims[None, :], mask=inside[:, None], other=0.0))
    fence_async_shared()

    first_position = context + first_token
    positions = first_position + (M * PART + gl.arange(0, M, gl.SliceLayout(1, S_LAYOUT))) // GROUP
    full = (first_position + M * PART // GROUP + 1) // BLOCK_N
    m = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    total = gl.zeros([M], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    acc = gl.zeros([M, D], gl.float32, O_LAYOUT)
    if tiles > 0:
        zeros = gl.zeros([M, BLOCK_N], gl.float32, S_LAYOUT)
        mbarrier.wait(ready.index(0), 0)
        s = warpgroup_mma(q, k.index(0).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(free.index(0))
        p, m, total, _ = _softmax(_masked(s, positions, 0), m, total, qk_scale)
        mbarrier.wait(ready.index(1 % STAGES), 1 // STAGES & 1)
        for step in range(1, tiles):
            at = step % STAGES
            s = warpgroup_mma(q, k.index(at).permute((1, 0)), zeros, use_acc=False, is_async=True)
            weights = _as_operand(p, DTYPE)
            acc = warpgroup_mma(weights, v.index(at), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            if step >= full:
                s = _masked(s, positions, step * BLOCK_N)
            p, m, total, alpha = _softmax(s, m, total, qk_scale)
            # A branch, past which the compiler does not move the softmax: it is to be done before the next wait.
            mbarrier.wait(ready.index((step + 1) % STAGES), (step + 1) // STAGES & 1)
            acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
            mbarrier.arrive(free.index(at))
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
        acc = warpgroup_mma(_as_operand(p, DTYPE), v.index(tiles % STAGES), acc)
    scale = v_scale / gl.where(total > 0, total, 1.0)
    q.store((acc * gl.convert_layout(scale, gl.SliceLayout(1, O_LAYOUT))[:, None]).to(DTYPE))
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    rows = M * PART + gl.arange(0, M, gl.SliceLayout(1, STORED))
    dims = gl.arange(0, D, gl.SliceLayout(0, STORED))
    token = first_token + rows // GROUP
    inside = (rows < BLOCK_Q * GROUP) & (token < query_len)
    offsets = (query_begin + token).to(gl.int64) * STRIDE_OUT + (head * GROUP + rows % GROUP) * D
    gl.store(out_ptr + offsets[:, None] + dims[None, :], q.load(STORED), mask=inside[:, None])


@gluon.jit(do_not_specialize=["rows_per_head", "first_seq", "num_seqs"])
def _gluon_prefill_kernel(
    q_ptr,
    k_rows,
    v_rows,
    row_starts_ptr,
    query_start_ptr,
    seq_lens_ptr,
    out_ptr,
    rows_per_head,
    first_seq,
    num_seqs,
    qk_scale,
    v_scale,
    STRIDE_Q: gl.constexpr,
    STRIDE_OUT: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    BLOCK_Q: gl.constexpr = BLOCK_M // GROUP
    head = gl.program_id(0)
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    base = gl.load(query_start_ptr + first_seq)
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        at = (gl.load(query_start_ptr + first_seq + middle) - base) // BLOCK_Q + middle
        if at <= tile:
            low = middle
        else:
            high = middle
    seq = first_seq + low
    query_begin = gl.load(query_start_ptr + seq)
    query_len = gl.load(query_start_ptr + seq + 1) - query_begin
    first_token = (tile - ((query_begin - base) // BLOCK_Q + low)) * BLOCK_Q
    if first_token >= query_len:
        return
    seq_len = gl.load(seq_lens_ptr + seq)
    tiles = gl.cdiv(gl.minimum(seq_len - query_len + first_token + BLOCK_Q, seq_len), BLOCK_N)
    row = head * rows_per_head + gl.load(row_starts_ptr + low)

    q = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M // 2, D], k_rows.layout)
    k = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], k_rows.layout)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], v_rows.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    ring = (k, v, ready, free)
    place = (head, query_begin, query_len, first_token, seq_len - query_len, tiles)
    gl.warp_specialize(
        [
            (_consume, (q_ptr, out_ptr, q, ring, place, qk_scale, v_scale, STRIDE_Q, STRIDE_OUT, GROUP, 0)),
            (_consume, (q_ptr, out_ptr, q, ring, place, qk_scale, v_scale, STRIDE_Q, STRIDE_OUT, GROUP, 1)),
            (_produce, (k_rows, v_rows, ring, row, tiles)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


_PREFILL = Kernel(_gluon_prefill_kernel)


class GluonConfig(NamedTuple):
    """``block_n``: keys of a tile. ``num_stages``: tiles of keys and of values in shared memory."""

    block_n: int
    num_stages: int


def prefill_gluon(
    q: Tensor,
    rows: Tensor,
    row_starts: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    qk_scale: float,
    v_scale: float,
    num_kv_heads: int,
    num_decodes: int,
    num_prefills: int,
    config: GluonConfig,
) -> None:
    """Causal attention of the sequences after the first ``num_decodes``.

    Args:
        q, query_start, seq_lens, out, num_decodes: as `kubeinfer.kernels.attention.paged_attention` takes them; head size
            128, fp16 or bf16, at most 128 query heads a KV head.
        rows: ``[2, Hk * rows_per_head, D]``, each head's keys and values, zeros after a sequence's end up to a multiple of
            128 rows.
        row_starts: int32 ``[num_prefills]``, where each sequence begins within a head's rows.
        qk_scale: factor on the logits, log2(e) included.
    """
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_rows, v_rows = (
        TensorDescriptor(x, list(x.shape), [head_dim, 1], [config.block_n, head_dim], layout) for x in rows
    )
    _PREFILL.launch(
        (num_kv_heads, num_tokens // (_BLOCK_M // group) + num_prefills, 1),
        (
            q, k_rows, v_rows, row_starts, query_start, seq_lens, out, rows.shape[1] // num_kv_heads, num_decodes,
            num_prefills, qk_scale, v_scale,
        ),
        (
            q.stride(0), out.stride(0), group, head_dim, _BLOCK_M, config.block_n, config.num_stages,
        ),
        num_warps=4,
        max_registers=_REGISTERS,
    )  # fmt: skip
