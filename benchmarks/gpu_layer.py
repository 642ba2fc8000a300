"""Times a decoder layer's four products one after the other, as a model runs them, in 16 bits and in 4.

    PYTHONPATH=runtime python3 benchmarks/gpu_layer.py [--tokens 1,2,4,8,16,32] [--kinds bf16,int4]

Microseconds a layer of the 7B shape, in replayed graphs of several layers whose weights are several times the L2 cache. Kernels
of few tokens begin while the one before ends: what a product costs beside the others is not what it costs alone
(`gpu_linear.py`, `gpu_quantized.py`). Attention is left out: the output projection reads part of the projected queries.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

from kubeinfer.kernels import int4
from kubeinfer.kernels.fused_linear import add_linear_before_norm, gated_linear, norm_linear
from kubeinfer.kernels.int4 import Int4Weight

_LAYERS = {"bf16": 6, "int4": 8}
_HIDDEN, _QKV, _INNER = 3584, 4608, 18944
_EPS = 1e-6


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def bf16(count: int, tokens: int) -> Callable[[], object]:
    """``count`` layers with weights as they are."""
    layers = [
        (
            random(_QKV, _HIDDEN), random(_QKV), random(_HIDDEN, _HIDDEN), random(2 * _INNER, _HIDDEN),
            random(_HIDDEN, _INNER), random(_HIDDEN) + 1, random(_HIDDEN) + 1,
        )
        for _ in range(count)
    ]  # fmt: skip
    residual = torch.randn(tokens, _HIDDEN, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        begun = None
        for i, (qkv, bias, out, gate_up, down, first, second) in enumerate(layers):
            x = norm_linear(residual, first, _EPS, qkv, bias, None, begun)
            begun = add_linear_before_norm(residual, x[:, :_HIDDEN], out, None, None, second)
            y = gated_linear(residual, gate_up, None, None, second, _EPS, begun)
            following = layers[(i + 1) % count][5]
            begun = add_linear_before_norm(residual, y, down, None, None, following)

    return run


def int4_weight(rows: int, k: int) -> Int4Weight:
    blocks = (rows // int4.ROWS, k // int4.CHUNK)
    words = torch.randint(-(2**31), 2**31 - 1, (*blocks, 1, 16, 16), dtype=torch.int32, device="cuda")
    meta = int4.pack_meta(torch.tensor([0.003]), torch.tensor([7])).cuda()
    return Int4Weight(words, meta.expand(*blocks, int4.ROWS).contiguous(), rows, k, int4.CHUNK)


def four_bits(count: int, tokens: int) -> Callable[[], object]:
    """``count`` layers as of an AWQ checkpoint with groups of 128."""
    layers = [
        (
            int4_weight(_QKV, _HIDDEN), random(_QKV), int4_weight(_HIDDEN, _HIDDEN), int4_weight(2 * _INNER, _HIDDEN),
            int4_weight(_HIDDEN, _INNER), random(_HIDDEN) + 1, random(_HIDDEN) + 1,
        )
        for _ in range(count)
    ]  # fmt: skip
    residual = torch.randn(tokens, _HIDDEN, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        for qkv, bias, out, gate_up, down, first, second in layers:
            x = int4.int4_linear(residual, qkv, bias, first, _EPS)
            int4.int4_linear(x[:, :_HIDDEN], out, None, residual=residual)
            y = int4.int4_linear(residual, gate_up, None, second, _EPS, gated=True)
            int4.int4_linear(y, down, None, residual=residual)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1,2,4,8,16,32")
    parser.add_argument("--kinds", default="bf16,int4")
    args = parser.parse_args()
    makers = {"bf16": bf16, "int4": four_bits}
    for kind in args.kinds.split(","):
        for tokens in map(int, args.tokens.split(",")):
            run = makers[kind](_LAYERS[kind], tokens)
            times = do_bench_cudagraph(run, rep=30, return_mode="median")
            print(f"{kind} {tokens:3} tokens {1e3 * times / _LAYERS[kind]:7.1f} us a layer", flush=True)


if __name__ == "__main__":
    main()
