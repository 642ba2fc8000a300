"""Quantized checkpoints on the CPU: greedy tokens are those of the dequantized weights in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fixtures.quantized import GROUP, SCHEMES, quantized_pair
from fixtures.reference import assert_greedy, random_prompts, reference_model
from fixtures.tiny_models import VOCAB_SIZE, tiny_model
from kubeinfer import LLM, SamplingParams
from kubeinfer.errors import ModelLoadError, OptionError
from kubeinfer.layers.linear import ColumnLinear, RowLinear
from kubeinfer.layers.parallel import Group
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.layers.quantization.fp8 import FP8Weight
from kubeinfer.layers.quantization.grouped_int import GroupedIntWeight, Int4Method
from kubeinfer.quantization import FP8Config, GroupedIntConfig, QuantizationConfig

pytestmark = pytest.mark.usefixtures("forked_ranks")

PROMPTS = random_prompts(12, [1, 5, 17, 33, 60], VOCAB_SIZE)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 16 << 20,
}  # fmt: skip


def outputs(folder: Path, **options: Any) -> list[list[int]]:
    with LLM(str(folder), **{**OPTIONS, **options}) as llm:
        return [list(r.outputs[0].token_ids) for r in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def assert_equals(plain: Path, got: list[list[int]], where: str) -> None:
    model = reference_model(plain)
    ties = assert_greedy(model, PROMPTS, got, where)
    assert ties <= 1, f"{where}: {ties} ties"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("base", ["llama", "qwen2"])
def test_tokens_are_those_of_the_dequantized_weights(tmp_path: Path, base: str, scheme: str) -> None:
    quantized, plain = quantized_pair(base, scheme, tmp_path)
    assert_equals(plain, outputs(quantized), f"{base} {scheme}")


@pytest.mark.parametrize(("base", "scheme"), [("opt", "awq"), ("qwen3", "fp8-block"), ("llama-bias", "gptq")])
def test_other_architectures(tmp_path: Path, base: str, scheme: str) -> None:
    quantized, plain = quantized_pair(base, scheme, tmp_path)
    assert_equals(plain, outputs(quantized), f"{base} {scheme}")


@pytest.mark.parametrize("scheme", ["awq", "fp8"])
def test_layers_that_are_left_unquantized(tmp_path: Path, scheme: str) -> None:
    quantized, plain = quantized_pair("llama", scheme, tmp_path, skip="mlp")
    assert_equals(plain, outputs(quantized), scheme)


@pytest.mark.parametrize("scheme", ["awq", "gptq", "gptq-v2", "gptq-act-order", "gptq-channel"])
def test_our_layout_of_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """What a GPU would get, multiplied by the references of its kernels."""
    monkeypatch.setattr(GroupedIntWeight, "_why_dense", lambda _: None)
    quantized, plain = quantized_pair("qwen2", scheme, tmp_path)
    assert_equals(plain, outputs(quantized), scheme)


@pytest.mark.parametrize("scheme", ["fp8", "fp8-static", "fp8-block", "compressed-tensors"])
def test_activations_in_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """Norms and activations that quantize for the layer after them, by the references of the kernels: scores stay near."""
    monkeypatch.setattr(FP8Weight, "_why_dense", lambda _: None)
    monkeypatch.setattr("kubeinfer.layers.quantization.fp8._KERNEL_BLOCK", GROUP)
    quantized, plain = quantized_pair("qwen2", scheme, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scores = []
    for folder in (quantized, plain):
        with LLM(str(folder), **OPTIONS) as llm:
            scores.append(
                [
                    entry[token].logprob
                    for result in llm.generate(PROMPTS, params, use_tqdm=False)
                    for entry, token in zip(result.prompt_logprobs or (), result.prompt_token_ids)
                    if entry is not None
                ]
            )
    off = sum(abs(a - b) for a, b in zip(*scores, strict=True)) / len(scores[0])
    # Unrelated tokens would be about 6 off.
    assert 0.05 < off < (2.5 if scheme == "fp8-static" else 1.3)


def test_a_bias_of_zeros_that_the_model_does_not_have_is_no_error(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.bias"
    quantized, plain = quantized_pair("llama", "gptq", tmp_path, **{name: torch.zeros(64)})
    assert_equals(plain, outputs(quantized), "gptq")
    quantized, _ = quantized_pair("llama", "gptq", tmp_path / "b", **{name: torch.ones(64)})
    with pytest.raises(ModelLoadError, match=r"q_proj\.bias is not zero"):
        outputs(quantized)


def test_fp8_of_unquantized_weights(tmp_path: Path) -> None:
    """A scale an output, made at load: the tokens of weights that were rounded so by hand."""
    _, plain = quantized_pair("llama", "fp8", tmp_path)
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_model("llama") / "model.safetensors")
    for name, weight in state.items():
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 448
            state[name] = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    save_file(state, plain / "model.safetensors", {"format": "pt"})
    assert_equals(plain, outputs(tiny_model("llama"), quantization="fp8"), "fp8 at load")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dummy_weights(tmp_path: Path, scheme: str) -> None:
    quantized, _ = quantized_pair("llama", scheme, tmp_path)
    (quantized / "model.safetensors").unlink()
    got = outputs(quantized, load_format="dummy", dtype="bfloat16")
    assert all(len(tokens) == GREEDY.max_tokens for tokens in got)


def test_dummy_weights_in_fp8() -> None:
    got = outputs(tiny_model("llama"), load_format="dummy", quantization="fp8")
    assert all(len(tokens) == GREEDY.max_tokens for tokens in got)


@pytest.mark.parametrize(
    "scheme", ["fp8-static", "fp8-block", "compressed-tensors", "awq", "gptq", "gptq-act-order"]
)
def test_two_ranks_hold_the_right_slices(tmp_path: Path, scheme: str) -> None:
    quantized, plain = quantized_pair("llama", scheme, tmp_path)
    assert_equals(plain, outputs(quantized, tensor_parallel_size=2), scheme)


class Second:
    """Rank 1 of 2."""

    rank, size = 1, 2


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (GroupedIntConfig("awq", 4, 64), "within a group of 64 quantized ones"),
        (GroupedIntConfig("gptq", 4, 64), "within a group of 64 quantized ones"),
        (FP8Config(block=(64, 64), scale_name="weight_scale_inv"), "within a block of 64 that share a scale"),
    ],
)
def test_slices_that_cut_a_group_are_refused_by_name(config: QuantizationConfig, what: str) -> None:
    store = ParameterStore(torch.device("cpu"), torch.float32, cast(Group, Second()), quantization=config)
    with pytest.raises(OptionError, match=f"tensor_parallel_size 2 cuts the 192 inputs of o_proj {what}"):
        RowLinear(store, "o_proj", 64, 192, False)
    if isinstance(config, GroupedIntConfig):
        with pytest.raises(
            OptionError, match="tensor_parallel_size 2 cuts the 24 outputs of up_proj within a word of 8"
        ):
            ColumnLinear(store, ["up_proj"], [24], 192, False)


@pytest.mark.parametrize("scheme", ["awq", "gptq"])
def test_the_second_ranks_inputs_in_our_layout(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(GroupedIntWeight, "_why_dense", lambda _: None)
    _, pack = SCHEMES[scheme]
    tensors, plain = pack("model.layers.0.mlp.down_proj.weight", torch.randn(40, 256))
    offset = 1 if scheme == "gptq" else 0
    store = ParameterStore(
        torch.device("cpu"),
        torch.float32,
        cast(Group, Second()),
        quantization=GroupedIntConfig(scheme, 4, GROUP, (), offset),
    )
    layer = RowLinear(store, "down_proj", 40, 256, False)
    store.load((f"down_proj.{suffix}", tensor) for suffix, tensor in tensors.items())
    layer.finish_loading()
    assert isinstance(layer.method, Int4Method)
    x = torch.randn(3, 128)
    assert torch.allclose(layer.method.apply(x, None), x @ plain[:, 128:].T, atol=1e-4)


def change(folder: Path, **settings: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {**config.get("quantization_config", {}), **settings}
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("scheme", "settings", "words"),
    [
        ("awq", {"bits": 3}, "AWQ weights of 3 bits"),
        ("awq", {"version": "gemv"}, "in the gemv layout"),
        ("awq", {"group_size": 48}, "group_size 48"),
        ("gptq", {"bits": 3}, "GPTQ weights of 3 bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
        ("gptq", {"lm_head": True}, "lm_head"),
        ("gptq", {"dynamic": {"-:.*mlp.*": {}}}, "differ between layers"),
        ("fp8", {"activation_scheme": "odd"}, "activation_scheme 'odd'"),
        ("fp8", {"fmt": "e5m2"}, "only e4m3"),
        ("fp8", {"quant_method": "bitsandbytes"}, "quantization bitsandbytes is not supported"),
        ("compressed-tensors", {"format": "pack-quantized"}, "compressed-tensors of format pack-quantized"),
        ("fp8", {"weight_block_size": ["a", 1]}, "cannot be read"),
        ("awq", {"modules_to_not_convert": ["q_proj"]}, "one product here"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, scheme: str, settings: dict[str, Any], words: str
) -> None:
    folder = change(quantized_pair("llama", scheme, tmp_path)[0], **settings)
    with pytest.raises(ModelLoadError, match=words):
        outputs(folder)


@pytest.mark.parametrize(
    ("scheme", "asked", "words"),
    [
        ("awq", "fp8", "quantized with awq"),
        ("gptq", "awq_marlin", "quantized with gptq"),
        (None, "awq", "has unquantized weights"),
        (None, "squeezellm", "squeezellm is not supported"),
        ("fp8", "bitsandbytes", "bitsandbytes is not supported"),
    ],
)
def test_another_quantization_than_the_checkpoints(
    tmp_path: Path, scheme: str | None, asked: str, words: str
) -> None:
    folder = tiny_model("llama") if scheme is None else quantized_pair("llama", scheme, tmp_path)[0]
    with pytest.raises(OptionError, match=words):
        outputs(folder, quantization=asked)


@pytest.mark.parametrize(
    ("scheme", "asked"), [("awq", "awq_marlin"), ("gptq", "gptq_marlin"), ("fp8", "fp8")]
)
def test_spellings_that_mean_the_checkpoints_own(tmp_path: Path, scheme: str, asked: str) -> None:
    quantized, _ = quantized_pair("llama", scheme, tmp_path)
    assert outputs(quantized, quantization=asked) == outputs(quantized)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (
            "model.layers.0.mlp.up_proj.weight",
            torch.zeros(128, 64),
            "is torch.float32, but quantization_config says FP8",
        ),
        ("model.layers.0.mlp.up_proj.weight_scale", torch.zeros(3), "neither a scale of the whole weight"),
        ("model.layers.0.mlp.up_proj.input_scale", torch.tensor(1.0), "no place for"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, name: str, tensor: torch.Tensor, words: str) -> None:
    quantized, _ = quantized_pair("llama", "fp8", tmp_path, **{name: tensor})
    with pytest.raises(ModelLoadError, match=words):
        outputs(quantized)
