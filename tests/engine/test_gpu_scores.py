"""Decode on a GPU against prefill: the same tokens score the same, whichever kernels a step of so many rows takes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fixtures.engine_client import request
from kubeinfer.engine.client import EngineClient, make_client
from kubeinfer.engine.messages import EngineRequest
from kubeinfer.options import EngineOptions

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

# Hidden size, intermediate size, query heads, KV heads: of Qwen2's 0.5B and Qwen2.5's 7B.
SMALL, LARGE = (896, 4864, 14, 2), (3584, 18944, 28, 4)


def _engine(folder: Path, shape: tuple[int, int, int, int], **options: Any) -> EngineClient:
    hidden, intermediate, heads, kv_heads = shape
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": 3, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": 20000, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
        "rope_theta": 1e6, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return make_client(EngineOptions(model=str(folder), device="cuda", load_format="dummy", **options))


def _run(
    client: EngineClient, requests: list[EngineRequest]
) -> dict[str, tuple[list[int], list[float], list[float]]]:
    """Each request's tokens, their scores, and those of its prompt's tokens but the first."""
    found: dict[str, tuple[list[int], list[float], list[float]]] = {
        r.request_id: ([], [], []) for r in requests
    }
    client.add_requests(requests)
    while client.has_unfinished_requests():
        for output in client.step().outputs:
            tokens, scores, of_prompt = found[output.request_id]
            tokens += output.new_token_ids
            scores += [entry.logprobs[0] for entry in output.logprobs or ()]
            of_prompt += [entry.logprobs[0] for entry in output.prompt_logprobs or () if entry is not None]
    return found


def _differences(client: EngineClient, prompts: list[list[int]], count: int) -> list[float]:
    """Of the scores that ``count`` tokens after each prompt have in decode and in prefill."""
    decoded = _run(client, [request(str(i), p, count, logprobs=0) for i, p in enumerate(prompts)])
    again = [request(str(i), p + decoded[str(i)][0], 1, prompt_logprobs=0) for i, p in enumerate(prompts)]
    return [
        abs(a - b)
        for name, (_, _, found) in _run(client, again).items()
        for a, b in zip(found[-count:], decoded[name][1], strict=True)
    ]


@pytest.mark.parametrize(
    ("shape", "size", "batches"),
    [
        pytest.param(SMALL, 1, (1, 2, 4), id="few"),
        pytest.param(SMALL, 2, (1, 2, 4), id="few-tp2"),
        pytest.param(SMALL, 1, (60, 256), id="many"),
        pytest.param(LARGE, 1, (1, 4, 24, 100, 256), id="large"),
        pytest.param(LARGE, 2, (1, 24, 100, 256), id="large-tp2"),
    ],
)
def test_tokens_score_alike_in_decode_and_prefill(
    tmp_path: Path, shape: tuple[int, int, int, int], size: int, batches: tuple[int, ...]
) -> None:
    import torch

    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    options = {"kv_cache_memory_bytes": 2**30, "max_num_seqs": max(batches), "tensor_parallel_size": size}
    client = _engine(tmp_path, shape, enable_prefix_caching=False, **options)
    rng = random.Random(8)
    try:
        for batch in batches:
            prompts = [[rng.randrange(20000) for _ in range(rng.randrange(20, 400))] for _ in range(batch)]
            assert all(d < 0.08 for d in _differences(client, prompts, 24)), batch
    finally:
        client.shutdown()


def test_tokens_after_a_shared_prefix_score_alike(tmp_path: Path) -> None:
    """Attention reads the prefix once for all rows."""
    client: Any = _engine(tmp_path, LARGE, kv_cache_memory_bytes=2**30, max_num_seqs=256)
    rng = random.Random(9)
    prefix = [rng.randrange(20000) for _ in range(1500)]
    try:
        _run(client, [request("first", prefix, 1)])
        for batch in (60, 256):
            prompts = [
                prefix + [rng.randrange(20000) for _ in range(rng.randrange(1, 90))] for _ in range(batch)
            ]
            before = client.core.executor.worker.runner.shared_prefixes.steps_shared
            assert all(d < 0.08 for d in _differences(client, prompts, 24)), batch
            assert client.core.executor.worker.runner.shared_prefixes.steps_shared > before + 10
    finally:
        client.shutdown()


@pytest.mark.parametrize(
    ("scheme", "bound"),
    [("fp8", 0.2), ("awq", 0.02), ("gptq", 0.02)],
)
def test_quantized_tokens_score_alike(tmp_path: Path, scheme: str, bound: float) -> None:
    four_bits = {"quant_method": scheme, "bits": 4, "group_size": 128}
    own = {"awq": {"version": "gemm"}, "gptq": {"desc_act": False}}
    quantized: dict[str, Any] = {"quantization": "fp8"}
    if scheme in own:
        quantized = {"hf_overrides": {"quantization_config": four_bits | own[scheme]}}
    client = _engine(
        tmp_path, LARGE, kv_cache_memory_bytes=2**30, max_num_seqs=256, dtype="bfloat16", **quantized
    )
    rng = random.Random(10)
    try:
        for batch in (1, 4, 24, 100, 256):
            prompts = [[rng.randrange(20000) for _ in range(rng.randrange(20, 200))] for _ in range(batch)]
            found = _differences(client, prompts, 24)
            assert sum(found) / len(found) < bound, batch
    finally:
        client.shutdown()
