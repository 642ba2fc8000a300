# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Products whose inputs are split over programs: memory for their parts, and a Triton kernel that sums them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kubeinfer.kernels.triton_launch import Kernel, overlaps_launches

MAX_PROGRAMS = 4096  # of a launch that share sums of squares
MAX_TILES = 16384  # of a launch, that several programs finish
_SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where the programs of one launch leave parts for one another."""

    sums: Tensor  # fp32
    squares: Tensor  # fp32, of up to 64 tokens
    counters: Tensor  # int32, zero between launches
    meetings: Tensor  # int32, of pairs of programs, which go up


@functools.cache
def scratch(device: torch.device) -> Scratch:
    """Kernels of one stream use it one after the other: a kernel's programs end before the next kernel's begin to add."""
    return Scratch(
        torch.empty(_SCRATCH_BYTES // 4, dtype=torch.float32, device=device),
        torch.empty(MAX_PROGRAMS * 64, dtype=torch.float32, device=device),
        torch.zeros(MAX_TILES, dtype=torch.int32, device=device),
        torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device),
    )


@triton.jit(do_not_specialize=["size", "n"])
def _sum_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    size,
    n,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * size.to(tl.int64) + at, mask=at < size, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % n, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


_SUM = Kernel(_sum_kernel)


def sum_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``out = sum(parts) + bias``: parts fp32 ``[S, M, N]``, bias ``[N]``, out ``[M, N]``; always added in one order."""
    splits, m, n = parts.shape
    pdl = overlaps_launches()
    _SUM.launch(
        (triton.cdiv(m * n, 1024), 1, 1),
        (parts, bias if bias is not None else out, out, m * n, n),
        (splits, bias is not None, 1024, pdl),
        4,
        pdl=pdl,
    )
    return out
