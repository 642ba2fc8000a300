"""A model's layers as one call into the C library against the same model layer by layer. Each variant that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.tiny_models import tiny_model
from kubeinfer.layers.attention import StepContext
from kubeinfer.layers.parallel import SingleGroup
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.model_config import ModelConfig, load_model_config
from kubeinfer.models.registry import model_class
from kubeinfer.options import EngineOptions
from kubeinfer.weights.readers import iterate_tensors

pytestmark = pytest.mark.usefixtures("cpu_variant")
BLOCK_SIZE, BLOCKS = 16, 12


def load(name: str) -> tuple[Any, ModelConfig]:
    config = load_model_config(EngineOptions(model=str(tiny_model(name)), device="cpu", dtype="bfloat16"))
    store = ParameterStore(torch.device("cpu"), torch.bfloat16, SingleGroup())
    model = model_class(config.architecture)(config, store)
    store.load(iterate_tensors(config.path, "auto", dtype=torch.bfloat16), model.optional_weights)
    store.release()
    model.finish_loading()
    return model, config


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def step_of(
    lengths: list[int], starts: list[int], caches: list[Tensor], wanted: Tensor | None
) -> StepContext:
    """Sequence ``i`` computes ``lengths[i]`` tokens from position ``starts[i]``; it owns 4 blocks."""
    positions = [p for start, n in zip(starts, lengths) for p in range(start, start + n)]
    owners = [i for i, n in enumerate(lengths) for _ in range(n)]
    table = torch.arange(len(lengths) * 4, dtype=torch.int32).view(-1, 4).flip(1).contiguous()
    slots = [int(table[o, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for o, p in zip(owners, positions)]
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return StepContext(
        ints(positions), ints(slots), ints(ends), ints([s + n for s, n in zip(starts, lengths)]), table,
        max(lengths), 64, 0, caches, wanted=wanted,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["llama", "llama-bias", "llama-yarn", "mistral", "qwen2", "qwen2-sliding", "qwen3"]
)
@torch.inference_mode()
def test_one_call_equals_layer_by_layer(name: str) -> None:
    torch.manual_seed(1)
    model, config = load(name)
    stack = model.stack
    assert stack is not None
    shape = (2, BLOCKS, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    caches = [[torch.zeros(shape, dtype=torch.bfloat16) for _ in range(config.num_layers)] for _ in range(2)]
    vocab = config.vocab_size
    steps = [
        ([33, 7, 20], [0, 0, 0], None),
        ([1, 1, 17], [33, 7, 20], ints([0, 1, 18])),
        ([1, 1, 1], [34, 8, 37], None),
        ([5, 1, 2], [35, 9, 38], ints([])),
        ([2, 1, 1], [40, 10, 40], ints([2])),
    ]
    for lengths, starts, wanted in steps:
        ids = torch.randint(5, vocab, (sum(lengths),), dtype=torch.int32)
        model.stack = stack
        got = model.forward(ids, step_of(lengths, starts, caches[0], wanted))
        model.stack = None
        expected = model.forward(ids, step_of(lengths, starts, caches[1], wanted))
        assert (
            got.shape
            == expected.shape
            == (sum(lengths) if wanted is None else len(wanted), config.hidden_size)
        )
        if len(got):
            difference = (got.double() - expected.double()).norm() / expected.double().norm()
            assert difference < 3e-2
    for one, other in zip(*caches):
        assert (one.double() - other.double()).norm() <= 3e-2 * other.double().norm()


@torch.inference_mode()
def test_a_token_does_not_depend_on_its_batch() -> None:
    model, config = load("llama")
    shape = (2, BLOCKS, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    caches = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(config.num_layers)]
    ids = torch.randint(5, config.vocab_size, (40,), dtype=torch.int32)
    whole = model.forward(ids, step_of([20, 20], [0, 0], caches, None))
    last = model.forward(ids, step_of([20, 20], [0, 0], caches, ints([39])))
    assert torch.equal(whole[39:], last)
    again = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(config.num_layers)]
    assert torch.equal(whole[:20], model.forward(ids[:20], step_of([20], [0], again, None)))


def test_other_dtypes_go_layer_by_layer() -> None:
    config = load_model_config(EngineOptions(model=str(tiny_model("llama")), device="cpu", dtype="float32"))
    store = ParameterStore(torch.device("cpu"), torch.float32, SingleGroup())
    model = model_class(config.architecture)(config, store)
    store.fill_random(0)
    model.finish_loading()
    assert model.stack is None
