"""Times quantized linear layers beside unquantized ones, and tunes their kernels of a few tokens.

    PYTHONPATH=runtime python3 benchmarks/gpu_quantized.py [--tune FOLDER [--kinds int4,gguf4,gguf8,fp8]] [--tokens 1,2,4,8,16,64,256,1024,4096]

For every product of a decoder layer of the 7B shape: microseconds as the layer runs it (norm and activation included), as
replayed CUDA graphs that take turns over weights larger than the L2 cache. ``--tune`` first times each configuration of the
kernels of a few tokens, checks it, and writes ``int4.json`` and the entries of FP8 weights, ``linear_fp8.json``, there; those
of the two that win belong into ``runtime/kubeinfer/kernels/tuned``. (Entries ``/bulk`` of ``int4.json`` are `gpu_layer.py`'s.)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_linear import Product, microseconds, products
from kubeinfer.kernels import fp8, int4
from kubeinfer.kernels.activation import silu_and_mul, silu_and_mul_reference
from kubeinfer.kernels.fused_linear import add_linear, gated_linear, norm_linear
from kubeinfer.kernels.int4 import Int4Weight
from kubeinfer.kernels.linear import MAX_FEW_ROWS
from kubeinfer.kernels.norm import fused_add_rms_norm, rms_norm, rms_norm_reference
from kubeinfer.kernels.triton_int4 import Int4Config, int4_few_triton
from kubeinfer.kernels.triton_linear import Config, linear_triton

_TURNS_BYTES = 256 << 20
_GROUP = 128


def random_words(product: Product, planes: int) -> Tensor:
    shape = (-(-product.rows // int4.ROWS), -(-product.k // int4.CHUNK), planes, int4.ROWS, 16)
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")


def metas(product: Product, group: int, bits: Tensor) -> Tensor:
    """The same scale and zero (or minimum) for all groups: the int32 ``bits``."""
    shape = (-(-product.rows // int4.ROWS), -(-product.k // int4.CHUNK) * int4.CHUNK // group, int4.ROWS)
    return bits.cuda().expand(shape).contiguous()


def int4_weights(product: Product, count: int) -> list[Int4Weight]:
    meta = metas(product, _GROUP, int4.pack_meta(torch.tensor([0.003]), torch.tensor([7])))
    return [
        Int4Weight(random_words(product, 1), meta.clone(), product.rows, product.k, _GROUP)
        for _ in range(count)
    ]


def gguf_weights(product: Product, bits: int, count: int) -> list[Int4Weight]:
    """As GGUF's types of 4 bits and of 6: a scale and a minimum for 32 inputs, or for 16."""
    group = 32 if bits == 4 else 16
    pair = torch.tensor([0.004, -0.03] if bits == 4 else [0.0003, 0.0]).half()
    meta = metas(product, group, pair.view(torch.int32))
    return [
        Int4Weight(
            random_words(product, bits // 4), meta.clone(), product.rows, product.k, group, None, True, bits
        )
        for _ in range(count)
    ]


def packed_weights(product: Product, kind: str, count: int) -> list[Any]:
    if kind == "fp8":
        return fp8_weights(product, count)
    return int4_weights(product, count) if kind == "int4" else gguf_weights(product, int(kind[4:]), count)


def fp8_weights(product: Product, count: int) -> list[tuple[Tensor, Tensor]]:
    scale = torch.full((product.rows,), 3e-4, device="cuda")
    return [
        (torch.empty(product.rows, product.k, device="cuda").normal_(0, 64).to(fp8.FP8), scale)
        for _ in range(count)
    ]


def turns(nbytes: int) -> int:
    return max(1, min(32, _TURNS_BYTES // nbytes))


class Inputs:
    def __init__(self, product: Product, m: int):
        torch.manual_seed(0)
        half = {"device": "cuda", "dtype": torch.bfloat16}
        self.product, self.m = product, m
        self.x = torch.randn(m, product.k, **half)
        self.residual = torch.randn(m, product.n, **half)
        self.norm = torch.rand(product.k, **half) + 0.5
        self.before = torch.randn(m, product.k, **half)

    def dense(self, w: Tensor) -> object:
        p = self.product
        if self.m <= MAX_FEW_ROWS:
            if p.gated:
                return gated_linear(self.x, w, None, None, self.norm, 1e-6)
            if p.add:
                return add_linear(self.residual, self.x, w)
            return norm_linear(self.x, self.norm, 1e-6, w) if p.norm else self.x @ w.t()
        x = fused_add_rms_norm(self.x, self.before, self.norm, 1e-6)[0] if p.norm else self.x
        y = x @ w.t()
        return silu_and_mul(y) if p.gated else y

    def fp8(self, weight: tuple[Tensor, Tensor]) -> object:
        p, (w, s) = self.product, weight
        if self.m <= fp8.MAX_WIDE_ROWS:
            if p.gated:
                return fp8.fp8_gated_linear(self.x, self.norm, 1e-6, w, s, None, None)
            if p.add:
                return fp8.fp8_add_linear(self.residual, self.x, w, s, None, None)
            return fp8.fp8_norm_linear(self.x, self.norm, 1e-6, w, s, None, None)
        rows = (
            fp8.rms_norm_quantize(self.x, self.before, self.norm, 1e-6)
            if p.norm
            else fp8.quantize_rows(self.x)
        )
        y = fp8.scaled_product(rows, w, s, None)
        return fp8.silu_and_mul_quantize(y) if p.gated else y

    def int4(self, w: Int4Weight) -> object:
        p = self.product
        norm = self.norm if p.norm else None
        return int4.int4_linear(self.x, w, None, norm, 1e-6, p.gated, self.residual if p.add else None)


def report(tokens: list[int]) -> None:
    names = ("bf16", "fp8", "int4", "gguf 4", "gguf 8")
    print(f"{'product':14} {'m':>5} " + " ".join(f"{name:>9}" for name in names) + " us; int4, gguf TB/s")
    sums: dict[int, list[float]] = {}
    for product in layer_products():
        size = product.rows * product.k
        half = [
            torch.randn(product.rows, product.k, device="cuda", dtype=torch.bfloat16)
            for _ in range(turns(2 * size))
        ]
        eighth, fourth = fp8_weights(product, turns(size)), int4_weights(product, turns(size // 2))
        blocks4 = gguf_weights(product, 4, turns(size // 2))
        blocks8 = gguf_weights(product, 8, turns(size))
        for m in tokens:
            given = Inputs(product, m)
            times = [
                microseconds(given.dense, half),
                microseconds(given.fp8, eighth),
                microseconds(given.int4, fourth),
                microseconds(given.int4, blocks4),
                microseconds(given.int4, blocks8),
            ]
            total = sums.setdefault(m, [0.0] * len(times))
            for i, t in enumerate(times):
                total[i] += t
            bits = (4 + 32 / _GROUP, 5, 10)
            rates = [size * b / 8 / t / 1e6 for b, t in zip(bits, times[2:])]
            print(
                f"{product.name:14} {m:5} " + " ".join(f"{t:9.2f}" for t in times)
                + " " + " ".join(f"{rate:6.2f}" for rate in rates),
                flush=True,
            )  # fmt: skip
    for m, total in sums.items():
        print(f"{'layer':14} {m:5} " + " ".join(f"{t:9.2f}" for t in total))


def layer_products() -> list[Product]:
    return [p for p in products() if p.name.split()[0] == "7B" and "head" not in p.name]


def int4_candidates(product: Product, m: int, kind: str) -> list[Int4Config]:
    """Enough programs to draw the memory's speed, in registers that there are."""
    tokens = -(-m // 8)
    found = []
    for tiles in (2, 4) if product.gated else (1, 2):
        for warps in (2, 4, 8, 16) if tokens == 1 and kind == "int4" else (4, 8):
            steps = -(-product.k // (128 * warps))
            programs = -(-product.n // (8 * tiles if product.gated else 16 * tiles))
            if programs * warps < 800 or tiles * tokens > 8 or (product.gated and warps == 16):
                continue
            for depth in (1, 2, 3, 4):
                words = 8 * tiles * depth  # a thread's
                few = depth == 1 and tokens == 1 and warps < 16 and kind == "int4"
                most = {"int4": 72, "gguf4": 48, "gguf8": 24}[kind]
                if few or depth > min(steps, 2 if warps == 16 else 7) or words > most // tokens:
                    continue
                found.append(Int4Config(tiles, warps, depth))
                if kind == "int4" and tokens == 1 and (depth > 1 or warps == 16):
                    limits = {
                        (1, 4): (120,),
                        (1, 8): (80,),
                        (1, 16): (64,),
                        (2, 4): (144, 120),
                        (2, 8): (120,),
                    }
                    found += [
                        Int4Config(tiles, warps, depth, limit) for limit in limits.get((tiles, warps), ())
                    ]
    return found


def fp8_candidates(product: Product, m: int) -> list[Config]:
    return [
        Config(rows // 2 if product.gated else rows, 256 * warps, warps, depth)
        for rows in (8, 4)
        for warps in (2, 4, 8)
        for depth in (1, 2, 4)
        if -(-product.k // (256 * warps)) * m <= 40
        and depth <= -(-product.k // (256 * warps))
        and rows * depth * m <= 32
    ]


def int4_run(given: Inputs, config: Int4Config, weight: Int4Weight, residual: Tensor) -> Tensor:
    p = given.product
    norm = given.norm if p.norm else None
    return int4_few_triton(given.x, weight, None, norm, 1e-6, p.gated, residual if p.add else None, config)


def int4_cores(given: Inputs, weight: Int4Weight) -> Tensor:
    """What a layer runs with many tokens: cuBLAS on the dequantized weight."""
    p = given.product
    y = F.linear(
        rms_norm(given.x, given.norm, 1e-6) if p.norm else given.x,
        int4.dequantize_int4(weight, torch.bfloat16),
    )
    y = silu_and_mul(y) if p.gated else y
    return given.residual.add_(y) if p.add else y


def fp8_run(given: Inputs, config: Config, weight: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
    p = given.product
    norm = given.norm if p.norm else None
    return linear_triton(
        given.x, weight[0], None, out, config, norm, 1e-6, p.gated, p.add, weight_scale=weight[1]
    )


def fp8_cores(given: Inputs, weight: tuple[Tensor, Tensor]) -> Tensor:
    """What a layer runs without the kernel of a few tokens. The residual addition is left out."""
    p = given.product
    rows = fp8.rms_norm_quantize(given.x, None, given.norm, 1e-6) if p.norm else fp8.quantize_rows(given.x)
    y = fp8.scaled_product(rows, *weight, None)
    return silu_and_mul(y) if p.gated else y


def check(task: tuple[str, Product, int, list[Any]]) -> list[tuple[str, str, int, Any, str]]:
    """Compile and run every configuration once; what is wrong."""
    kind, product, m, configs = task
    given = Inputs(product, m)
    weight = packed_weights(product, kind, 1)[0]
    if isinstance(weight, Int4Weight):
        matrix = int4.dequantize_int4_reference(weight, torch.float32)
    else:
        matrix = weight[0].float() * weight[1][:, None]
    x = rms_norm_reference(given.x.float(), given.norm, 1e-6) if product.norm else given.x.float()
    want = x @ matrix.t()
    want = silu_and_mul_reference(want) if product.gated else want
    want = want + given.residual.float() if product.add else want
    wrong = []
    for config in configs:
        try:
            residual = given.residual.clone()
            run: Any = fp8_run if kind == "fp8" else int4_run
            got = run(given, config, weight, residual).float()
            off = float((got - want).norm() / want.norm())
        except Exception as exc:  # reported: one bad candidate must not end the run
            wrong.append((kind, product.name, m, config, f"{type(exc).__name__} {exc}"[:200]))
            continue
        if not off < 1e-2:
            wrong.append((kind, product.name, m, config, f"relative error {off:.2e}"))
    return wrong


def tune(folder: Path, workers: int, kinds: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    candidates: dict[tuple[str, Product, int], list[Any]] = {}
    for product in layer_products():
        for kind in kinds:
            for m in {"int4": (1, 16, 32), "fp8": (1, 2, 4)}.get(kind, (1,)):
                configs: list[Any] = (
                    fp8_candidates(product, m) if kind == "fp8" else int4_candidates(product, m, kind)
                )
                candidates[(kind, product, m)] = configs
    tasks = [
        (*key, configs[i : i + 3]) for key, configs in candidates.items() for i in range(0, len(configs), 3)
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        wrong = [w for found in pool.imap_unordered(check, tasks) for w in found]
    for entry in wrong:
        print("wrong:", *entry, flush=True)
    bad = {entry[:4] for entry in wrong}
    tables: dict[str, dict[str, dict[str, int]]] = {"int4": {}, "linear_fp8": {}}
    for (kind, product, m), configs in candidates.items():
        size = product.rows * product.k // (2 if kind in ("int4", "gguf4") else 1)
        given = Inputs(product, m)
        weights = packed_weights(product, kind, turns(size))
        run: Any = fp8_run if kind == "fp8" else int4_run
        spare = given.residual.clone()
        timed = [
            (microseconds(lambda w, g=given, c=config, r=spare, f=run: f(g, c, w, r), weights), config)
            for config in configs
            if (kind, product.name, m, config) not in bad
        ]
        if not timed:
            continue
        timed.sort(key=lambda pair: pair[0])
        best, config = timed[0]
        others: Any = fp8_cores if kind == "fp8" else int4_cores
        cores = microseconds(lambda w, g=given, f=others: f(g, w), weights)
        shape = f"{product.kind}/{product.n}x{product.k}"
        form = {"gguf4": "/4-32", "gguf8": "/8-16"}.get(kind, "")
        # One kernel is for up to eight tokens.
        key = f"fp8/{shape}/m{m}" if kind == "fp8" else f"{shape}/m{max(8, m)}{form}"
        entries = tables["linear_fp8" if kind == "fp8" else "int4"]
        entries[key] = dict.fromkeys(asdict(config), 0) if cores < best else asdict(config)
        print(
            f"{product.name:12} {kind} m{m} {best:7.2f} us (as many tokens {cores:.2f}) {size / best / 1e6:5.2f} TB/s; "
            + ", ".join(
                f"{time:.2f} {type(other).__name__}{tuple(asdict(other).values())}"
                for time, other in timed[:5]
            ),
            flush=True,
        )
    for name, table in tables.items():
        if table:
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
            (folder / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tune", type=Path, metavar="FOLDER")
    parser.add_argument("--kinds", default="int4,gguf4,gguf8,fp8", help="of what --tune tunes")
    parser.add_argument("--tokens", default="1,2,4,8,16,64,256,1024,4096")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    options = parser.parse_args()
    if options.tune:
        tune(options.tune, options.workers, options.kinds.split(","))
    report([int(m) for m in options.tokens.split(",")])


if __name__ == "__main__":
    main()
