"""Norms that one product begins and the next one ends, through a model's layers: here in torch, where GPUs have kernels for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.engine_client import generate, make, random_prompts
from fixtures.tiny_models import tiny_model
from kubeinfer.kernels import fused_linear
from kubeinfer.kernels.norm import NormBegun
from kubeinfer.layers.quantization import dense


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_each_product_ends_the_norm_that_the_one_before_began(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, prompts = str(tiny_model(name)), random_prompts(8, 12)
    client = make(path, "cpu", max_num_seqs=8)
    expected = generate(client, prompts, 12)
    client.shutdown()
    left: list[NormBegun] = []  # begun, and not ended yet
    ended = 0

    def add_linear_before_norm(
        residual: Tensor, x: Tensor, weight: Tensor, bias: Any, packed: Any, norm_weight: Tensor
    ) -> NormBegun:
        fused_linear.add_linear(residual, x, weight, bias, packed)
        squares = torch.stack([part.pow(2).sum(1) for part in residual.chunk(3, 1)])
        left.append(NormBegun(residual * norm_weight, squares))
        return left[-1]

    def normed(begun: NormBegun | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        nonlocal ended
        if begun is None:
            return residual * torch.rsqrt(residual.pow(2).mean(1, keepdim=True) + eps) * weight
        assert left.pop() is begun
        ended += 1
        mean = begun.squares.sum(0) / residual.shape[1]
        return begun.scaled * torch.rsqrt(mean + eps)[:, None]

    def norm_linear(
        x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Any = None, packed: Any = None, begun: Any = None
    ) -> Tensor:  # fmt: skip
        return fused_linear.linear(normed(begun, x, norm, eps), weight, bias, packed)

    def gated_linear(
        x: Tensor, weight: Tensor, bias: Any = None, packed: Any = None, norm: Any = None, eps: float = 0.0, begun: Any = None
    ) -> Tensor:  # fmt: skip
        x = x if norm is None else normed(begun, x, norm, eps)
        return fused_linear.gated_linear(x, weight, bias, packed)

    monkeypatch.setattr(dense, "adds_to_residual", lambda hidden: True)
    for function in (add_linear_before_norm, norm_linear, gated_linear):
        monkeypatch.setattr(dense, function.__name__, function)
    client = make(path, "cpu", max_num_seqs=8)
    assert generate(client, prompts, 12) == expected
    client.shutdown()
    assert ended > 100
    assert not left, "the last layer's product is followed by no norm of a product"
