"""Whole KV blocks of all layers, gathered into one contiguous buffer and scattered back."""

from __future__ import annotations

import torch
from torch import Tensor


def page_bytes(kv_caches: list[Tensor]) -> int:
    """Bytes of one block's keys (or values) in one layer."""
    shape = kv_caches[0].shape
    return shape[2] * shape[3] * shape[4] * kv_caches[0].element_size()


def layer_pointers(kv_caches: list[Tensor]) -> Tensor:
    """int64 ``[layers]`` on the caches' device: where each layer's cache begins, for the functions below."""
    return torch.tensor([c.data_ptr() for c in kv_caches], dtype=torch.int64).to(kv_caches[0].device)


def gather_blocks(kv_caches: list[Tensor], pointers: Tensor, blocks: Tensor, out: Tensor) -> None:
    """Copy ``blocks`` out of the caches.

    Args:
        kv_caches: a layer each, ``[2, num_blocks, Hk, block_size, D]``, all of one shape and dtype, contiguous.
        pointers: ``layer_pointers(kv_caches)``.
        blocks: int32 ``[n]``.
        out: uint8 ``[n, layers * 2 * page_bytes]``, contiguous; a row is ``[layer][key, value][Hk, block_size, D]``.
    """
    if out.is_cuda:
        from kubeinfer.kernels.triton_block_copy import copy_blocks_triton

        copy_blocks_triton(pointers, kv_caches[0].shape[1], page_bytes(kv_caches), blocks, out, gather=True)
        return
    gather_blocks_reference(kv_caches, blocks, out)


def scatter_blocks(kv_caches: list[Tensor], pointers: Tensor, blocks: Tensor, source: Tensor) -> None:
    """Copy ``source`` (as :func:`gather_blocks` leaves it) into ``blocks`` of the caches; no block stands twice."""
    if source.is_cuda:
        from kubeinfer.kernels.triton_block_copy import copy_blocks_triton

        copy_blocks_triton(
            pointers, kv_caches[0].shape[1], page_bytes(kv_caches), blocks, source, gather=False
        )
        return
    scatter_blocks_reference(kv_caches, blocks, source)


def gather_blocks_reference(kv_caches: list[Tensor], blocks: Tensor, out: Tensor) -> None:
    """`gather_blocks` in torch."""
    rows = out.view(len(blocks), len(kv_caches), 2, -1)
    index = blocks.long()
    for layer, cache in enumerate(kv_caches):
        pages = cache.view(torch.uint8).flatten(2)  # [2, num_blocks, page_bytes]
        rows[:, layer] = pages[:, index].transpose(0, 1)


def scatter_blocks_reference(kv_caches: list[Tensor], blocks: Tensor, source: Tensor) -> None:
    """`scatter_blocks` in torch."""
    rows = source.view(len(blocks), len(kv_caches), 2, -1)
    index = blocks.long()
    for layer, cache in enumerate(kv_caches):
        cache.view(torch.uint8).flatten(2)[:, index] = rows[:, layer].transpose(0, 1)
