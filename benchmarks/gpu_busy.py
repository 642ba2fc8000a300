#!/usr/bin/env python3
"""How much of a steady decode the GPU computes: the profiler's kernel times over a window of decode steps.

    PYTHONPATH=runtime python3 benchmarks/gpu_busy.py [--model qwen2.5-7b] [--batches 1,64,256] [--trace FILE]

A GPU that waits for Python between steps shows it here: the window holds many steps, gaps between them included. Only the
device's own records are kept (kernels and copies), as recording host calls would slow the host down. ``--trace`` keeps the
last batch's trace for a viewer (chrome://tracing, Perfetto).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
import shapes
import workloads as W


def busy_share(found: profile) -> tuple[float, float]:
    """Share of the middle six tenths of the recorded time in which something ran, and that window in milliseconds."""
    events = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    first, last = events[0][0], max(end for _, end in events)
    begin, end = first + 0.3 * (last - first), first + 0.9 * (last - first)
    busy, reached = 0.0, begin
    for start, stop in events:
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            busy += stop - start
            reached = stop
    return busy / (end - begin), (end - begin) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    from kubeinfer import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as root:
        folder = shapes.make_shape(options.model, Path(root))
        llm = LLM(str(folder), load_format="dummy", dtype="bfloat16", max_model_len=8192)
    for batch in map(int, options.batches.split(",")):
        params = SamplingParams(temperature=0, max_tokens=160, ignore_eos=True, detokenize=False)
        for seed in (1, 2):
            prompts = [{"prompt_token_ids": ids} for ids in W.prompts("busy", [(64, 160)] * batch, seed)]
            if seed == 1:
                llm.generate(prompts, params, use_tqdm=False)  # warm
                continue
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                llm.generate(prompts, params, use_tqdm=False)
        share, window = busy_share(found)
        print(
            f"{options.model}, {batch} running: busy {share:.1%} of a window of {window:.0f} ms", flush=True
        )
    if options.trace is not None:
        found.export_chrome_trace(str(options.trace))
    llm.shutdown()


if __name__ == "__main__":
    main()
