#!/usr/bin/env python3
"""Many requests of every kind, many of them broken off: memory must not grow, and no block may be lost.

    python benchmarks/soak.py engine [--requests 10000]
        an engine in this process over a small model of random weights, with a KV cache so small that it preempts
    python benchmarks/soak.py server --url http://127.0.0.1:8000 [--requests 2000]
        a running kubeinfer server: streams of which a third are cut off by their client

Exit code 1 where something was lost or memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}
_KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.0, "prompt_logprobs": 1},
    {"temperature": 1.0, "frequency_penalty": 0.5, "min_tokens": 2},
    {"temperature": 0.0, "bad_words_token_ids": [[7, 9], [11]]},
    {"temperature": 1.0, "stop_token_ids": list(range(100, 140))},
]


def resident() -> float:
    """This process's resident memory, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE / 2**20


def soak_engine(total: int, seed: int, most_growth: float) -> int:
    from kubeinfer import SamplingParams
    from kubeinfer.engine.in_process import InProcessClient
    from kubeinfer.engine.messages import EngineRequest
    from kubeinfer.options import EngineOptions

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kubeinfer-soak-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_CONFIG))
        options = {
            "model": folder, "load_format": "dummy", "device": "cpu", "dtype": "float32", "block_size": 8,
            "num_gpu_blocks_override": 120, "max_num_seqs": 32, "max_num_batched_tokens": 128,
        }  # fmt: skip
        client = InProcessClient(EngineOptions(**options))
    scheduler = client.core.scheduler
    sent, ended, tokens = 0, 0, 0
    marks: list[float] = []
    began = time.perf_counter()
    every = max(1, total // 10)
    while ended < total:
        while sent < total and len(scheduler.requests) < 48:
            prompt = [rng.randrange(4, 512) for _ in range(rng.choice([1, 5, 17, 40, 90, 150]))]
            params = SamplingParams(**rng.choice(_KINDS))
            length = rng.randint(1, 24)
            client.add_requests(
                [
                    EngineRequest(
                        request_id=str(sent),
                        prompt_token_ids=prompt,
                        params=params,
                        seed=sent,
                        max_tokens=length,
                    )
                ]
            )
            sent += 1
        if rng.random() < 0.1 and scheduler.requests:
            client.abort_requests(rng.sample(sorted(scheduler.requests), 1))
        for output in client.step().outputs:
            tokens += len(output.new_token_ids)
            if output.finish_reason is not None:
                ended += 1
                if ended % every == 0:
                    client.core.check_integrity()
                    marks.append(resident())
                    stats = scheduler.stats()
                    print(
                        f"{ended:7} requests  {time.perf_counter() - began:7.1f} s  {tokens:8} tokens  "
                        f"{stats.num_preemptions:6} preemptions  {marks[-1]:8.1f} MiB",
                        flush=True,
                    )
    while client.has_unfinished_requests():
        client.step()
    client.core.check_integrity()
    lost = scheduler.kv_cache.num_usable - scheduler.kv_cache.num_free
    growth = marks[-1] - marks[min(2, len(marks) - 1)]
    print(f"blocks lost: {lost}; memory grew by {growth:.1f} MiB after the first {3 * every} requests")
    return 1 if lost or growth > most_growth else 0


async def _soak_server(url: str, total: int, concurrency: int, seed: int, headers: dict[str, str]) -> int:
    import aiohttp

    rng = random.Random(seed)
    counts = {"whole": 0, "cut": 0, "failed": 0}
    errors: set[str] = set()

    async def one(session: aiohttp.ClientSession, index: int) -> None:
        cut_after = rng.randint(0, 12) if rng.random() < 0.34 else None
        body = {
            "model": model, "prompt": [rng.randrange(10, 500) for _ in range(rng.choice([3, 30, 120]))],
            "max_tokens": rng.randint(4, 40), "stream": True, "ignore_eos": True, "temperature": rng.choice([0.0, 1.0]),
        }  # fmt: skip
        try:
            async with session.post(f"{url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:200]}")
                seen, last = 0, b""
                async for line in response.content:
                    if line.strip():
                        seen, last = seen + 1, line
                    if cut_after is not None and seen > cut_after:
                        response.close()
                        counts["cut"] += 1
                        return
                if last.strip() != b"data: [DONE]":
                    raise RuntimeError(f"the stream ended with {last[:80]!r}")
                counts["whole"] += 1
        except (aiohttp.ClientError, OSError, RuntimeError) as exc:
            counts["failed"] += 1
            errors.add(f"{type(exc).__name__}: {exc}"[:200])

    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        async with session.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        indices = iter(range(total))

        async def worker() -> None:
            for index in indices:
                await one(session, index)
                if (index + 1) % max(1, total // 10) == 0:
                    print(f"{index + 1:7} requests: {counts}", flush=True)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        text, held = "", []
        for _ in range(100):
            async with session.get(f"{url}/metrics") as response:
                text = await response.text()
            held = [
                line
                for line in text.splitlines()
                if re.match(
                    r"^kubeinfer:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\b", line
                )
                and float(line.rsplit(" ", 1)[1]) != 0
            ]
            if not held:
                break
            await asyncio.sleep(0.1)
    known = re.findall(r"^kubeinfer:(?:num_requests_running|kv_cache_usage_perc)\b", text, re.MULTILINE)
    print(f"{counts}; still held: {held or 'nothing'}")
    for error in sorted(errors)[:5]:
        print(f"error: {error}")
    return 1 if held or counts["failed"] or len(known) < 2 else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["engine", "server"])
    parser.add_argument("--requests", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-growth", type=float, default=16.0, metavar="MIB", help="default 16")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--api-key")
    args = parser.parse_args()
    if args.what == "engine":
        return soak_engine(args.requests or 10_000, args.seed, args.most_growth)
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    return asyncio.run(
        _soak_server(args.url.rstrip("/"), args.requests or 2000, args.concurrency, args.seed, headers)
    )


if __name__ == "__main__":
    sys.exit(main())
