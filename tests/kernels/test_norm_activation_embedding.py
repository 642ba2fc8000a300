"""RMSNorm, SiLU * up and the embedding gather against float64."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from kubeinfer.kernels.activation import silu_and_mul
from kubeinfer.kernels.embedding import vocab_parallel_embedding
from kubeinfer.kernels.norm import fused_add_rms_norm, layer_norm, rms_norm

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 896), (700, 576), (5, 3584), (600, 2048), (2, 3, 8192)])
def test_rms_norm(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(random.randrange(1 << 30))
    x, residual = torch.randn(shape).to(dtype), 3 * torch.randn(shape).to(dtype)
    weight = 1 + 0.1 * torch.randn(shape[-1]).to(dtype)

    def want(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.double()
        return rows / (rows.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    on = x.to(device)
    assert error(rms_norm(on, weight.to(device), 1e-5), want(x)) < TOLERANCE[dtype]
    out = torch.full_like(on, float("nan"))
    assert rms_norm(on, weight.to(device), 1e-5, out) is out
    assert error(out, want(x)) < TOLERANCE[dtype]

    total = x + residual
    kept = residual.to(device, copy=True)
    normed, same = fused_add_rms_norm(on, kept, weight.to(device), 1e-5)
    assert same is kept
    torch.testing.assert_close(kept.cpu(), total, rtol=0, atol=0)
    assert error(normed, want(total)) < TOLERANCE[dtype]
    on = x.to(device, copy=True)
    in_place, _ = fused_add_rms_norm(on, residual.to(device, copy=True), weight.to(device), 1e-5, out=on)
    assert in_place is on
    assert error(on, want(total)) < TOLERANCE[dtype]


def test_strided_rows(device: str) -> None:
    wide = torch.randn(9, 300)
    view = wide.to(device)[:, 100:228]
    weight = torch.ones(128, device=device)
    assert error(rms_norm(view, weight, 1e-6), F.rms_norm(wide[:, 100:228].double(), (128,), eps=1e-6)) < 1e-6
    gate, up = wide[:, :256].double().chunk(2, 1)
    assert error(silu_and_mul(wide.to(device)[:, :256]), F.silu(gate) * up) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 4864), (130, 1000), (2, 3, 18944)])
def test_gated_activations(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(random.randrange(1 << 30))
    x = (3 * torch.randn(*shape[:-1], 2 * shape[-1])).to(dtype)
    gate, up = x.double().chunk(2, -1)
    assert error(silu_and_mul(x.to(device)), F.silu(gate) * up) < TOLERANCE[dtype]
    out = torch.full(shape, float("nan"), dtype=dtype, device=device)
    assert silu_and_mul(x.to(device), out) is out
    assert error(out, F.silu(gate) * up) < TOLERANCE[dtype]


def test_layer_norm(device: str) -> None:
    x, weight, bias = torch.randn(4, 96), torch.randn(96), torch.randn(96)
    got = layer_norm(x.to(device), weight.to(device), bias.to(device), 1e-5)
    wide = x.double()
    want = (wide - wide.mean(1, keepdim=True)) / (wide.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert error(got, want * weight.double() + bias.double()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 896, 3584])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_embedding_shards_sum_to_the_whole(
    device: str, dtype: torch.dtype, width: int, ids_dtype: torch.dtype
) -> None:
    vocab, shards = 103, 4
    weight = torch.randn(vocab, width).to(dtype)
    ids = torch.randint(0, vocab, (50,))
    whole = vocab_parallel_embedding(ids.to(device, ids_dtype), weight.to(device))
    assert torch.equal(whole.cpu(), weight[ids])
    size = -(-vocab // shards)
    total = torch.zeros_like(whole)
    for start in range(0, vocab, size):
        end = min(start + size, vocab)
        shard = torch.full((size, width), float("nan"), dtype=dtype)
        shard[: end - start] = weight[start:end]
        part = vocab_parallel_embedding(ids.to(device, ids_dtype), shard.to(device), start, end)
        outside = (ids < start) | (ids >= end)
        assert not part[outside.to(device)].any()
        total += part
    assert torch.equal(total, whole)
