"""Blocks of all layers gathered and scattered, against a plain loop."""

from __future__ import annotations

import pytest
import torch

from kubeinfer.kernels.block_copy import gather_blocks, layer_pointers, page_bytes, scatter_blocks


def caches(
    layers: int, heads: int, block_size: int, dim: int, dtype: torch.dtype, device: str
) -> list[torch.Tensor]:
    shape = (2, 23, heads, block_size, dim)
    return [torch.randn(shape).to(dtype).to(device) for _ in range(layers)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3, 2, 16, 64), (1, 1, 8, 16), (2, 5, 16, 80)])
def test_gather_and_scatter(device: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    kv = caches(*shape, dtype, device)
    before = [c.clone() for c in kv]
    pointers, blocks = layer_pointers(kv), torch.tensor([7, 22, 0, 9], dtype=torch.int32, device=device)
    out = torch.zeros(4, shape[0] * 2 * page_bytes(kv), dtype=torch.uint8, device=device)
    gather_blocks(kv, pointers, blocks, out)
    rows = out.view(dtype).view(4, shape[0], 2, *kv[0].shape[2:])
    for row, block in enumerate(blocks.tolist()):
        for layer, cache in enumerate(kv):
            expected = cache[:, block].float()
            assert torch.equal(rows[row, layer].float(), expected)
    targets = torch.tensor([1, 0, 21, 5], dtype=torch.int32, device=device)
    scatter_blocks(kv, pointers, targets, out)
    moved = dict(zip(targets.tolist(), blocks.tolist()))
    for cache, old in zip(kv, before):
        for block in range(23):
            assert torch.equal(cache[:, block].float(), old[:, moved.get(block, block)].float())
