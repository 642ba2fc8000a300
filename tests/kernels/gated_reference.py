"""What tests of our gated products on Hopper share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 6e-3}
EPS = 1e-6


def on_hopper(device: str) -> None:
    if device != "cuda":
        pytest.skip("about the kernel for GPUs")
    from kubeinfer.kernels.triton_launch import runs_gluon

    if not runs_gluon():
        pytest.skip("about Hopper GPUs")


def part_of(
    rows: int, columns: int, scale: float, dtype: torch.dtype, outside: float = float("nan")
) -> Tensor:
    """Random numbers in the corner of a larger tensor whose other numbers must not be seen."""
    whole = torch.full((rows + 3, columns + 24), outside, dtype=dtype)
    whole[:rows, :columns] = (torch.randn(rows, columns) * scale).to(dtype)
    return whole


def want(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double().cpu() @ weight.double().cpu().T
    gate, up = (y if bias is None else y + bias.double().cpu()).chunk(2, 1)
    return F.silu(gate) * up
