"""``kubeinfer bench throughput`` and ``latency``: an engine in this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from kubeinfer import LLM, SamplingParams
from kubeinfer.bench.figures import heading, line, percentile
from kubeinfer.bench.workload import BenchRequest
from kubeinfer.options import EngineOptions

_PERCENTS = (10, 25, 50, 75, 90, 99)


def make_llm(options: EngineOptions) -> LLM:
    """An engine with what ``options`` sets."""
    return LLM(**options.model_dump(exclude_unset=True))


def measure_throughput(
    llm: LLM, requests: Sequence[BenchRequest], n: int = 1, progress: bool = True
) -> dict[str, Any]:
    """Run all requests at once; their rates over the whole time."""
    params = [
        SamplingParams(
            n=n,
            temperature=1.0 if n > 1 else 0.0,
            ignore_eos=True,
            max_tokens=request.output_len,
            detokenize=True,
        )
        for request in requests
    ]
    start = time.perf_counter()
    results = llm.generate([request.prompt for request in requests], params, use_tqdm=progress)
    elapsed = time.perf_counter() - start
    prompt_tokens = sum(len(result.prompt_token_ids) for result in results)
    output_tokens = sum(len(output.token_ids) for result in results for output in result.outputs)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(requests),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "total_num_tokens": prompt_tokens + output_tokens,
        "requests_per_second": len(requests) / elapsed,
        "tokens_per_second": (prompt_tokens + output_tokens) / elapsed,
        "output_tokens_per_second": output_tokens / elapsed,
    }


def print_throughput(result: dict[str, Any]) -> None:
    print(heading("throughput", "="))
    print(line("Requests", result["num_requests"]))
    print(line("Time (s)", result["elapsed_time"]))
    print(line("Prompt tokens", result["total_input_tokens"]))
    print(line("Output tokens", result["total_output_tokens"]))
    print(line("Requests/s", result["requests_per_second"]))
    print(line("Output tokens/s", result["output_tokens_per_second"]))
    print(line("Total tokens/s", result["tokens_per_second"]))


def measure_latency(
    llm: LLM, requests: Sequence[BenchRequest], warmup: int, iterations: int, n: int = 1
) -> dict[str, Any]:
    """Time of one batch from its first prompt to its last token, over ``iterations``; prefix hits are kept out."""
    params = [
        SamplingParams(n=n, temperature=1.0 if n > 1 else 0.0, ignore_eos=True, max_tokens=request.output_len)
        for request in requests
    ]
    prompts = [request.prompt for request in requests]
    seconds = []
    for index in range(warmup + iterations):
        llm.reset_prefix_cache()
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        if index >= warmup:
            seconds.append(time.perf_counter() - start)
    return {
        "avg_latency": statistics.fmean(seconds),
        "latencies": seconds,
        "percentiles": {str(percent): percentile(seconds, percent) for percent in _PERCENTS},
    }


def print_latency(result: dict[str, Any]) -> None:
    print(heading("latency of a batch", "="))
    print(line("Iterations", len(result["latencies"])))
    print(line("Mean (s)", round(result["avg_latency"], 4)))
    for percent, value in result["percentiles"].items():
        print(f"{f'P{percent} (s):':<44}{value:>14.4f}")
