"""GGUF weights that stay quantized, by the references of their kernels: the numbers are the file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from fixtures.reference import random_prompts
from fixtures.tiny_gguf import mixed_types, write_gguf
from fixtures.tiny_models import VOCAB_SIZE, tiny_model
from kubeinfer import LLM, SamplingParams
from kubeinfer.engine.defaults import check_batch_invariant, check_offload
from kubeinfer.errors import OptionError
from kubeinfer.kernels.int4 import dequantize_int4_reference
from kubeinfer.layers.linear import ColumnLinear, GatedLinear, RowLinear
from kubeinfer.layers.parallel import Group, SingleGroup
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.layers.quantization.dense import DenseMethod
from kubeinfer.layers.quantization.gguf import GGUFWeight
from kubeinfer.layers.quantization.grouped_int import Int4Method
from kubeinfer.model_config import load_model_config
from kubeinfer.options import EngineOptions
from kubeinfer.quantization import GGUF_FORMS, GGUFConfig, GGUFType, gguf_quantization

PROMPTS = random_prompts(12, [1, 5, 17, 33, 60], VOCAB_SIZE)
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 16 << 20,
}  # fmt: skip
# Where each type's float16 scales are; their sums with 6-bit factors do not fit into 16 bits.
_SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def form(kind: str) -> GGUFType:
    return GGUFType(kind, *GGUF_FORMS[kind], *gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]])


def random_blocks(kind: str, rows: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of any bits with scales of some 0.01, and what they stand for (the package's word for it)."""
    rng = np.random.default_rng(seed)
    found = form(kind)
    raw = rng.integers(0, 256, (rows * inputs // found.block_size, found.block_bytes), dtype=np.uint8)
    for at in _SCALES[kind]:
        scales = (rng.standard_normal(len(raw)) * 0.01).astype(np.float16)
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    plain = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(rows, inputs)
    return torch.from_numpy(raw.reshape(rows, -1)), torch.from_numpy(plain)


def make_store(types: dict[str, str], group: Group | None = None) -> ParameterStore:
    config = GGUFConfig({f"{name}.weight": form(kind) for name, kind in types.items()})
    return ParameterStore(torch.device("cpu"), torch.float32, group or SingleGroup(), quantization=config)


class Rank(SingleGroup):
    """One rank of several, of which only the slices are looked at."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


def values(method: object) -> torch.Tensor:
    assert isinstance(method, Int4Method)
    return dequantize_int4_reference(method.weight, torch.float32)


@pytest.mark.parametrize("kind", list(GGUF_FORMS))
def test_repacked_values_are_the_files(kind: str) -> None:
    blocks, plain = random_blocks(kind, 32, 768)
    store = make_store({"a": kind})
    layer = ColumnLinear(store, ["a"], [32], 768, False)
    store.load([("a.weight", blocks)])
    layer.finish_loading()
    got = values(layer.method)
    if kind.endswith("_K"):
        # Scale and minimum are products, rounded to 16 bits: each by half a unit of its 11 bits.
        found = GGUFWeight(make_store({"a": kind}), layer_shard(32, 768), [form(kind)])
        codes, scales, minimums = found._unpacked(blocks, form(kind))
        spread = (codes.float() * scales.repeat_interleave(form(kind).group, 1)).abs()
        bound = (spread + minimums.abs().repeat_interleave(form(kind).group, 1)) * 2**-11 + 1e-7
        assert bool(((got - plain).abs() <= bound).all())
        assert not torch.equal(got, plain) or kind == "Q3_K"
    else:
        assert torch.equal(got, plain)
    assert store.num_bytes == layer.method.weight.num_bytes  # type: ignore[attr-defined]
    per_weight = 8 * store.num_bytes / plain.numel()
    assert per_weight == {(4, 32): 5, (8, 32): 9, (8, 16): 10}[GGUF_FORMS[kind]]


def layer_shard(rows: int, inputs: int) -> Any:
    from kubeinfer.layers.quantization import Part, Shard

    return Shard((Part("a", 0, 0, rows, rows),), inputs, 0, inputs)


@pytest.mark.parametrize("kinds", [("Q4_K", "Q6_K"), ("Q4_0", "Q4_1"), ("Q8_0", "Q4_0"), ("Q5_K", "Q4_K")])
def test_parts_of_several_types(kinds: tuple[str, str]) -> None:
    (first, plain_first), (second, plain_second) = (
        random_blocks(kind, 16, 512, i) for i, kind in enumerate(kinds)
    )
    for rank in range(2):
        store = make_store(dict(zip("ab", kinds)), Rank(rank, 2))
        layer = GatedLinear(store, "a", "b", 16, 512, False)
        store.load([("a.weight", first), ("b.weight", second)])
        layer.finish_loading()
        rows = slice(8 * rank, 8 * rank + 8)
        want = torch.cat((plain_first[rows], plain_second[rows]))
        assert torch.allclose(values(layer.method), want, rtol=0, atol=2e-3 * float(want.abs().max()))


@pytest.mark.parametrize(("kind", "inputs"), [("Q4_K", 768), ("Q6_K", 768), ("Q8_0", 192), ("Q4_0", 256)])
def test_slices_of_inputs_may_cut_blocks_but_not_groups(kind: str, inputs: int) -> None:
    """768 inputs of two ranks are three blocks: both ranks read the one in the middle."""
    blocks, plain = random_blocks(kind, 8, inputs)
    for rank in range(2):
        store = make_store({"a": kind}, Rank(rank, 2))
        layer = RowLinear(store, "a", 8, inputs, False)
        store.load([("a.weight", blocks)])
        layer.finish_loading()
        want = plain[:, inputs // 2 * rank :][:, : inputs // 2]
        assert torch.allclose(values(layer.method), want, rtol=0, atol=2e-3 * float(want.abs().max()))


def test_layers_that_cannot_stay_quantized_are_dequantized() -> None:
    store = make_store({"a": "Q8_0", "b": "Q8_0"}, Rank(0, 2))
    layers = [RowLinear(store, "a", 8, 96, False), GatedLinear(store, "b", "c", 8, 64, False)]
    assert store.stored_names == set()  # the reader dequantizes them
    store.load((f"{name}.weight", torch.ones(8, 96 if name == "a" else 64)) for name in "abc")
    for layer in layers:
        layer.finish_loading()
        assert isinstance(layer.method, DenseMethod)


def outputs(path: Path, **options: Any) -> tuple[list[list[int]], list[float]]:
    """Greedy tokens, and the scores of the prompts' tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, prompt_logprobs=0)
    tokenizer = str(tiny_model("llama"))
    with LLM(str(path), tokenizer=tokenizer, **{**OPTIONS, **options}) as llm:
        results = llm.generate(PROMPTS, params, use_tqdm=False)
    scores = [
        entry[token].logprob
        for result in results
        for entry, token in zip(result.prompt_logprobs or (), result.prompt_token_ids)
        if entry is not None
    ]
    return [list(result.outputs[0].token_ids) for result in results], scores


@pytest.mark.parametrize("base", ["llama", "llama-tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "mixed"])
def test_models_score_as_dequantized_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, quant: str
) -> None:
    path = write_gguf(tiny_model(base), tmp_path / "m.gguf", mixed_types if quant == "mixed" else quant)
    tokens, scores = outputs(path)
    found = gguf_quantization(path)
    assert found is not None
    kept = [name for name in found.types if "layers" in name]
    assert len(kept) == (7 * 3 if quant != "mixed" else 7 * 3 - 1)
    products = 0

    def counted(self: Int4Method, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        nonlocal products
        products += 1
        return plain(self, x, bias)

    plain = Int4Method.apply
    monkeypatch.setattr(Int4Method, "apply", counted)
    monkeypatch.setattr("kubeinfer.model_config._quantization", lambda *_: found)
    got_tokens, got_scores = outputs(path)
    assert products > 0
    assert got_tokens == tokens
    assert np.allclose(got_scores, scores, atol=1e-4)


def test_dummy_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "m.gguf", mixed_types)
    monkeypatch.setattr("kubeinfer.model_config._quantization", lambda *_: gguf_quantization(path))
    _, scores = outputs(path, load_format="dummy")
    assert np.isfinite(scores).all()


def test_blocks_are_kept_on_gpus_in_16_bits_only(tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "m.gguf", "Q4_0")
    assert load_model_config(EngineOptions(model=str(path), device="cpu")).quantization is None
    assert (
        load_model_config(EngineOptions(model=str(path), device="cuda", dtype="float32")).quantization is None
    )
    options = EngineOptions(model=str(path), device="cuda", batch_invariant=True, cpu_offload_gb=1)
    config = load_model_config(options)
    assert isinstance(config.quantization, GGUFConfig)
    assert config.quantization.types["model.layers.0.mlp.up_proj.weight"].name == "Q4_0"
    with pytest.raises(OptionError, match="batch_invariant does not work with quantization gguf"):
        check_batch_invariant(options, config)
    with pytest.raises(OptionError, match="cpu_offload_gb does not work with GGUF"):
        check_offload(options, config)
    fp8 = load_model_config(EngineOptions(model=str(path), device="cuda", quantization="fp8"))
    assert fp8.quantization is not None
    assert fp8.quantization.name == "fp8"
    plain = write_gguf(tiny_model("llama"), tmp_path / "p.gguf", "F16")
    assert load_model_config(EngineOptions(model=str(plain), device="cuda")).quantization is None
