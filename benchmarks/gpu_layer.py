"""Times a decoder layer of decode rows, as a model runs it, in 16 bits and in 4.

    PYTHONPATH=runtime python3 benchmarks/gpu_layer.py [--tokens 1,2,4,8,16,32] [--kinds bf16,int4]
    PYTHONPATH=runtime python3 benchmarks/gpu_layer.py --tune 1,8

Microseconds a layer of the 7B shape, in replayed graphs of several layers whose weights are several times the L2 cache. Kernels
of few tokens begin while the one before ends: what a product costs beside the others is not what it costs alone
(`gpu_linear.py`, `gpu_quantized.py`). Each token is the newest of a row with a context of 384.

``--tune`` chooses the 4-bit kernel of bulk copies for so many tokens by that: product by product, the configuration with which
the whole layer takes least time, each checked before. It prints the entries of the tuned table.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

from gpu_linear import Product
from gpu_quantized import int4_weights
from kubeinfer.kernels import int4, triton_int4
from kubeinfer.kernels.attention import decode_workspace, paged_attention, rope_and_decode
from kubeinfer.kernels.compile_ahead import compile_launches, noted_launches
from kubeinfer.kernels.fused_linear import add_linear_before_norm, gated_linear, norm_linear
from kubeinfer.kernels.int4 import Int4Weight
from kubeinfer.kernels.rope import rope_and_cache
from kubeinfer.kernels.triton_int4_bulk import Int4BulkConfig, fits

_HIDDEN, _QKV, _INNER = 3584, 4608, 18944
_HEADS, _KV_HEADS, _HEAD_DIM, _BLOCK_SIZE, _CONTEXT, _MOST_ROWS = 28, 4, 128, 16, 384, 32
_BLOCKS = _CONTEXT // _BLOCK_SIZE
_EPS = 1e-6


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def int4_weight(rows: int, k: int) -> Int4Weight:
    return int4_weights(Product("", rows, k), 1)[0]


class Layer:
    """Products as ``make(rows, k)`` makes them, the bias of the first, the norms before queries and before gates, and the cache."""

    def __init__(self, make: Callable[[int, int], Any]):
        self.qkv, self.bias = make(_QKV, _HIDDEN), random(_QKV)
        self.out = make(_HIDDEN, _HIDDEN)
        self.gate_up, self.down = make(2 * _INNER, _HIDDEN), make(_HIDDEN, _INNER)
        self.norm, self.mlp_norm = random(_HIDDEN) + 1, random(_HIDDEN) + 1
        self.cache = random(2, _MOST_ROWS * _BLOCKS, _KV_HEADS, _BLOCK_SIZE, _HEAD_DIM)


class Rows:
    """What a step tells every layer of so many decode rows."""

    def __init__(self, count: int):
        def ints(values: Tensor) -> Tensor:
            return values.int().to("cuda")

        self.table = ints(torch.randperm(_MOST_ROWS * _BLOCKS)[: count * _BLOCKS].view(count, _BLOCKS))
        self.seq_lens = ints(torch.full((count,), _CONTEXT))
        self.positions = self.seq_lens - 1
        self.slots = self.table[:, -1] * _BLOCK_SIZE + (_BLOCK_SIZE - 1)
        self.starts = ints(torch.arange(count + 1))
        self.cos_sin = torch.randn(_CONTEXT, _HEAD_DIM, device="cuda")
        self.workspace = decode_workspace(count, _HEADS, _KV_HEADS, _HEAD_DIM, "cuda")


rows_of = functools.cache(Rows)


def attend(projected: Tensor, cache: Tensor) -> Tensor:
    """``[T, (Hq + 2 Hkv) D]`` -> ``[T, Hq D]``."""
    step, scale = rows_of(len(projected)), _HEAD_DIM**-0.5
    q, k, v = projected.view(len(projected), -1, _HEAD_DIM).split((_HEADS, _KV_HEADS, _KV_HEADS), 1)
    out = torch.empty_like(q)
    rows = (q, k, v, step.positions, step.cos_sin, step.slots, cache)
    if not rope_and_decode(*rows, step.seq_lens, step.table, out, scale=scale, workspace=step.workspace):
        rope_and_cache(*rows)
        paged_attention(
            q, cache, step.starts, step.seq_lens, step.table, out, scale=scale, max_query_len=1, max_seq_len=_CONTEXT,
            workspace=step.workspace,
        )  # fmt: skip
    return out.view(len(projected), -1)


def run_bf16(layers: list[Layer], residual: Tensor) -> None:
    begun = None
    for layer, following in zip(layers, [*layers[1:], layers[0]], strict=True):
        x = norm_linear(residual, layer.norm, _EPS, layer.qkv, layer.bias, None, begun)
        x = attend(x, layer.cache)
        begun = add_linear_before_norm(residual, x, layer.out, None, None, layer.mlp_norm)
        y = gated_linear(residual, layer.gate_up, None, None, layer.mlp_norm, _EPS, begun)
        begun = add_linear_before_norm(residual, y, layer.down, None, None, following.norm)


def run_int4(layers: list[Layer], residual: Tensor) -> None:
    """As of an AWQ checkpoint with groups of 128."""
    begun = None
    for layer, following in zip(layers, [*layers[1:], layers[0]], strict=True):
        x = int4.int4_linear(residual, layer.qkv, layer.bias, layer.norm, _EPS, begun=begun)
        x = attend(x, layer.cache)
        begun = int4.int4_add_before_norm(residual, x, layer.out, None, layer.mlp_norm)
        y = int4.int4_linear(residual, layer.gate_up, None, layer.mlp_norm, _EPS, gated=True, begun=begun)
        begun = int4.int4_add_before_norm(residual, y, layer.down, None, following.norm)


# What makes a weight, what runs layers, and how many layers' weights are several times the L2 cache.
_KINDS: dict[str, tuple[Callable[[int, int], Any], Callable[[list[Layer], Tensor], None], int]] = {
    "bf16": (random, run_bf16, 6),
    "int4": (int4_weight, run_int4, 8),
}


# Tiles, warps, pieces of a warp in shared memory, chunks a piece, programs a multiprocessor, whether inputs are held.
_CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {
    "gated": (
        (2, 8, 4, 1, 1, 1), (2, 8, 4, 1, 2, 1), (2, 8, 3, 1, 1, 1), (2, 8, 3, 1, 2, 1), (2, 8, 2, 2, 1, 1), (2, 8, 2, 2, 2, 1),
        (2, 4, 6, 1, 3, 1), (2, 4, 5, 1, 4, 1), (2, 4, 4, 1, 4, 1), (2, 16, 2, 1, 2, 1), (2, 8, 3, 1, 1, 0),
    ),
    "down": (
        (2, 8, 7, 1, 0, 1), (2, 8, 8, 1, 0, 1), (2, 8, 6, 1, 0, 1), (2, 16, 3, 1, 0, 1), (2, 16, 4, 1, 0, 1), (2, 16, 3, 1, 0, 0),
        (2, 16, 4, 1, 0, 0), (1, 8, 6, 1, 0, 1), (1, 16, 4, 1, 0, 0), (2, 8, 6, 1, 0, 0),
    ),
    "others": (
        (2, 8, 1, 4, 0, 1), (2, 4, 1, 7, 0, 1), (1, 8, 1, 4, 0, 1), (1, 4, 1, 7, 0, 1), (1, 8, 2, 2, 0, 1), (1, 8, 1, 4, 0, 0),
        (1, 4, 7, 1, 0, 0),
    ),
}  # fmt: skip


def tune(tokens: int) -> dict[str, Int4BulkConfig]:
    """The table's entries of one token, or of up to eight."""
    layers = [Layer(int4_weight) for _ in range(8)]
    shapes = {
        "gated": (_INNER, _HIDDEN, "gated"), "down": (_HIDDEN, _INNER, "plain"), "qkv": (_QKV, _HIDDEN, "plain"),
        "out": (_HIDDEN, _HIDDEN, "plain"),
    }  # fmt: skip
    chosen: dict[tuple[int, int, str], Int4BulkConfig | None] = dict.fromkeys(shapes.values())
    triton_int4.find_bulk_config = lambda m, n, k, kind: chosen[n, k, kind]
    residual = torch.randn(tokens, _HIDDEN, device="cuda", dtype=torch.bfloat16)
    before = residual.clone()

    def layer_time() -> float:
        run = partial(run_int4, layers, residual)
        torch.cuda.synchronize()  # the graph is captured on another stream
        return 1e3 * float(do_bench_cudagraph(run, rep=20, return_mode="median")) / len(layers)

    def result() -> Tensor:
        residual.copy_(before)
        run_int4(layers[:2], residual)
        return residual.float() - before.float()

    def candidates(name: str) -> list[Int4BulkConfig]:
        n, k, kind = shapes[name]
        found = [Int4BulkConfig(*c) for c in _CANDIDATES.get(name, _CANDIDATES["others"])]
        return [c for c in found if fits(tokens, n, k, kind == "gated", c)]

    with noted_launches() as launches:
        for name, shape in shapes.items():
            for chosen[shape] in candidates(name):
                run_int4(layers[:2], residual)
            chosen[shape] = None
    compile_launches(launches, min(16, os.cpu_count() or 1), 90)
    exact, least = result(), layer_time()
    print(f"{tokens} tokens, weights read by threads: {least:.1f} us a layer", flush=True)
    for _ in range(2):  # what is best for a product depends on its neighbours
        for name, shape in shapes.items():
            best = chosen[shape]
            times = []
            for config in candidates(name):
                chosen[shape] = config
                results = [result() for _ in range(8)]
                error = max(float((r - exact).norm() / exact.norm()) for r in results)
                if error > 1e-2 or any(not torch.equal(r, results[0]) for r in results):
                    print(
                        f"WRONG: {name} {config}: error {error:.1e}, or other results each time", flush=True
                    )
                    continue
                times.append((layer_time(), config))
            times.sort(key=lambda pair: pair[0])
            print(
                f"{name}: " + ", ".join(f"{t:.1f} {tuple(asdict(c).values())}" for t, c in times), flush=True
            )
            if times and times[0][0] < least:
                least, best = times[0]
            chosen[shape] = best
    print(f"{tokens} tokens: {least:.1f} us a layer", flush=True)
    return {f"{kind}/{n}x{k}/m{tokens}/bulk": c for (n, k, kind), c in chosen.items() if c is not None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1,2,4,8,16,32")
    parser.add_argument("--kinds", default="bf16,int4")
    parser.add_argument("--tune", help="numbers of tokens: 1, or 8 for 2 to 8")
    args = parser.parse_args()
    if args.tune:
        for tokens in map(int, args.tune.split(",")):
            for key, config in tune(tokens).items():
                print(f"  {json.dumps(key)}: {json.dumps(asdict(config))},", flush=True)
        return
    for kind in args.kinds.split(","):
        make, run, count = _KINDS[kind]
        layers = [Layer(make) for _ in range(count)]
        for tokens in map(int, args.tokens.split(",")):
            residual = torch.randn(tokens, _HIDDEN, device="cuda", dtype=torch.bfloat16)
            torch.cuda.synchronize()
            times = do_bench_cudagraph(partial(run, layers, residual), rep=30, return_mode="median")
            print(f"{kind} {tokens:3} tokens {1e3 * times / count:7.1f} us a layer", flush=True)


if __name__ == "__main__":
    main()
