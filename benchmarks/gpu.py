#!/usr/bin/env python3
"""The README's GPU table: the fixed workloads on models of published shapes with random weights, greedy.

    python benchmarks/gpu.py [--models qwen2-0.5b,qwen2.5-7b] [--workloads W4,W2,W1,W3,W5] [--tp N] [--pp N] [--reps 2] [--json FILE]
        [--quantization fp8|fp8-block|awq|gptq]

Each model runs in a process of its own. Before the timing of a workload a slice of it is run; of several repetitions, each
with fresh tokens, all are printed. ``start`` is from the import to an engine that takes requests. In the end the first
repetitions are printed as rows of the README's table.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import shapes
import workloads as W

# What --quantization writes into config.json; fp8 quantizes the (dummy) bfloat16 weights at load.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "fp8-block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
}


def run_model(args: argparse.Namespace) -> None:
    """In a model's process: print a JSON line for the start and each workload repetition."""
    began = time.perf_counter()
    from kubeinfer import LLM, SamplingParams
    from kubeinfer.logs import configure_logging

    configure_logging()  # to stderr: what fits in memory, and what the start takes
    with tempfile.TemporaryDirectory() as root:
        folder = shapes.make_shape(args.models, Path(root))
        own = CHECKPOINTS.get(args.quantization)
        overrides = None if own is None else {"quantization_config": own}
        began_engine = time.perf_counter()
        llm = LLM(
            str(folder), load_format="dummy", dtype="bfloat16", max_model_len=8192, gpu_memory_utilization=0.9,
            tensor_parallel_size=args.tp, pipeline_parallel_size=args.pp, batch_invariant=args.batch_invariant,
            quantization="fp8" if args.quantization == "fp8" else None, hf_overrides=overrides,
        )  # fmt: skip
    emit(
        args,
        event="start",
        seconds=round(time.perf_counter() - began, 2),
        engine=round(time.perf_counter() - began_engine, 2),
    )

    def generate(ids: list[list[int]], outs: list[int]) -> float:
        params = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in outs
        ]
        gc.collect()
        start = time.perf_counter()
        results = llm.generate([{"prompt_token_ids": x} for x in ids], params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        short = sum(len(r.outputs[0].token_ids) != n for r, n in zip(results, outs))
        if short:
            raise SystemExit(f"{short} outputs are short")
        return elapsed

    generate(W.prompts("warm", [(64 + 17 * i, 16) for i in range(32)], 990), [16] * 32)
    for name in args.workloads.split(","):
        sizes = W.lengths(name)
        generate(W.prompts(name, sizes[:64], 7000), [min(n, 32) for _, n in sizes[:64]])
        for rep in range(args.reps):
            extra: dict[str, Any] = {}
            if name == "W4":
                first = min(generate(W.prompts(name, sizes, 5000 + 10 * rep + i), [1]) for i in range(3))
                extra["ttft_ms"] = round(1000 * first, 2)
            elapsed = generate(W.prompts(name, sizes, rep), [n for _, n in sizes])
            tokens_in, tokens_out = (sum(s[i] for s in sizes) for i in (0, 1))
            if name == "W4":
                extra["tpot_ms"] = round(1000 * (elapsed - first) / (tokens_out - 1), 3)
            emit(
                args, workload=name, rep=rep, seconds=round(elapsed, 3), in_tok_s=round(tokens_in / elapsed),
                out_tok_s=round(tokens_out / elapsed), **extra,
            )  # fmt: skip
    llm.shutdown()


def emit(args: argparse.Namespace, **values: Any) -> None:
    quantized = {"quantization": args.quantization} if args.quantization else {}
    line = json.dumps(
        {
            "model": args.models, "tp": args.tp, "pp": args.pp, "invariant": args.batch_invariant, **quantized,
            **values,
        }
    )  # fmt: skip
    print(line, flush=True)
    with open(args.json, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read(path: str) -> list[dict[str, Any]]:
    """The lines of a file that `emit` wrote; none, if it is not there."""
    file = Path(path)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rows(lines: list[dict[str, Any]]) -> list[str]:
    """The README's rows, of the first repetitions."""
    found = []
    for line in lines:
        model = " ".join(str(part) for part in (line["model"], line.get("quantization")) if part)
        gpus = line["tp"] * line["pp"]
        model += f" on {gpus} GPUs" if gpus > 1 else ""
        if line.get("event") == "start":
            found.append(f"| {model}, engine start | {line['engine']:.1f} s |")
        elif line.get("rep") == 0:
            name = line["workload"]
            if name == "W4":
                what, value = (
                    "ms a token; time to first token",
                    f"{line['tpot_ms']:.3f}; {line['ttft_ms']:.1f} ms",
                )
            else:
                kind = "in" if name == "W3" else "out"
                what, value = f"{kind}put tok/s", f"{line[f'{kind}_tok_s']:,}"
            found.append(f"| {model}, {name}, {what} | {value} |")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="qwen2-0.5b,qwen2.5-7b")
    parser.add_argument("--workloads", default="W4,W2,W1,W3,W5")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument(
        "--quantization", choices=["fp8", *CHECKPOINTS], help="of the weights; bfloat16 when not given"
    )
    parser.add_argument("--json", help="append the lines to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_model(args)
        return 0
    code = 0
    if args.json is None:
        folder = tempfile.TemporaryDirectory()
        args.json = str(Path(folder.name) / "lines.json")
    before = len(read(args.json))
    for model in args.models.split(","):
        command = [sys.executable, __file__, "--child", "--models", model, "--workloads", args.workloads]
        command += [
            "--tp",
            str(args.tp),
            "--pp",
            str(args.pp),
            *(["--batch-invariant"] if args.batch_invariant else []),
            "--reps",
            str(args.reps),
            "--json",
            args.json,
            *(["--quantization", args.quantization] if args.quantization else []),
        ]
        code = subprocess.run(command, check=False).returncode or code
    print("\n".join(rows(read(args.json)[before:])))
    return code


if __name__ == "__main__":
    sys.exit(main())
