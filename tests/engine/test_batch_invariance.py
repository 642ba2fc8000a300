"""batch_invariant: a request's tokens and log-probabilities are the same to the bit whatever runs beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fixtures.reference import random_prompts
from fixtures.tiny_models import VOCAB_SIZE, tiny_model
from kubeinfer.engine.core import make_core
from kubeinfer.engine.defaults import resolve_defaults
from kubeinfer.engine.in_process import InProcessClient
from kubeinfer.engine.messages import EngineOutput, EngineRequest
from kubeinfer.errors import OptionError
from kubeinfer.kernels.batch_invariance import use_batch_invariance
from kubeinfer.options import EngineOptions
from kubeinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.usefixtures("forked_ranks")

PROMPTS = random_prompts(14, [1, 2, 9, 16, 17, 31, 40, 64], VOCAB_SIZE, seed=3)
_KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.9, "logprobs": 0, "prompt_logprobs": 1},
    {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "logprobs": 1},
    {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.2, "logprobs": 3},
]


@pytest.fixture(autouse=True)
def _not_for_the_tests_that_follow() -> Iterator[None]:
    """The last step's wish stays with the process."""
    yield
    use_batch_invariance(False)


def request(index: int) -> EngineRequest:
    params = SamplingParams(ignore_eos=True, seed=index, **_KINDS[index % len(_KINDS)])
    return EngineRequest(
        request_id=str(index), prompt_token_ids=PROMPTS[index], params=params, seed=index, max_tokens=10
    )


def start(name: str, dtype: str, **values: Any) -> InProcessClient:
    return InProcessClient(
        EngineOptions(
            **{
                "model": str(tiny_model(name, dtype=dtype)), "device": "cpu", "dtype": dtype, "max_model_len": 128,
                "kv_cache_memory_bytes": 8 << 20, "batch_invariant": True,
            }
            | values
        )
    )  # fmt: skip


def step(client: InProcessClient, found: dict[str, list[EngineOutput]]) -> None:
    for output in client.step().outputs:
        found.setdefault(output.request_id, []).append(output)


def bits(outputs: list[EngineOutput]) -> list[Any]:
    """What the request got, to the bit: floats compare by value here, and no value is NaN."""
    return [(o.new_token_ids, o.logprobs, o.prompt_logprobs, o.finish_reason) for o in outputs]


def one_at_a_time(client: InProcessClient) -> dict[str, list[Any]]:
    found: dict[str, list[EngineOutput]] = {}
    for index in range(len(PROMPTS)):
        client.add_requests([request(index)])
        while client.has_unfinished_requests():
            step(client, found)
    return {name: bits(outputs) for name, outputs in found.items()}


def together(client: InProcessClient, seed: int) -> dict[str, list[Any]]:
    """In a random order, arriving at random moments, some beside their own likes."""
    rng = random.Random(seed)
    order = list(range(len(PROMPTS)))
    rng.shuffle(order)
    found: dict[str, list[EngineOutput]] = {}
    for index in order:
        client.add_requests([request(index)])
        for _ in range(rng.randrange(3)):
            step(client, found)
    while client.has_unfinished_requests():
        step(client, found)
    client.check_integrity()
    return {name: bits(outputs) for name, outputs in found.items()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "float32"),
        ("llama", "bfloat16"),  # the library's stack of layers, where this processor has it
        ("qwen3", "bfloat16"),
        ("qwen2-sliding", "float32"),
        ("opt", "bfloat16"),
    ],
)
def test_company_chunks_and_cache_hits_change_no_bit(name: str, dtype: str) -> None:
    client = start(name, dtype, max_num_seqs=1, enable_prefix_caching=False)
    expected = one_at_a_time(client)
    client.shutdown()
    assert len({str(e) for e in expected.values()}) == len(PROMPTS)
    for seed, values in enumerate(
        (
            {},
            {"max_num_batched_tokens": 23, "max_num_seqs": 9, "block_size": 8},
            {"max_num_batched_tokens": 16, "max_num_seqs": 6, "block_size": 8, "num_gpu_blocks_override": 20},
        )
    ):
        client = start(name, dtype, **values)
        assert together(client, seed) == expected, values
        if not values:
            assert together(client, 9) == expected, "prompts in the prefix cache"
            assert client.core.scheduler.stats().prefix_cache_hits > 0
        client.shutdown()


@pytest.mark.parametrize("values", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_ranks_and_stages_keep_it(values: dict[str, int]) -> None:
    client = start("llama", "float32", max_num_seqs=9, **values)
    expected = one_at_a_time(client)
    client.reset_prefix_cache()
    scheduler = client.core.scheduler  # the engine is kept, for ranks take seconds to start
    scheduler.config = replace(scheduler.config, max_num_batched_tokens=23)
    assert together(client, 1) == expected
    client.shutdown()


def test_an_engine_without_it_in_the_same_process_is_not_slowed() -> None:
    from kubeinfer.kernels.batch_invariance import batch_invariant

    invariant, plain = start("llama", "float32"), start("llama", "float32", batch_invariant=False)
    for client, wanted in ((invariant, True), (plain, False), (invariant, True)):
        client.add_requests([request(3)])
        while client.has_unfinished_requests():
            client.step()
            assert batch_invariant() == wanted
    invariant.shutdown()
    plain.shutdown()


def test_the_environment_asks_for_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions(model=str(tiny_model("llama")), device="cpu")
    assert not resolve_defaults(options).batch_invariant
    monkeypatch.setenv("KUBEINFER_BATCH_INVARIANT", "1")
    assert resolve_defaults(options).batch_invariant


def test_quantized_weights_are_refused() -> None:
    options = EngineOptions(
        model=str(tiny_model("llama")), device="cpu", batch_invariant=True, quantization="awq"
    )
    with pytest.raises(OptionError, match="quantization awq"):
        make_core(options)
