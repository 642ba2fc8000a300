"""Times a decoder layer's four products one after the other, as a model runs them, in 16 bits and in 4.

    PYTHONPATH=runtime python3 benchmarks/gpu_layer.py [--tokens 1,2,4,8,16,32] [--kinds bf16,int4]

Microseconds a layer of the 7B shape, in replayed graphs of several layers whose weights are several times the L2 cache. Kernels
of few tokens begin while the one before ends: what a product costs beside the others is not what it costs alone
(`gpu_linear.py`, `gpu_quantized.py`). Attention is left out: the output projection reads part of the projected queries.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

from gpu_linear import Product
from gpu_quantized import int4_weights
from kubeinfer.kernels import int4
from kubeinfer.kernels.fused_linear import add_linear_before_norm, gated_linear, norm_linear
from kubeinfer.kernels.int4 import Int4Weight

_HIDDEN, _QKV, _INNER = 3584, 4608, 18944
_EPS = 1e-6


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def int4_weight(rows: int, k: int) -> Int4Weight:
    return int4_weights(Product("", rows, k), 1)[0]


class Layer:
    """Products as ``make(rows, k)`` makes them, the bias of the first, and the norms before queries and before gates."""

    def __init__(self, make: Callable[[int, int], Any]):
        self.qkv, self.bias = make(_QKV, _HIDDEN), random(_QKV)
        self.out = make(_HIDDEN, _HIDDEN)
        self.gate_up, self.down = make(2 * _INNER, _HIDDEN), make(_HIDDEN, _INNER)
        self.norm, self.mlp_norm = random(_HIDDEN) + 1, random(_HIDDEN) + 1


def run_bf16(layers: list[Layer], residual: Tensor) -> None:
    begun = None
    for layer, following in zip(layers, [*layers[1:], layers[0]], strict=True):
        x = norm_linear(residual, layer.norm, _EPS, layer.qkv, layer.bias, None, begun)
        begun = add_linear_before_norm(residual, x[:, :_HIDDEN], layer.out, None, None, layer.mlp_norm)
        y = gated_linear(residual, layer.gate_up, None, None, layer.mlp_norm, _EPS, begun)
        begun = add_linear_before_norm(residual, y, layer.down, None, None, following.norm)


def run_int4(layers: list[Layer], residual: Tensor) -> None:
    """As of an AWQ checkpoint with groups of 128."""
    begun = None
    for layer, following in zip(layers, [*layers[1:], layers[0]], strict=True):
        x = int4.int4_linear(residual, layer.qkv, layer.bias, layer.norm, _EPS, begun=begun)
        begun = int4.int4_add_before_norm(residual, x[:, :_HIDDEN], layer.out, None, layer.mlp_norm)
        y = int4.int4_linear(residual, layer.gate_up, None, layer.mlp_norm, _EPS, gated=True, begun=begun)
        begun = int4.int4_add_before_norm(residual, y, layer.down, None, following.norm)


# What makes a weight, what runs layers, and how many layers' weights are several times the L2 cache.
_KINDS: dict[str, tuple[Callable[[int, int], Any], Callable[[list[Layer], Tensor], None], int]] = {
    "bf16": (random, run_bf16, 6),
    "int4": (int4_weight, run_int4, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1,2,4,8,16,32")
    parser.add_argument("--kinds", default="bf16,int4")
    args = parser.parse_args()
    for kind in args.kinds.split(","):
        make, run, count = _KINDS[kind]
        layers = [Layer(make) for _ in range(count)]
        for tokens in map(int, args.tokens.split(",")):
            residual = torch.randn(tokens, _HIDDEN, device="cuda", dtype=torch.bfloat16)
            times = do_bench_cudagraph(partial(run, layers, residual), rep=30, return_mode="median")
            print(f"{kind} {tokens:3} tokens {1e3 * times / count:7.1f} us a layer", flush=True)


if __name__ == "__main__":
    main()
