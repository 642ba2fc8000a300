"""The one-token linear layer against float64."""

from __future__ import annotations

import pytest
import torch

from kubeinfer.kernels.gemv import fits_gemv, gemv

TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("n", "k"), [(1, 64), (37, 896), (1152, 896), (896, 4864), (100, 3584), (64, 18944), (9, 1032)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemv(device: str, dtype: torch.dtype, n: int, k: int, with_bias: bool) -> None:
    x, weight = torch.randn(1, k).to(dtype), torch.randn(n, k).to(dtype)
    bias = (10 * torch.randn(n)).to(dtype) if with_bias else None
    want = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    on = [t.to(device) if t is not None else None for t in (x, weight, bias)]
    got = gemv(*on)  # type: ignore[arg-type]
    assert got.shape == (1, n)
    assert got.dtype == dtype
    assert (got.double().cpu() - want).norm() / want.norm() < TOLERANCE[dtype]
    out = torch.full((1, n), float("nan"), device=device)
    assert gemv(*on, out=out) is out  # type: ignore[arg-type]
    assert (out.double().cpu() - want).norm() / want.norm() < TOLERANCE[dtype]


def test_fits_gemv_on_a_gpu_only() -> None:
    assert not fits_gemv(torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16))
