#!/usr/bin/env python3
"""Tunes where cuBLAS's products of a few hundred tokens are cut in two: whole waves of tiles, then the rest.

    PYTHONPATH=runtime python3 benchmarks/gpu_split.py [--models 7B,0.5B] [--out split.json]

A product of M tokens and N outputs is so many tiles; where the last wave of them fills only part of the multiprocessors, the
others wait. Cut after the last full wave, the rest may take smaller tiles. Candidates are the cuts of usual tile sizes; each
is timed as a replayed CUDA graph over weights larger than the L2 cache. A cut is kept if it saves 3% or more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

TILES = ((128, 256), (256, 128), (192, 128), (128, 192), (128, 128), (64, 256), (256, 192), (192, 192))
TOKENS = (*range(160, 513, 32), *range(576, 1025, 64))
# outputs and inputs of qkv, gate_up and down
SHAPES = {
    "0.5B": ((1152, 896), (9728, 896), (896, 4864)),
    "7B": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
    "7B/2": ((2304, 3584), (18944, 3584), (3584, 9472)),
    "32B/2": ((3584, 5120), (27648, 5120), (5120, 13824)),
}


def cuts(m: int, n: int, processors: int) -> list[int]:
    """Numbers of outputs that fill whole waves."""
    found = set()
    for rows, columns in TILES:
        row_tiles = -(-m // rows)
        waves = n // columns * row_tiles // processors
        if waves:
            found.add(waves * processors // row_tiles * columns)
    return sorted(c for c in found if 0 < c < n and c % 64 == 0)


def product(x: Tensor, weight: Tensor, out: Tensor, cut: int) -> None:
    if not cut:
        torch.mm(x, weight.t(), out=out)
        return
    torch.mm(x, weight[:cut].t(), out=out[:, :cut])
    torch.mm(x, weight[cut:].t(), out=out[:, cut:])


def microseconds(x: Tensor, weights: list[Tensor], out: Tensor, cut: int) -> float:
    """Median time of one product in a replayed graph of one a weight."""
    product(x, weights[0], out, cut)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            product(x, weight, out, cut)
    times = []
    for i in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i > 1:
            times.append(begin.elapsed_time(end) * 1e3 / len(weights))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--budget", type=float, default=3600, help="seconds after which no further product is timed"
    )
    options = parser.parse_args()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    table: dict[str, dict[str, int]] = {}
    began = time.perf_counter()
    for model in options.models.split(","):
        for n, k in SHAPES[model]:
            count = max(2, min(24, (256 << 20) // (2 * n * k)))
            weights = [
                torch.empty(n, k, device="cuda", dtype=torch.bfloat16).normal_(0, k**-0.5)
                for _ in range(count)
            ]
            for m in TOKENS:
                if time.perf_counter() - began > options.budget:
                    break
                x = torch.empty(m, k, device="cuda", dtype=torch.bfloat16).normal_()
                out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
                whole = microseconds(x, weights, out, 0)
                best, cut = min(
                    ((microseconds(x, weights, out, c), c) for c in cuts(m, n, processors)),
                    default=(whole, 0),
                )
                again = microseconds(x, weights, out, 0)
                saved = 1 - best / min(whole, again)
                if saved >= 0.03:
                    table[f"split/{n}x{k}/m{m}"] = {"columns": cut}
                flops = 2e-6 * m * n * k
                print(
                    f"{model:6} {n}x{k} m{m:<5} whole {whole:8.2f} us {flops / whole:5.0f} TFLOP/s, "
                    f"cut at {cut:<6} {best:8.2f} us {flops / best:5.0f} TFLOP/s, saved {saved:6.1%}",
                    flush=True,
                )
            del weights
            if options.out is not None:
                options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
