#!/usr/bin/env python3
"""What the host does of a workload: `LLM.generate` whole, and planning, launching and taking in a step, the model left out.

    PYTHONPATH=runtime:benchmarks python benchmarks/host.py [--workloads W2,W5] [--against OTHER_CHECKOUT]

A small model's steps take a GPU no longer than the host takes for 512 requests. Here every step's result is there at once, so that
nothing hides behind a device and none is needed. ``--against`` runs another checkout in turns, as a machine's speed drifts; the
medians of five rounds count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_PARTS = ("schedule", "execute", "update", "process")


def child(workload: str) -> None:
    """Print one round's times as JSON: seconds of all, and microseconds a step of its parts."""
    import torch

    import shapes
    import workloads
    from kubeinfer import LLM, SamplingParams
    from kubeinfer.engine.scheduler import Scheduler
    from kubeinfer.text.output_processor import OutputProcessor
    from kubeinfer.worker import model_runner

    torch.set_num_threads(1)
    spent: dict[str, list[float]] = {}

    def timed(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def around(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            spent.setdefault(name, []).append(time.perf_counter() - begin)
            return result

        setattr(owner, name, around)

    def launch(self: Any, plan: Any, rows: Any) -> Any:
        return model_runner.PendingResult(torch.full((len(plan.sampled),), 7))

    model_runner.ModelRunner._launch = launch  # type: ignore[method-assign]
    for owner, name in zip(
        (Scheduler, model_runner.ModelRunner, Scheduler, OutputProcessor), _PARTS, strict=True
    ):
        timed(owner, name)
    with tempfile.TemporaryDirectory() as root:
        folder = shapes.make_shape("qwen2-0.5b", Path(root))
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
        llm = LLM(
            str(folder), load_format="dummy", dtype="float32", device="cpu", max_model_len=8192, max_num_seqs=1024,
            max_num_batched_tokens=16384, kv_cache_memory_bytes=2 << 30,
        )  # fmt: skip
        sizes = workloads.lengths(workload)
        params = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in sizes
        ]
        for seed in (1, 2):  # the first warms up
            prompts: list[Any] = [
                {"prompt_token_ids": ids} for ids in workloads.prompts(workload, sizes, seed)
            ]
            spent.clear()
            begin = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - begin
        llm.shutdown()
    steps = len(spent["update"])
    print(json.dumps({"seconds": seconds, "steps": steps} | {n: sum(spent[n]) / steps * 1e6 for n in _PARTS}))


def round_of(checkout: Path, workload: str) -> dict[str, float]:
    paths = os.pathsep.join(str(checkout / part) for part in ("runtime", "benchmarks"))
    done = subprocess.run(
        [sys.executable, __file__, "--child", workload],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", default="W2,W5")
    parser.add_argument("--against", type=Path, metavar="OTHER_CHECKOUT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    checkouts = {"this": Path(__file__).parents[1]}
    if options.against is not None:
        checkouts["other"] = options.against.resolve()
    for workload in options.workloads.split(","):
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
        for _ in range(options.rounds):
            for name, checkout in checkouts.items():
                rounds[name].append(round_of(checkout, workload))
        middle = {
            name: {key: statistics.median(r[key] for r in found) for key in found[0]}
            for name, found in rounds.items()
        }
        for name, found in middle.items():
            parts = ", ".join(f"{part} {found[part]:.0f}" for part in _PARTS)
            print(
                f"{workload} {name:5} {found['seconds']:.3f} s of {found['steps']:.0f} steps; us a step: {parts}",
                flush=True,
            )
        if len(middle) == 2:
            print(
                f"{workload} this / other: {middle['this']['seconds'] / middle['other']['seconds']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
