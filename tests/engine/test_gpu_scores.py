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
            decoded = _run(client, [request(str(i), p, 24, logprobs=0) for i, p in enumerate(prompts)])
            again = _run(
                client,
                [
                    request(str(i), p + decoded[str(i)][0], 1, prompt_logprobs=0)
                    for i, p in enumerate(prompts)
                ],
            )
            for name, (_, scores, _) in decoded.items():
                assert again[name][2][-24:] == pytest.approx(scores, abs=0.08), (batch, name)
    finally:
        client.shutdown()
