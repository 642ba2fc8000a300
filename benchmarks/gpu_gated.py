#!/usr/bin/env python3
"""Tunes gate and up projections of many tokens: cuBLAS and an activation kernel, or our product that has it in its epilogue.

    PYTHONPATH=runtime python3 benchmarks/gpu_gated.py [--models 7B,32B/2] [--tokens 1024,8192] [--out gated.json]

Each candidate is checked, then all are timed in turns of a tenth of a second without a pause, several rounds of them: such products
draw the power that a GPU is allowed, its clock rises and sinks by a tenth from turn to turn, and what is fast in a short burst need
not be. The medians count. Of fewer tokens an entry is kept if our product saves 2%; of many, which have one entry for all their numbers,
if it saves 1% in the mean and loses 2% nowhere. From 8,192 tokens on programs are paired if that saves more at every timed number.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels.activation import silu_and_mul
from kubeinfer.kernels.compile_ahead import compile_launches, noted_launches
from kubeinfer.kernels.fused_linear import MIN_MANY_ROWS, GatedForm
from kubeinfer.kernels.gluon_gated_matmul import gated_matmul_gluon
from kubeinfer.kernels.linear import linear

FEWER_TOKENS = (256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960)
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
FORMS = tuple(GatedForm(group, paired) for paired in (False, True) for group in (8, 16))
FORMS_OF_FEWER = FORMS[1::2]  # few rows of tiles are one group of either
_ROUNDS = 5
_TURNS_BYTES = 384 << 20
_LEAST_SAVED = 0.01
_LEAST_SAVED_OF_FEWER = 0.02
_LEAST_PAIRED = 8192  # from so many tokens on a pair of which one has no tokens costs little
_MOST_ERROR = 4e-3


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).normal_(0, scale)


def compile_all(n: int, k: int) -> None:
    x, weight, out = random(256, k), random(2 * n, k), random(256, n)
    with noted_launches() as launches:
        for form in FORMS:
            gated_matmul_gluon(x, weight, None, out, form)
    major, minor = torch.cuda.get_device_capability()
    compile_launches(launches, min(8, os.cpu_count() or 1), 10 * major + minor)


def check(n: int, k: int, form: GatedForm) -> None:
    """Run our product on numbers of tokens that fit no tile, and of which a last wave is cut; raise if it is wrong."""
    weight = random(2 * n, k, scale=k**-0.5)
    for m in (77, 300, 512, 1024 + 300):
        x, out = random(m, k), torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
        gated_matmul_gluon(x, weight, None, out, form)
        gate, up = (x.float() @ weight.float().t()).chunk(2, 1)
        exact = F.silu(gate) * up
        error = float((out.float() - exact).norm() / exact.norm())
        if not error < _MOST_ERROR:
            raise RuntimeError(f"{n}x{k} of {m} tokens, {form}: relative error {error:.2e}")


def replays(run: Callable[[Tensor], object], weights: list[Tensor], seconds: float) -> Callable[[], float]:
    """A turn of ``seconds``: replays, one after the other, of a graph of one call a weight; it gives microseconds a call."""
    run(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)

    def turn(count: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / count

    count = max(2, int(seconds * 1e6 / turn(2)))
    return lambda: turn(count) / len(weights)


def time_tokens(name: str, m: int, weights: list[Tensor], seconds: float) -> dict[GatedForm, float]:
    """What each form saves of cuBLAS's and the activation's time for ``m`` tokens: a share of it."""
    forms = FORMS if m >= MIN_MANY_ROWS else FORMS_OF_FEWER
    n, k = weights[0].shape[0] // 2, weights[0].shape[1]
    x, both, out = random(m, k), random(m, 2 * n), random(m, n)
    turns = {
        None: replays(lambda w: silu_and_mul(linear(x, w, None, None, both), out), weights, seconds),
        **{
            form: replays(lambda w, form=form: gated_matmul_gluon(x, w, None, out, form), weights, seconds)
            for form in forms
        },
    }
    found: dict[GatedForm | None, list[float]] = {form: [] for form in turns}
    for _ in range(_ROUNDS):
        for form, turn in turns.items():
            found[form].append(turn())
    medians = {form: statistics.median(times) for form, times in found.items()}
    flops = 4e-6 * m * n * k
    print(
        f"{name:8} {n}x{k} m{m:<6}"
        + "".join(
            f"  {label(form) if form else 'cuBLAS'} {t:7.1f} us ({min(found[form]):.1f} to {max(found[form]):.1f};"
            f" {flops / t:.0f} TFLOP/s; {1 - t / medians[None]:+.1%})"
            for form, t in medians.items()
        ),
        flush=True,
    )
    return {form: 1 - medians[form] / medians[None] for form in forms}


def label(form: GatedForm) -> str:
    return f"group {form.group}{' paired' if form.paired else ''}"


def time_shape(name: str, tokens: list[int], seconds: float) -> dict[str, dict[str, int]]:
    """Print the times of a shape; the table's entries for it."""
    n, k = SHAPES[name]
    compile_all(n, k)
    for form in FORMS:
        check(n, k, form)
    torch.cuda.empty_cache()
    weights = [random(2 * n, k, scale=k**-0.5) for _ in range(max(2, min(24, _TURNS_BYTES // (4 * n * k))))]
    saved = {m: time_tokens(name, m, weights, seconds) for m in tokens}
    best = {m: max(FORMS_OF_FEWER, key=saved[m].__getitem__) for m in tokens if m < MIN_MANY_ROWS}
    entries = {
        # Of the 64 numbers of tokens that are one.
        f"gated_matmul/{n}x{k}/m{m}": {"group": form.group} | ({"paired": m - 63} if form.paired else {})
        for m, form in best.items()
        if saved[m][form] >= _LEAST_SAVED_OF_FEWER
    }
    many = [saved[m] for m in tokens if m >= MIN_MANY_ROWS]
    if many:
        form = max(FORMS[:2], key=lambda f: sum(found[f] for found in many))
        mean, least = (f(found[form] for found in many) for f in (statistics.fmean, min))
        print(f"{name:8} best: {label(form)}, {mean:.1%} saved, {least:.1%} at least", flush=True)
        if mean >= _LEAST_SAVED and least >= -_LEAST_SAVED_OF_FEWER:
            most = [saved[m] for m in tokens if m >= _LEAST_PAIRED]
            pair = GatedForm(form.group, paired=True)
            pairs = bool(most) and all(found[pair] > found[form] for found in most)
            entries[f"gated_matmul/{n}x{k}"] = {"group": form.group} | (
                {"paired": _LEAST_PAIRED} if pairs else {}
            )
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="7B,32B/2", help=f"of: {', '.join(SHAPES)}")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--seconds", type=float, default=0.1, help="of a turn")
    parser.add_argument("--out", type=Path, help="where the entries for the tuned table go")
    options = parser.parse_args()
    tokens = [int(t) for t in options.tokens.split(",")]
    table = {}
    began = time.perf_counter()
    for name in options.models.split(","):
        table |= time_shape(name, tokens, options.seconds)
        torch.cuda.empty_cache()
        print(f"{time.perf_counter() - began:.0f} s", flush=True)
    for key, entry in table.items():
        print(f"  {json.dumps(key)}: {json.dumps(entry)},")
    if options.out is not None:
        options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
