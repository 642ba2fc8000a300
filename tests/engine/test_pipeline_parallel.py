"""Pipeline parallelism between CPU processes: the same stages, links and micro-batches as between GPUs, over gloo."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fixtures.engine_client import request
from fixtures.reference import random_prompts
from fixtures.slow_worker import STEP_SECONDS, SlowWorker
from fixtures.tiny_models import VOCAB_SIZE, tiny_model
from kubeinfer.async_llm import AsyncLLM
from kubeinfer.distributed.executor import make_executor
from kubeinfer.engine.core import EngineCore
from kubeinfer.engine.defaults import resolve_defaults
from kubeinfer.engine.in_process import InProcessClient
from kubeinfer.engine.messages import EngineOutput, EngineRequest
from kubeinfer.engine.process_client import ProcessClient
from kubeinfer.errors import EngineDeadError, ModelLoadError, OptionError
from kubeinfer.layers.parallel import SingleGroup, Stage
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.model_config import load_model_config
from kubeinfer.models.registry import model_class
from kubeinfer.options import EngineOptions
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.weights.readers import iterate_tensors

pytestmark = pytest.mark.usefixtures("forked_ranks")

PROMPTS = random_prompts(20, [1, 2, 7, 16, 31, 33, 48, 64, 90, 130], VOCAB_SIZE)
SMALL = {"block_size": 8, "num_gpu_blocks_override": 34, "max_num_batched_tokens": 48, "max_num_seqs": 10}


def options(name: str, **values: Any) -> EngineOptions:
    values = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 16 << 20} | values
    return EngineOptions(model=str(tiny_model(name)), device="cpu", **values)


@contextmanager
def engine(name: str, **values: Any) -> Iterator[InProcessClient]:
    client = InProcessClient(options(name, **values))
    try:
        yield client
        client.check_integrity()
    finally:
        client.shutdown()


def run(client: InProcessClient, requests: list[EngineRequest]) -> dict[str, list[EngineOutput]]:
    client.add_requests(requests)
    found: dict[str, list[EngineOutput]] = {r.request_id: [] for r in requests}
    while client.has_unfinished_requests():
        for output in client.step().outputs:
            found[output.request_id].append(output)
    return found


def tokens(outputs: dict[str, list[EngineOutput]]) -> dict[str, list[int]]:
    return {name: [t for o in found for t in o.new_token_ids] for name, found in outputs.items()}


def greedy(client: InProcessClient) -> dict[str, list[int]]:
    return tokens(run(client, [request(str(i), prompt) for i, prompt in enumerate(PROMPTS)]))


_alone: dict[str, dict[str, list[int]]] = {}


def alone(name: str) -> dict[str, list[int]]:
    """Greedy outputs of ``PROMPTS`` from one process, which other tests compare with transformers."""
    if name not in _alone:
        with engine(name) as client:
            _alone[name] = greedy(client)
    return _alone[name]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama", {"pipeline_parallel_size": 2}),
        ("llama-tied", {"pipeline_parallel_size": 2, "async_scheduling": True}),
        ("llama", {"pipeline_parallel_size": 3, "async_scheduling": True}),
        (
            "qwen2",
            {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
        ),  # tied, split over the vocabulary
        ("qwen2-sliding", {"pipeline_parallel_size": 3}),  # four layers, windows in the last two
        ("qwen3", {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "async_scheduling": True}),
        ("opt", {"pipeline_parallel_size": 3}),
        ("opt-postnorm", {"pipeline_parallel_size": 2, "async_scheduling": True}),  # projections in and out
    ],
)
def test_stages_give_the_tokens_of_one_process(name: str, values: dict[str, Any]) -> None:
    with engine(name, **values) as client:
        assert greedy(client) == alone(name)


def test_bfloat16_stages_give_the_tokens_of_one_process() -> None:
    """The layers as one call into the C library, where this processor has it; stages hand on what it keeps itself."""
    with engine("llama", dtype="bfloat16") as client:
        expected = greedy(client)
    with engine("llama", dtype="bfloat16", pipeline_parallel_size=2) as client:
        assert greedy(client) == expected


@pytest.mark.parametrize("overlap", [False, True])
def test_chunks_preemption_and_prefix_hits_change_no_token(overlap: bool) -> None:
    with engine("qwen2-sliding", pipeline_parallel_size=2, async_scheduling=overlap, **SMALL) as client:
        assert greedy(client) == alone("qwen2-sliding")
        assert client.core.scheduler.stats().num_preemptions > 3
    with engine("llama", pipeline_parallel_size=2, async_scheduling=overlap, block_size=8) as client:
        assert greedy(client) == alone("llama")
        assert greedy(client) == alone("llama")
        assert client.core.scheduler.stats().prefix_cache_hits >= sum((len(p) - 1) // 8 * 8 for p in PROMPTS)


_SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    {"frequency_penalty": 0.7, "min_tokens": 5, "logprobs": 3},
    {"bad_words_token_ids": [[7, 9], [11]], "prompt_logprobs": 2},
    {"temperature": 1.2, "top_k": 9, "min_p": 0.02, "seed": 5, "logit_bias": {17: 3.0}},
    {"logprobs": 1, "prompt_logprobs": 0},
]


def test_what_a_request_asks_for_is_done_on_the_last_stage() -> None:
    requests = [request(str(i), p, 14, **_SAMPLED[i % len(_SAMPLED)]) for i, p in enumerate(PROMPTS)]
    small = {"max_num_batched_tokens": 64, "max_num_seqs": 12}
    with engine("llama", **small) as client:
        expected = run(client, requests)
    with engine("llama", pipeline_parallel_size=2, async_scheduling=True, **small) as client:
        found = run(client, requests)
    assert tokens(found) == tokens(expected)
    for name, outputs in found.items():
        for got, wanted in zip(outputs, expected[name], strict=True):
            for some, others in (
                (got.logprobs, wanted.logprobs),
                (got.prompt_logprobs, wanted.prompt_logprobs),
            ):
                assert (some is None) == (others is None)
                for entry, other in zip(some or (), others or (), strict=True):
                    assert (entry is None) == (other is None)
                    if entry is not None:
                        assert entry.token_ids[0] == other.token_ids[0]
                        assert entry.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert any(o.prompt_logprobs for outputs in found.values() for o in outputs)


def test_aborts_at_any_moment_leak_nothing_and_touch_nobody_else() -> None:
    rng = random.Random(5)
    expected = alone("llama")
    with engine("llama", pipeline_parallel_size=2, async_scheduling=True, **SMALL) as client:
        got: dict[str, list[int]] = {}
        ended: set[str] = set()
        aborted: set[str] = set()
        for number in range(60):
            name = f"{number}:{number % len(PROMPTS)}"
            client.add_requests([request(name, PROMPTS[number % len(PROMPTS)])])
            got[name] = []
            if rng.random() < 0.4:
                victim = rng.choice(sorted(got.keys() - ended))
                aborted.add(victim)
                client.abort_requests([victim])
            for _ in range(rng.randrange(5)):
                for output in client.step().outputs:
                    got[output.request_id] += output.new_token_ids
                    if output.finish_reason:
                        ended.add(output.request_id)
            client.check_integrity()
        while client.has_unfinished_requests():
            for output in client.step().outputs:
                got[output.request_id] += output.new_token_ids
        scheduler = client.core.scheduler
        assert scheduler.kv_cache.num_free == scheduler.kv_cache.num_usable
    assert len(aborted) > 10
    for name, found in got.items():
        wanted = expected[name.split(":")[1]]
        assert found == (wanted[: len(found)] if name in aborted else wanted)


@pytest.mark.parametrize("overlap", [False, True])
def test_all_stages_work_at_once(overlap: bool) -> None:
    values = resolve_defaults(options("llama", pipeline_parallel_size=3, async_scheduling=overlap))
    config, limits = load_model_config(values), (32, 512)
    core = EngineCore(values, config, make_executor(SlowWorker, values, config, limits), limits)
    try:
        core.add_requests([request(str(i), prompt, 20) for i, prompt in enumerate(PROMPTS)])
        for _ in range(6):
            core.step()
        began, first = time.perf_counter(), core.scheduler.num_steps
        for _ in range(40):
            core.step()
        seconds = (time.perf_counter() - began) / (core.scheduler.num_steps - first)
    finally:
        core.shutdown()
    assert STEP_SECONDS <= seconds < 1.8 * STEP_SECONDS  # in turn it would be three times that


def test_a_killed_stage_ends_the_engine_with_its_reason_last() -> None:
    script = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from engine.test_pipeline_parallel import PROMPTS, options, request
        from kubeinfer.engine.in_process import InProcessClient

        client = InProcessClient(options("llama", pipeline_parallel_size=3))
        client.add_requests([request(str(i), prompt, 100) for i, prompt in enumerate(PROMPTS)])
        for _ in range(9):
            client.step()
        client.core.executor._processes[1].kill()
        while client.has_unfinished_requests():
            client.step()
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parents[1])],
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].endswith("the worker of rank 2 died: exit status -9")


async def test_a_server_streams_through_stages_and_tells_its_clients_which_rank_died() -> None:
    values = options("llama", pipeline_parallel_size=2, tensor_parallel_size=2)
    client = ProcessClient(values)
    llm = AsyncLLM(values, client)
    ranks = psutil.Process(client.pid).children()
    try:
        assert len(ranks) == 3
        params = SamplingParams(max_tokens=16, ignore_eos=True, temperature=0)

        async def stream(index: int) -> list[int]:
            found: list[int] = []
            async for part in llm.generate(PROMPTS[index], params, f"r{index}"):
                found += part.outputs[0].token_ids
            return found

        found = await asyncio.gather(*(stream(index) for index in range(8)))
        assert found == [alone("llama")[str(index)] for index in range(8)]
        sorted(ranks, key=lambda p: p.create_time())[2].kill()  # idle: nobody waits for it
        await asyncio.sleep(1)
        with pytest.raises(EngineDeadError, match="the worker of rank 3 died"):
            await stream(9)
    finally:
        llm.shutdown()
    assert not [rank for rank in ranks if rank.is_running()]


def test_sizes_that_cannot_be_say_so() -> None:
    with pytest.raises(OptionError, match="pipeline_parallel_size 4 is more than the model's 3 layers"):
        InProcessClient(options("llama", pipeline_parallel_size=4))
    with pytest.raises(OptionError, match="uni is one process, but pipeline_parallel_size 2"):
        InProcessClient(options("llama", pipeline_parallel_size=2, distributed_executor_backend="uni"))


@pytest.mark.parametrize("total", range(1, 30))
def test_every_layer_is_in_one_stage(total: int) -> None:
    for count in range(1, total + 1):
        stages = [Stage(index, count).layers(total) for index in range(count)]
        assert [layer for stage in stages for layer in stage] == list(range(total))
        sizes = [len(stage) for stage in stages]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[-1] == min(sizes)  # the last has the head as well


def _store(name: str, stage: Stage, extra: dict[str, torch.Tensor], drop: str = "") -> ParameterStore:
    config = load_model_config(options(name))
    store = ParameterStore(torch.device("cpu"), torch.float32, SingleGroup(), stage=stage)
    model = model_class(config.architecture)(config, store)
    checkpoint = [(n, t) for n, t in iterate_tensors(config.path) if n != drop]
    store.load([*checkpoint, *extra.items()], model.optional_weights, model.weights_elsewhere)
    return store


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "opt-postnorm"])
def test_each_stage_holds_its_own_weights_only(name: str) -> None:
    whole = _store(name, Stage(), {})
    parts = [_store(name, Stage(index, 3), {}) for index in range(3)]
    assert set(whole.slots) == set().union(*(part.slots for part in parts))
    twice = sum(part.num_bytes for part in parts) - whole.num_bytes
    tied = whole.slots.get("model.embed_tokens.weight") or whole.slots["model.decoder.embed_tokens.weight"]
    assert twice == (0 if name == "llama" else tied[0].into.nbytes)


def test_a_tensor_of_no_stage_or_missing_from_its_own_is_an_error() -> None:
    for index in range(3):
        with pytest.raises(ModelLoadError, match=r"no place for: model\.layers\.7\.mlp\.up_proj\.weight"):
            _store("llama", Stage(index, 3), {"model.layers.7.mlp.up_proj.weight": torch.zeros(1)})
    with pytest.raises(ModelLoadError, match=r"lacks model\.layers\.2\.mlp\.down_proj\.weight"):
        _store("llama", Stage(2, 3), {}, drop="model.layers.2.mlp.down_proj.weight")
