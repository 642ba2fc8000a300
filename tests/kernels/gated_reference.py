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


class Given:
    """Operands in corners of larger tensors, and the corner that the result goes to."""

    def __init__(self, device: str, m: int, n: int, k: int, dtype: torch.dtype, with_bias: bool):
        self.x = part_of(m, k, 1.0, dtype).to(device)[:m, :k]
        self.weight = part_of(2 * n, k, 1.5 * k**-0.5, dtype).to(device)[: 2 * n, :k]
        self.bias = torch.randn(2 * n).to(dtype).to(device) if with_bias else None
        self._whole = part_of(m, n, 1.0, dtype, 7.0).to(device)
        self.out = self._whole[:m, :n]

    def check(self, exact: Tensor) -> None:
        """``out`` is close to ``exact``, and nothing was written outside of it."""
        (m, n), dtype, out = self.out.shape, self.out.dtype, self.out.double().cpu()
        assert (out - exact).norm() / exact.norm() < TOLERANCE[dtype]
        # Each row and each column: a wrong edge would hardly show in the whole.
        for dim in (0, 1):
            error = (out - exact).norm(dim=dim) / (exact.norm(dim=dim) + 0.05)
            assert error.max() < 5 * TOLERANCE[dtype]
        assert (self._whole[m:] == 7.0).all()
        assert (self._whole[:, n:] == 7.0).all()
