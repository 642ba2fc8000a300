#!/usr/bin/env python3
"""Tunes gate and up projections of many tokens: cuBLAS and an activation kernel, or our product that has it in its epilogue.

    PYTHONPATH=runtime python3 benchmarks/gpu_gated.py [--models 7B,32B/2] [--tokens 1024,8192] [--out gated.json]

Each candidate is checked, then timed in turns of a third of a second without a pause: such products draw the power that a GPU
is allowed, its clock sinks, and what is fast in a short burst need not be. cuBLAS has the first turn and the last. Of many tokens
an entry is kept if one configuration saves time at every timed number; 1,152 are the worst for the 7B shape, as the last wave of
tiles is nearly empty. Of fewer than that each number has an entry of its own, if it saves 2%.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels.activation import silu_and_mul
from kubeinfer.kernels.compile_ahead import compile_launches, noted_launches
from kubeinfer.kernels.fused_linear import MIN_MANY_ROWS
from kubeinfer.kernels.linear import linear
from kubeinfer.kernels.triton_gated_matmul import GatedMatmulConfig, gated_matmul_triton

FEWER_TOKENS = (192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960)
TOKENS = (*FEWER_TOKENS, 1024, 1152, 2048, 4096, 8192, 16384)
# gated outputs and inputs
SHAPES = {
    "7B": (18944, 3584),
    "32B/2": (13824, 5120),
    "7B/2": (9472, 3584),
    "0.5B": (4864, 896),
    "Llama-8B": (14336, 4096),
    "Qwen3-8B": (12288, 4096),
}
_TURNS_BYTES = 384 << 20
_LEAST_SAVED = 0.01
_LEAST_SAVED_OF_FEWER = 0.02
_MOST_ERROR = 4e-3


def candidates(m: int) -> list[GatedMatmulConfig]:
    first = GatedMatmulConfig(128, 128, 64, 8, 4, 8)
    if m < MIN_MANY_ROWS:
        return [
            first,
            replace(first, joint=True),
            GatedMatmulConfig(128, 64, 64, 4, 3, 8, joint=True, per_processor=2),
        ]
    return [
        first,
        *(replace(first, joint=True, group=group) for group in (8, 4, 16, 32)),
        *(replace(first, joint=True, group=group, serpentine=True) for group in (8, 16)),
        *(GatedMatmulConfig(128, 64, 64, 4, 3, group, joint=True, per_processor=2) for group in (8, 16)),
    ]


def as_run(config: GatedMatmulConfig, m: int) -> GatedMatmulConfig:
    """What ``config`` comes to: with few rows of tiles some candidates are the same."""
    rows = -(-m // config.block_m)
    return replace(
        config, group=min(config.group, rows), serpentine=config.serpentine and rows > config.group
    )


def short(config: GatedMatmulConfig) -> str:
    size = f"{config.block_m}x{config.block_n}" if config.per_processor > 1 else ""
    return (
        f"{size}g{config.group}{' serpentine' if config.serpentine else ''}{' joint' if config.joint else ''}"
    )


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).normal_(0, scale)


def compile_all(n: int, k: int, configs: list[GatedMatmulConfig]) -> None:
    x, weight, out = random(256, k), random(2 * n, k), random(256, n)
    with noted_launches() as launches:
        for config in configs:
            gated_matmul_triton(x, weight, None, out, config)
    major, minor = torch.cuda.get_device_capability()
    compile_launches(launches, min(8, os.cpu_count() or 1), 10 * major + minor)


def wrong(n: int, k: int, config: GatedMatmulConfig) -> str | None:
    """Run ``config`` on numbers of tokens that fit no tile; what is wrong with it."""
    weight = random(2 * n, k, scale=k**-0.5)
    for m in (77, 1024 + 300):
        x, out = random(m, k), random(m, n)
        try:
            gated_matmul_triton(x, weight, None, out, config)
            gate, up = (x.float() @ weight.float().t()).chunk(2, 1)
        except Exception as exc:  # reported: one bad candidate must not end the run
            return f"{type(exc).__name__} {exc}"[:200]
        exact = F.silu(gate) * up
        error = float((out.float() - exact).norm() / exact.norm())
        if not error < _MOST_ERROR:
            return f"relative error {error:.2e} of {m} tokens"
    return None


def microseconds(run: Callable[[Tensor], object], weights: list[Tensor], seconds: float) -> float:
    """Mean time of a call in ``seconds`` of replays, one after the other, of a graph of one call a weight."""
    run(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)

    def replays(count: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    count = max(2, int(seconds * 1e6 / replays(2) * 2))
    return replays(count) / count / len(weights)


def right_ones(name: str, configs: list[GatedMatmulConfig]) -> list[GatedMatmulConfig]:
    """Those of ``configs`` that compute what they should for a shape; what is wrong with the others is printed."""
    n, k = SHAPES[name]
    compile_all(n, k, configs)
    right = []
    for config in configs:
        found = wrong(n, k, config)
        if found is None:
            right.append(config)
        else:
            print(f"{name} {short(config)}: {found}", flush=True)
    return right


def time_shape(name: str, tokens: list[int], seconds: float) -> dict[str, GatedMatmulConfig]:
    """Print the times of a shape; the table's entries for it."""
    n, k = SHAPES[name]
    right = right_ones(name, list(dict.fromkeys(c for m in tokens for c in candidates(m))))
    torch.cuda.empty_cache()
    weights = [random(2 * n, k, scale=k**-0.5) for _ in range(max(2, min(24, _TURNS_BYTES // (4 * n * k))))]
    many = [config for config in right if config in candidates(MIN_MANY_ROWS)]
    saved: dict[GatedMatmulConfig, list[float]] = {config: [] for config in many}
    entries: dict[str, GatedMatmulConfig] = {}
    for m in tokens:
        x, both, out = random(m, k), random(m, 2 * n), random(m, n)

        def parts(weight: Tensor, x: Tensor = x, both: Tensor = both, out: Tensor = out) -> None:
            silu_and_mul(linear(x, weight, None, None, both), out)

        def ours(config: GatedMatmulConfig, x: Tensor = x, out: Tensor = out) -> Callable[[Tensor], object]:
            return lambda weight: gated_matmul_triton(x, weight, None, out, config)

        first = microseconds(parts, weights, seconds)
        times: dict[GatedMatmulConfig, float] = {}
        for config in right:
            if config in candidates(m) and as_run(config, m) not in times:
                times[as_run(config, m)] = microseconds(ours(config), weights, seconds)
        last = microseconds(parts, weights, seconds)
        base = (first + last) / 2
        flops = 4e-6 * m * n * k
        print(
            f"{name:8} {n}x{k} m{m:<6} cuBLAS {first:7.1f} {last:7.1f} us ({flops / base:.0f} TFLOP/s)  "
            + "  ".join(
                f"{short(c)} {t:.1f} ({flops / t:.0f}, {1 - t / base:+.1%})" for c, t in times.items()
            ),
            flush=True,
        )
        if m >= MIN_MANY_ROWS:
            for config in many:
                saved[config].append(1 - times[as_run(config, m)] / base)
        else:
            config = min(times, key=lambda c: times[c])
            if times[config] < (1 - _LEAST_SAVED_OF_FEWER) * base:
                entries[f"gated_matmul/{n}x{k}/m{m}"] = config
        del both
    winners = [(sum(parts), config) for config, parts in saved.items() if min(parts, default=0) > 0]
    if winners:
        total, config = max(winners, key=lambda winner: winner[0])
        mean = total / len(saved[config])
        print(f"{name:8} best: {short(config)}, {mean:.1%} saved", flush=True)
        if mean >= _LEAST_SAVED:
            entries[f"gated_matmul/{n}x{k}"] = config
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="7B,32B/2", help=f"of: {', '.join(SHAPES)}")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn")
    parser.add_argument("--out", type=Path, help="where the entries for the tuned table go")
    options = parser.parse_args()
    tokens = [int(t) for t in options.tokens.split(",")]
    table = {}
    began = time.perf_counter()
    for name in options.models.split(","):
        table |= {key: asdict(config) for key, config in time_shape(name, tokens, options.seconds).items()}
        torch.cuda.empty_cache()
        print(f"{time.perf_counter() - began:.0f} s", flush=True)
    for key, entry in table.items():
        print(f"  {json.dumps(key)}: {json.dumps(entry)},")
    if options.out is not None:
        options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
