"""Rotary embedding, q/k norm and cache write against plain float64 formulas."""

from __future__ import annotations

import random

import pytest
import torch
from references import cos_sin_table
from torch import Tensor

from kubeinfer.kernels.rope import rope_and_cache

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def rotate(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    half = cos_sin.shape[1] // 2
    row = cos_sin.double()[positions.long()]
    pair = (
        torch.complex(x[..., :half], x[..., half : 2 * half])
        * torch.complex(row[:, :half], row[:, half:])[:, None]
    )
    return torch.cat((pair.real, pair.imag, x[..., 2 * half :]), -1)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "rotary"), [(64, 64), (128, 128), (80, 80), (80, 32), (96, 96), (256, 256), (64, 0)]
)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_rope_and_cache(
    device: str, dtype: torch.dtype, head_dim: int, rotary: int, normed: bool, fused: bool, fp8: bool
) -> None:
    torch.manual_seed(random.randrange(1 << 30))
    heads, kinds = random.choice([(4, 4), (14, 2), (9, 3)]), random.choices([torch.int32, torch.int64], k=2)
    for tokens in (1, 33):
        check(device, dtype, head_dim, rotary, normed, fused, fp8, tokens, heads, kinds)


def check(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    rotary: int,
    normed: bool,
    fused: bool,
    fp8: bool,
    tokens: int,
    heads: tuple[int, int],
    kinds: list[torch.dtype],
) -> None:
    hq, hk = heads
    block_size, num_blocks = 16, 9
    qkv = torch.randn(tokens, (hq + 2 * hk) * head_dim).to(dtype)
    positions = torch.randint(0, 300, (tokens,), dtype=kinds[0])
    slots = torch.randperm(num_blocks * block_size)[:tokens].to(kinds[1])
    slots[torch.rand(tokens) < 0.2] = -1
    k_scale, v_scale = (0.25, 0.5) if fp8 else (1.0, 1.0)
    cache = torch.full((2, num_blocks, hk, block_size, head_dim), 7.0).to(
        torch.float8_e4m3fn if fp8 else dtype
    )
    cos_sin = cos_sin_table(300, rotary) if rotary else None
    weights = [1 + 0.1 * torch.randn(head_dim).to(dtype) for _ in range(2)] if normed else [None, None]

    on_device = qkv.to(device, copy=True)
    q, k, v = on_device.split([hq * head_dim, hk * head_dim, hk * head_dim], 1)
    if not fused:
        q, k, v = q.clone(), k.clone(), v.clone()
    q, k, v = q.unflatten(1, (hq, head_dim)), k.unflatten(1, (hk, head_dim)), v.unflatten(1, (hk, head_dim))
    written = cache.to(device, copy=True)
    rope_and_cache(
        q,
        k,
        v,
        positions.to(device),
        cos_sin.to(device) if cos_sin is not None else None,
        slots.to(device),
        written,
        q_norm_weight=weights[0].to(device) if weights[0] is not None else None,
        k_norm_weight=weights[1].to(device) if weights[1] is not None else None,
        eps=1e-5,
        k_scale=k_scale,
        v_scale=v_scale,
    )

    parts = qkv.double().split([hq * head_dim, hk * head_dim, hk * head_dim], 1)
    want_q, want_k, want_v = (x.unflatten(1, (-1, head_dim)) for x in parts)
    if weights[0] is not None and weights[1] is not None:
        want_q, want_k = norm(want_q, weights[0], 1e-5), norm(want_k, weights[1], 1e-5)
    if cos_sin is not None:
        want_q, want_k = rotate(want_q, positions, cos_sin), rotate(want_k, positions, cos_sin)
    assert (q.double().cpu() - want_q).norm() / want_q.norm() < TOLERANCE[dtype]
    want = cache.double()
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want[0, slot // block_size, :, slot % block_size] = want_k[t] / k_scale
            want[1, slot // block_size, :, slot % block_size] = want_v[t] / v_scale
    got = written.float().double().cpu()
    limit = 0.04 if fp8 else TOLERANCE[dtype]
    assert (got - want).norm() / want.norm() < limit
    untouched = want == 7.0
    assert torch.equal(got[untouched], want[untouched])
