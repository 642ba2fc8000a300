"""Tunes the linear layers of a few tokens: each candidate is checked, then timed against cuBLAS.

    PYTHONPATH=runtime python3 benchmarks/gpu_linear.py [--out linear.json] [--tokens 16,32] [--models 7B] [--products gate_up]
    PYTHONPATH=runtime python3 benchmarks/gpu_linear.py --decode MODEL_FOLDER

The first form prints, for every product of a decoder layer, the time of what the layer would run without our kernel (norm,
cuBLAS, activation) and of our best candidate, as replayed CUDA graphs that take turns over weights several times the size of
the L2 cache, and writes the winners as a tuned table. The second times whole decode steps of an engine with dummy weights,
with the kernel and without.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels import linear as linear_module
from kubeinfer.kernels.activation import silu_and_mul
from kubeinfer.kernels.linear import MAX_FEW_ROWS
from kubeinfer.kernels.norm import fused_add_rms_norm
from kubeinfer.kernels.triton_few_linear import MAX_TOKENS, FewConfig
from kubeinfer.kernels.triton_launch import runs_gluon
from kubeinfer.kernels.triton_linear import AnyConfig, ColumnsConfig, Config, linear_triton
from kubeinfer.kernels.triton_skinny_linear import SkinnyConfig
from kubeinfer.kernels.triton_stream_linear import StreamConfig

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_STREAMED = 64  # tokens, by kernels that are compiled for a power of two of them
_TURNS_BYTES = 384 << 20
_CALLS = 64  # in a graph that is timed


@dataclass(frozen=True)
class Product:
    """One product of a layer: ``n`` outputs of ``k`` inputs, and what stands around it."""

    name: str
    n: int
    k: int
    norm: bool = False
    gated: bool = False
    bias: bool = False
    add: bool = False

    @property
    def rows(self) -> int:
        return 2 * self.n if self.gated else self.n

    @property
    def kind(self) -> str:
        return "gated" if self.gated else "plain"


def products() -> list[Product]:
    found = []
    for name, hidden, qkv, inner, vocab in (
        ("0.5B", 896, 1152, 4864, 151936),
        ("7B", 3584, 4608, 18944, 152064),
        ("Llama-8B", 4096, 6144, 14336, 128256),
    ):
        found += [
            Product(f"{name} qkv", qkv, hidden, norm=True, bias=True),
            Product(f"{name} out", hidden, hidden, add=True),
            Product(f"{name} gate_up", inner, hidden, norm=True, gated=True),
            Product(f"{name} down", hidden, inner, add=True),
            Product(f"{name} head", vocab, hidden),
        ]
    for name, hidden, qkv, heads, inner, vocab in (
        ("7B/2", 3584, 2304, 1792, 9472, 76032),
        ("32B/2", 5120, 3584, 2560, 13824, 76032),
    ):
        # Of a tensor-parallel rank: norms and additions are the all-reduce's.
        found += [
            Product(f"{name} qkv", qkv, hidden, bias=True),
            Product(f"{name} out", hidden, heads),
            Product(f"{name} gate_up", inner, hidden, gated=True),
            Product(f"{name} down", hidden, inner),
            Product(f"{name} head", vocab, hidden),
        ]
    return found


def few_tokens_candidates(product: Product, m: int) -> list[AnyConfig]:
    """One program a tile, its inputs split where tiles are few, or a run of tiles a program."""
    found: list[AnyConfig] = []
    if product.gated and runs_gluon():
        from kubeinfer.kernels.gluon_gated_columns import fits

        found += [c for c in map(ColumnsConfig, (3, 4, 5)) if fits(product.n, m, c)]
    if m > _MOST_STREAMED:
        return found
    for block_n, block_k, warps, stages in (
        (16, 256, 4, 4), (32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 6), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 3),
    ):  # fmt: skip
        if (product.gated and block_n == 128) or (m > 16 and block_n == 16):
            continue
        if block_k * 2 * (stages - 1) * (max(m, 16) + block_n * (2 if product.gated else 1)) > 200_000:
            continue
        tiles = -(-product.n // block_n)
        splits = [s for s in (1, 2, 4, 8, 16) if tiles * s >= 56 and s * block_k <= product.k]
        found += [
            SkinnyConfig(block_n, block_k, warps, stages, s) for s in splits[:3] if s == 1 or tiles * s <= 700
        ]
    for stream in (
        StreamConfig(64, 64, 4, 6, 1), StreamConfig(64, 128, 4, 5, 1), StreamConfig(64, 128, 4, 4, 2),
        StreamConfig(64, 256, 4, 3, 1), StreamConfig(128, 64, 4, 5, 1), StreamConfig(128, 128, 4, 5, 1),
    ):  # fmt: skip
        step = 2 * stream.block_k * (stream.block_n * (2 if product.gated else 1) + max(m, 16))
        if stream.stages * step * stream.per_processor <= 220_000:
            found.append(stream)
    if m <= MAX_TOKENS:
        found += [FewConfig(*few) for few in ((4, 2), (4, 3), (8, 2), (8, 3), (8, 4), (16, 2))]
    return found


def candidates(product: Product, m: int) -> list[AnyConfig]:
    """Configurations of the kernel that multiplies lane by lane (256 columns a warp), from 3 tokens on of the others."""
    if m > 2:
        return few_tokens_candidates(product, m)
    found: list[AnyConfig] = []
    widest = 4 if product.gated else 8
    for warps in (1, 2, 4, 8):
        steps = -(-product.k // (256 * warps))
        if 256 * warps >= 2 * product.k or steps > 40:
            continue
        for rows in (1, 2, 4, 8):
            per_program = rows * (2 if product.gated else 1)
            if (
                rows > widest
                or per_program * m > 16
                or (rows == 1 and product.n > 10000 and not product.gated)
            ):
                continue
            for depth in (1, 2, 4, 7):
                if depth > steps or (depth == 1 and steps > 1) or per_program * depth > 16:
                    continue
                if m > 1 and (depth > 2 or rows < 2 or warps > 4):
                    continue
                if m > 1 and per_program * m < 8:
                    continue
                found.append(Config(rows, 256 * warps, warps, depth))
    return found if m == 1 else found[:6]


def operands(product: Product, m: int, weights: int, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).normal_()

    return {
        "x": randn(m, product.k),
        "residual": randn(m, product.k),
        "norm": randn(product.k).abs(),
        "weights": [randn(product.rows, product.k).mul_(product.k**-0.5) for _ in range(weights)],
        "bias": randn(product.rows) if product.bias else None,
        "out": randn(m, product.n),
    }


def ours(product: Product, given: dict[str, Any], weight: Tensor, config: AnyConfig) -> Tensor:
    return linear_triton(
        given["x"], weight, given["bias"], given["out"], config, given["norm"] if product.norm else None, 1e-6,
        product.gated, product.add,
    )  # fmt: skip


def parts(product: Product, given: dict[str, Any], weight: Tensor) -> Tensor:
    """What a layer runs without our kernel. The residual addition is the next norm's."""
    x = given["x"]
    if product.norm:
        x, _ = fused_add_rms_norm(x, given["residual"], given["norm"], 1e-6)
    y = F.linear(x, weight, given["bias"])
    return silu_and_mul(y) if product.gated else y


