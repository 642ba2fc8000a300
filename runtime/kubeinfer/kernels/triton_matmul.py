# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""A matrix product whose rows do not depend on each other or on how many they are (see `kubeinfer.kernels.batch_invariance`).

One tile for a weight whatever the number of rows, each output summed by one program from the first column to the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kubeinfer.kernels.triton_launch import Kernel

_BLOCK_M = 64
_PROGRAMS = 132  # about as many as a large GPU has multiprocessors: fewer leave some idle when rows are few


@triton.jit(do_not_specialize=["m"])
def _matmul_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    m,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_W: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Programs of the same columns are neighbours: they find each other's weights in the L2 cache.
    blocks = tl.cdiv(m, BLOCK_M)
    column = tl.program_id(0) // blocks * BLOCK_N
    row = tl.program_id(0) % blocks * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    row_inside = (rows < m)[:, None]
    column_inside = (columns < N)[:, None]
    x_base = x_ptr + rows.to(tl.int64)[:, None] * STRIDE_X
    w_base = weight_ptr + columns.to(tl.int64)[:, None] * STRIDE_W
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        at = (start + lanes)[None, :]
        if K % BLOCK_K == 0:
            x = tl.load(x_base + at, mask=row_inside, other=0.0)
            w = tl.load(w_base + at, mask=column_inside, other=0.0)
        else:
            x = tl.load(x_base + at, mask=row_inside & (at < K), other=0.0)
            w = tl.load(w_base + at, mask=column_inside & (at < K), other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    target = out_ptr + rows.to(tl.int64)[:, None] * STRIDE_OUT + columns[None, :]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=row_inside & (columns < N)[None, :])


_MATMUL = Kernel(_matmul_kernel)


def tile(n: int, wide: bool) -> tuple[int, int, int, int]:
    """``BLOCK_N``, ``BLOCK_K``, warps and pipeline stages for a weight of ``n`` rows; ``wide``: fp32."""
    if wide:
        return 32, 32, 4, 2
    block_n = 128 if n >= 128 * _PROGRAMS else 64 if n >= 64 * _PROGRAMS else 32
    return block_n, 64, 4, 4


def matmul_triton(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``out = x [T, K] @ weight[N, K]^T + bias[N]``; last dimensions contiguous. Returns ``out [T, N]``."""
    rows, k = x.shape
    n = weight.shape[0]
    if rows == 0:
        return out
    wide = x.dtype == torch.float32
    block_n, block_k, num_warps, num_stages = tile(n, wide)
    _MATMUL.launch(
        (triton.cdiv(rows, _BLOCK_M) * triton.cdiv(n, block_n), 1, 1),
        (x, weight, bias if bias is not None else weight, out, rows),
        (
            n, k, x.stride(0), weight.stride(0), out.stride(0), _BLOCK_M, block_n, block_k, bias is not None,
            "ieee" if wide else "tf32",
        ),
        num_warps,
        num_stages,
    )  # fmt: skip
    return out
