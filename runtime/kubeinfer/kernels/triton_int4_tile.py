# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc,var-annotated"
"""How the kernels of `kubeinfer.kernels.int4` for few tokens end: from the threads' sums to outputs.

A thread's place in its warp is ``4 g + t``: it has sums of rows ``g`` and ``g + 8`` of a tile for the tokens ``2 t`` and ``2 t + 1``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kubeinfer.kernels.triton_mma import sum_of_warps


@triton.jit
def norm_factors(even, odd, eps, K: tl.constexpr, WARPS: tl.constexpr):
    """RMSNorm's factors of a thread's two tokens from the warps' sums of their squares."""
    both = sum_of_warps((even, odd), WARPS)
    return tl.rsqrt(both[0] / K + eps), tl.rsqrt(both[1] / K + eps)


@triton.jit
def store_tiles(
    sums, factors, bias_ptr, out_ptr, m, n, FIRST: tl.constexpr, STRIDE_OUT: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Outputs of a program's OWN tiles and the eight tokens from FIRST; ``sums`` are four tensors ``[32]`` a tile."""
    lanes = tl.arange(0, 32)
    for r in tl.static_range(OWN):
        for e in tl.static_range(4):
            row = (tl.program_id(0) * OWN + r) * 16 + e // 2 * 8 + lanes // 4
            token = FIRST + lanes % 4 * 2 + e % 2
            inside = (row < n) & (token < m)
            result = sums[r * 4 + e]
            if NORM:
                result *= factors[e % 2]
            if HAS_BIAS:
                result += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)
            if GATED:
                up = sums[(OWN + r) * 4 + e]
                if NORM:
                    up *= factors[e % 2]
                if HAS_BIAS:
                    up += tl.load(bias_ptr + n + row, mask=row < n, other=0.0).to(tl.float32)
                result = result / (1.0 + tl.exp(-result)) * up
            target = out_ptr + token.to(tl.int64) * STRIDE_OUT + row
            if ADD:
                result += tl.load(target, mask=inside, other=0.0).to(tl.float32)
            tl.store(target, result.to(out_ptr.dtype.element_ty), mask=inside)
