# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment,misc"
"""Triton kernel of `kubeinfer.kernels.fused_linear` for many tokens: a product whose epilogue is the gated activation.

A program sums a tile of gates and the tile of ups that belongs to it, so that what goes to memory is half of what cuBLAS writes,
and no second kernel reads it back. As many programs as run at once go through the tiles (persistent); the copy engine (TMA) fetches
the operands and writes the result. Its bounds are the tensors', so that no size needs to be a multiple of a tile's: what is read
past the end is zero, what is written there is dropped.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from kubeinfer.kernels import tuned
from kubeinfer.kernels.fused_linear import MIN_MANY_ROWS
from kubeinfer.kernels.triton_launch import (
    Kernel,
    has_tensor_memory_accelerator,
    overlaps_launches,
    processors,
    shared_memory,
)


@triton.jit(do_not_specialize=["m"])
def _gated_kernel(
    x_rows,
    weight_rows,
    out_rows,
    bias_ptr,
    m,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    SERPENTINE: tl.constexpr,
    JOINT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    rows = tl.cdiv(m, BLOCK_M)
    for tile in tl.range(tl.program_id(0), rows * COLUMNS, PROGRAMS):
        # Tiles of GROUP rows and the same columns are neighbours in time: they share weights in the L2 cache.
        group = tile // (GROUP * COLUMNS)
        within = tile % (GROUP * COLUMNS)
        height = tl.minimum(rows - group * GROUP, GROUP)
        column = within // height
        if SERPENTINE:  # the next group begins with the weights that this one ended with
            column = tl.where(group % 2 == 0, column, COLUMNS - 1 - column)
        row = (group * GROUP + within % height) * BLOCK_M
        column *= BLOCK_N

        if JOINT:
            sums = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
            for k in tl.range(0, (K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
                x = x_rows.load([row, k * BLOCK_K])
                w = tl.reshape(weight_rows.load([0, column, k * BLOCK_K]), [2 * BLOCK_N, BLOCK_K])
                sums = tl.dot(x, tl.trans(w), sums)
            gate, up = tl.split(tl.permute(tl.reshape(sums, [BLOCK_M, 2, BLOCK_N]), [0, 2, 1]))
        else:
            gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k in tl.range(0, (K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
                x = x_rows.load([row, k * BLOCK_K])
                w_gate = tl.reshape(weight_rows.load([0, column, k * BLOCK_K]), [BLOCK_N, BLOCK_K])
                w_up = tl.reshape(weight_rows.load([1, column, k * BLOCK_K]), [BLOCK_N, BLOCK_K])
                gate = tl.dot(x, tl.trans(w_gate), gate)
                up = tl.dot(x, tl.trans(w_up), up)
        if HAS_BIAS:
            outputs = column + tl.arange(0, BLOCK_N)
            gate += tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + N + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
        result = gate / (1.0 + tl.exp(-gate)) * up
        # On its way while the next tile is summed: it has shared memory of its own.
        out_rows.store([row, column], result.to(bias_ptr.dtype.element_ty))


_GATED = Kernel(_gated_kernel)


@dataclass(frozen=True, slots=True)
class GatedMatmulConfig:
    """Tokens, outputs and inputs of a step, warps, steps in flight, and rows of tiles that share weights in the L2 cache.

    ``serpentine``: every other group of rows goes through the outputs backwards. ``joint``: gates and ups are one operand, so that
    the tensor cores read the tokens' numbers from shared memory once for both. ``per_processor``: programs a multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    stages: int
    group: int
    serpentine: bool = False
    joint: bool = False
    per_processor: int = 1

    @property
    def shared_bytes(self) -> int:
        """Of shared memory that a program takes: the steps in flight, what is written, and their barriers."""
        step = self.block_k * (self.block_m + 2 * self.block_n)
        return 2 * (self.stages * step + self.block_m * self.block_n) + 256


def find_gated_config(n: int, k: int, m: int) -> GatedMatmulConfig | None:
    """The configuration for ``n`` outputs of ``k`` inputs and ``m`` tokens; None where cuBLAS is as fast, nothing is known, or the
    GPU lacks the copy engine or the shared memory, or is of a later generation than the table (what multiplies is another unit
    there). Below MIN_MANY_ROWS the table knows multiples of 64 tokens, which is what captured steps of so many have."""
    return _find(n, k, MIN_MANY_ROWS if m >= MIN_MANY_ROWS else -(-m // 64) * 64)


@functools.cache
def _find(n: int, k: int, m: int) -> GatedMatmulConfig | None:
    if n % 8 or k % 8 or not has_tensor_memory_accelerator() or torch.cuda.get_device_capability()[0] != 9:
        return None
    found: Any = tuned.lookup("linear", f"gated_matmul/{n}x{k}" + (f"/m{m}" if m < MIN_MANY_ROWS else ""))
    if found is None:
        return None
    config = GatedMatmulConfig(**found)
    return config if config.shared_bytes <= shared_memory() else None


def gated_matmul_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, config: GatedMatmulConfig
) -> Tensor:
    """``out = silu(gate) * up`` of ``x @ weight.T + bias``, summed and gated in fp32; returns ``out``.

    Args:
        x: ``[T, K]`` of 16-bit numbers, T at least 1.
        weight: ``[2 N, K]`` in ``x``'s dtype, gates first; N and K multiples of 8.
        bias: ``[2 N]`` in ``x``'s dtype.
        out: ``[T, N]`` in ``x``'s dtype.

    Rows of all of them are contiguous and begin at multiples of 16 bytes.
    """
    m, k = x.shape
    n = out.shape[1]
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    programs = processors(x.device) * config.per_processor
    pdl = overlaps_launches()
    block = [2 if config.joint else 1, config.block_n, config.block_k]
    args = (
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [config.block_m, config.block_k]),
        TensorDescriptor(weight, [2, n, k], [n * weight.stride(0), weight.stride(0), 1], block),
        TensorDescriptor(out, [m, n], [out.stride(0), 1], [config.block_m, config.block_n]),
        bias if bias is not None else x, m,
    )  # fmt: skip
    constants = (
        n, k, bias is not None, config.block_m, config.block_n, config.block_k, config.stages, config.group,
        config.serpentine, config.joint, programs, pdl,
    )  # fmt: skip
    _GATED.launch((min(programs, tiles), 1, 1), args, constants, config.num_warps, config.stages, pdl=pdl)
    return out
