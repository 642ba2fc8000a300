"""Weights in host memory: which layers go there, and that a model computes the same with them."""

from __future__ import annotations

import logging
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixtures.streaming_worker import StreamingWorker
from fixtures.tiny_models import tiny_model
from kubeinfer.engine.client import make_client
from kubeinfer.engine.messages import EngineRequest
from kubeinfer.errors import OptionError
from kubeinfer.layers.parallel import SingleGroup
from kubeinfer.layers.parameters import HostLayers, ParameterStore
from kubeinfer.options import EngineOptions
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.worker.host_pool import host_memory
from kubeinfer.worker.weight_streamer import WeightStreamer, choose_layers, freed_bytes


@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=80),
    budget=st.integers(1, 5000),
    first=st.integers(0, 40),
)
def test_enough_layers_are_chosen_and_no_more(sizes: list[int], budget: int, first: int) -> None:
    layer_bytes = {first + i: size for i, size in enumerate(sizes)}
    chosen = choose_layers(layer_bytes, budget)
    assert chosen <= set(layer_bytes)
    freed = freed_bytes([layer_bytes[i] for i in chosen])
    if freed < budget:
        assert len(chosen) == (len(sizes) if len(sizes) > 2 else 0)
    elif len(set(sizes)) == 1 and len(chosen) > 3:
        assert freed - sizes[0] < budget


def test_chosen_layers_are_spread_evenly() -> None:
    for total in (8, 28, 80):
        for count in range(3, total + 1):
            chosen = sorted(choose_layers(dict.fromkeys(range(total), 10), 10 * (count - 2)))
            assert len(chosen) == count
            gaps = [b - a for a, b in pairwise(chosen)]
            assert max(gaps) - min(gaps) <= 1


def test_a_store_makes_only_matrices_of_host_layers_in_host_memory() -> None:
    store = ParameterStore(
        torch.device("meta"), torch.bfloat16, SingleGroup(), HostLayers(frozenset({1}), host_memory)
    )
    for layer in range(2):
        store.begin_layer(layer)
        matrix, vector = store.empty(6, 4), store.empty(4)
        assert matrix.device.type == ("cpu" if layer == 1 else "meta")
        assert vector.device.type == "meta"
    store.begin_layer(None)
    assert store.empty(6, 4).device.type == "meta"
    assert store.layer_bytes == {0: 48, 1: 48}
    assert (store.num_bytes, store.num_host_bytes) == (48 + 48 + 16, 48)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_every_layer_finds_its_own_weights(count: int) -> None:
    torch.manual_seed(count)
    layers = [[torch.randn(5 + i, 3), torch.randn(2, 100)] for i in range(count)]
    streamer = WeightStreamer(layers, torch.device("cpu"))
    assert streamer.staging_bytes % 512 == 0
    for _ in range(3):
        streamer.begin()
        for i in range(count):
            streamer.enter(i)
            for view, tensor in zip(streamer.views[i], layers[i], strict=True):
                assert view.data_ptr() % 16 == 0
                assert torch.equal(view, tensor)
                assert view.data_ptr() != tensor.data_ptr()
            streamer.leave(i)


def make(name: str, **options: Any) -> Any:
    options = {"dtype": "float32", "max_model_len": 256, **options}
    return make_client(EngineOptions(model=str(tiny_model(name)), device="cpu", **options))


def generate(client: Any) -> list[list[int]]:
    rng = random.Random(2)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    found: dict[str, list[int]] = {}
    for i in range(16):
        prompt = [rng.randrange(5, 500) for _ in range(rng.randrange(1, 90))]
        client.add_requests(
            [EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params, seed=0, max_tokens=12)]
        )
        found[str(i)] = []
    while client.has_unfinished_requests():
        for output in client.step().outputs:
            found[output.request_id] += output.new_token_ids
    return [found[str(i)] for i in range(16)]


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "qwen3", "opt"])
def test_outputs_are_the_same(monkeypatch: pytest.MonkeyPatch, name: str, load_format: str) -> None:
    plain = make(name, load_format=load_format)
    expected = generate(plain)
    monkeypatch.setattr("kubeinfer.worker.worker.Worker", StreamingWorker)
    streamed = make(name, load_format=load_format)
    assert generate(streamed) == expected
    worker = streamed.core.executor.worker
    assert len(worker.streamer.views) == len(worker.runner.model.layers)
    streamed.shutdown()


@pytest.mark.usefixtures("forked_ranks")
def test_two_ranks_stream_their_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(make("llama"))
    monkeypatch.setattr("kubeinfer.worker.worker.Worker", StreamingWorker)
    streamed = make("llama", tensor_parallel_size=2)
    assert generate(streamed) == expected
    streamed.shutdown()


def test_what_cannot_be_freed_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kubeinfer.worker.worker.Worker", StreamingWorker)
    with caplog.at_level(logging.WARNING):
        make("llama").shutdown()
    assert "cpu_offload_gb asks for 1024.00 GiB, but streaming all" in caplog.text


def test_more_than_the_host_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubeinfer.worker.worker.Worker", StreamingWorker)
    monkeypatch.setattr("kubeinfer.worker.worker.free_host_bytes", lambda: 100)
    with pytest.raises(OptionError, match="cpu_offload_gb asks for") as refused:
        make("llama")
    assert refused.value.option == "cpu_offload_gb"