def exact(product: Product, given: dict[str, Any]) -> Tensor:
    x = given["x"].double()
    if product.norm:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * given["norm"].double()
    y = x @ given["weights"][0].double().T
    if product.bias:
        y += given["bias"].double()
    if product.gated:
        gate, up = y.chunk(2, 1)
        y = F.silu(gate) * up
    return y + given["out"].double() if product.add else y


def check(task: tuple[Product, int, list[AnyConfig]]) -> list[str]:
    """Compile and run every configuration once; what is wrong."""
    product, m, configs = task
    given = operands(product, m, 1)
    want, before = exact(product, given), given["out"].clone()
    wrong = []
    for config in configs:
        given["out"].copy_(before)
        try:
            got = ours(product, given, given["weights"][0], config).double()
            error = float((got - want).norm() / want.norm())
        except Exception as exc:  # reported: one bad candidate must not end the run
            wrong.append(f"{product.name} m{m} {config}: {type(exc).__name__} {exc}"[:300])
            continue
        if not error < 6e-3:
            wrong.append(f"{product.name} m{m} {config}: relative error {error:.2e}")
    torch.cuda.empty_cache()
    return wrong


def microseconds(run: Callable[[Tensor], object], weights: list[Tensor]) -> float:
    """Median time of one call in a replayed graph of calls that take the weights in turns.

    Of enough calls that the graph's own launch, some ten microseconds, does not count.
    """
    rounds = -(-_CALLS // len(weights))
    for _ in range(2):
        run(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights * rounds:
            run(weight)
    times = []
    for i in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i > 2:
            times.append(begin.elapsed_time(end) * 1e3 / (len(weights) * rounds))
    return statistics.median(times)


def tune(out: Path | None, workers: int, tokens: list[int], models: str, names: str, budget: float) -> None:
    chosen = [
        p
        for p in products()
        if (not models or p.name.split()[0] in models.split(","))
        and (not names or p.name.split()[1] in names.split(","))
    ]
    tasks = [
        (product, m, configs[i : i + 6])
        for m in tokens
        for product in chosen
        for configs in [candidates(product, m)]
        for i in range(0, len(configs), 6)
    ]
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        wrong = [w for found in pool.imap_unordered(check, tasks) for w in found]
    print(
        f"{sum(len(t[2]) for t in tasks)} checked in {time.perf_counter() - begin:.0f} s; wrong: {len(wrong)}"
    )
    print("\n".join(wrong[:12]), flush=True)
    table: dict[str, dict[str, int]] = {}
    for m, product in [(m, p) for m in tokens for p in chosen]:
        size = 2 * product.rows * product.k
        if time.perf_counter() - begin > budget:
            break
        given = operands(product, m, max(1, min(48, _TURNS_BYTES // size)))
        weights = given["weights"]
        base = microseconds(lambda w, g=given, p=product: parts(p, g, w), weights)
        timed = sorted(
            (
                (microseconds(lambda w, g=given, p=product, c=config: ours(p, g, w, c), weights), config)
                for config in candidates(product, m)
                if not any(w.startswith(f"{product.name} m{m} {config}:") for w in wrong)
            ),
            key=lambda t: t[0],
        )
        if not timed:
            print(f"{product.name:12} m{m} {base:7.2f} us, no candidate", flush=True)
            continue
        best, config = timed[0]
        key = f"{product.n}x{product.k}/m{m}"
        if isinstance(config, ColumnsConfig) and best < 0.98 * base:
            table[f"gated_columns/{key}"] = asdict(config)
        # GPUs that this does not run on take the best of the others.
        others = [t for t in timed if not isinstance(t[1], ColumnsConfig)]
        if others:
            won = others[0][0] < 0.98 * base
            table[f"{product.kind}/{key}"] = asdict(others[0][1]) if won else {"block_n": 0}
        rest = " ".join(f"{t:.1f}:{'/'.join(map(str, astuple(c)))}" for t, c in timed[:4])
        print(
            f"{product.name:12} m{m} {base:7.2f} -> {best:7.2f} us {size / best / 1e6:5.2f} TB/s {rest}",
            flush=True,
        )
        if out is not None:
            out.write_text(json.dumps(table, indent=1) + "\n")


def decode(model: str) -> None:
    """Time of a token in decode steps of 1, 2 and 4 requests, without our kernel and with it."""
    from kubeinfer import LLM, SamplingParams

    for enabled in (True, False):
        linear_module.MAX_FEW_ROWS = MAX_FEW_ROWS if enabled else 0
        begin = time.perf_counter()
        llm = LLM(
            model=model, load_format="dummy", dtype="bfloat16", max_model_len=2048, max_num_seqs=8,
            kv_cache_memory_bytes=2 << 30,
        )  # fmt: skip
        started = time.perf_counter() - begin

        def seconds(requests: int, tokens: int, seed: int, llm: LLM = llm) -> float:
            prompts = [
                {"prompt_token_ids": [1000 + (seed * 131 + r * 17 + i) % 9000 for i in range(128)]}
                for r in range(requests)
            ]
            params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens, detokenize=False)
            begin = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - begin

        seconds(1, 16, 0)
        found = []
        for requests in (1, 2, 4):
            ttft = min(seconds(requests, 1, 10 + i) for i in range(3))
            whole = min(seconds(requests, 193, 20 + i) for i in range(2))
            found.append(f"{requests}: {(whole - ttft) / 192 * 1e3:.3f}")
        name = os.path.basename(model.rstrip("/"))
        print(
            f"{name}: kernel {'on' if enabled else 'off'}, start {started:.1f} s, ms a token by requests {found}"
        )
        if enabled:
            profile(lambda run=seconds: run(1, 33, 77))
        llm.shutdown()


def profile(run: Callable[[], object]) -> None:
    """Print where the device's time goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        run()
    rows = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:13]
    for row in rows:
        print(f"  {row.self_device_time_total / row.count:8.2f} us x {row.count:5} {row.key[:70]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--decode", metavar="MODEL_FOLDER")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--models", default="", help="only these, of: 0.5B, 7B, Llama-8B, 7B/2, 32B/2")
    parser.add_argument("--products", default="", help="only these, of: qkv, out, gate_up, down, head")
    parser.add_argument(
        "--budget", type=float, default=3600, help="seconds after which no further product is timed"
    )
    options = parser.parse_args()
    if options.decode:
        decode(options.decode)
    else:
        tokens = [int(t) for t in options.tokens.split(",")]
        tune(options.out, options.workers, tokens, options.models, options.products, options.budget)


if __name__ == "__main__":
    main()
