"""GGUF: values bit for bit those of the gguf package, names and layouts those of transformers, config.json from metadata."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fixtures.smollm2 import needs_smollm2, smollm2_reference
from fixtures.tiny_gguf import write_gguf
from fixtures.tiny_models import smollm2_gguf, tiny_model
from kubeinfer.errors import ModelLoadError
from kubeinfer.weights.readers import (
    checkpoint_size,
    gguf_config,
    iterate_gguf_raw,
    iterate_tensors,
    read_gguf,
)
from kubeinfer.weights.readers.gguf_dequant import dequantize

_FLOATS = {"F32", "F16", "BF16", "F64"}
_NOT_DEQUANTIZED = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "Q1_0"}
DEQUANTIZED = [t.name for t in gguf.GGMLQuantizationType if t.name not in _FLOATS | _NOT_DEQUANTIZED]
QUANTIZED_BY_PACKAGE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]


def same_bits(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    return bool(np.array_equal(ours.numpy().view(np.uint32), theirs.view(np.uint32)))


@pytest.mark.parametrize("name", QUANTIZED_BY_PACKAGE)
def test_quantized_values_are_the_packages_bit_for_bit(name):
    kind = gguf.GGMLQuantizationType[name]
    rng = np.random.default_rng(1)
    # wide rows, so that several chunks and uneven tails are met
    values = (rng.standard_normal((37, 4096)) * rng.uniform(0.01, 10, (37, 1))).astype(np.float32)
    values[3] = 0
    raw = gguf.quants.quantize(values, kind)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    ours = dequantize(torch.from_numpy(raw).reshape(-1), name, values.shape, block)
    assert same_bits(ours, gguf.quants.dequantize(raw, kind))
    for dtype in (torch.bfloat16, torch.float16):
        rounded = dequantize(torch.from_numpy(raw).reshape(-1), name, values.shape, block, dtype)
        assert torch.equal(rounded, ours.to(dtype))


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_random_blocks_of_every_type(name):
    """Any bytes are valid quants; only the scales are kept finite, so that each type's bit fields are all met."""
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, (64 * 3, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, kind)
    finite = np.isfinite(theirs).all(axis=1)
    assert finite.sum() > 64
    raw, theirs = np.ascontiguousarray(raw[finite]), np.ascontiguousarray(theirs[finite])
    ours = dequantize(torch.from_numpy(raw).reshape(-1), name, theirs.shape, block)
    assert same_bits(ours, theirs)


def test_types_that_nothing_dequantizes_are_refused(tmp_path):
    def add(writer):
        writer.add_tensor(
            "blk.0.attn_norm.bias", np.zeros((1, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K
        )

    path = write_gguf(tiny_model("llama"), tmp_path / "m.gguf", extra=add)
    with pytest.raises(ModelLoadError, match="Q8_K cannot be dequantized"):
        list(iterate_tensors(path))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-bias", "qwen2", "qwen3"])
@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_names_and_layouts_are_those_of_the_source(tmp_path, name, quant):
    folder = tiny_model(name)
    path = write_gguf(folder, tmp_path / "m.gguf", quant)
    source = load_file(folder / "model.safetensors")
    got = dict(iterate_tensors(path, dtype=torch.float32))
    assert got.keys() == source.keys()
    kind = gguf.GGMLQuantizationType[quant]
    for key, tensor in source.items():
        expected = tensor
        if tensor.ndim > 1:
            expected = torch.from_numpy(
                gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)
            )
        assert torch.equal(got[key], expected), key


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_config_is_that_of_the_source(tmp_path, name):
    folder = tiny_model(name)
    config = json.loads((folder / "config.json").read_text())
    got = gguf_config(write_gguf(folder, tmp_path / "m.gguf"))
    for key in (
        "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "bos_token_id",
        "eos_token_id",
    ):  # fmt: skip
        assert got[key] == config[key], key
    assert got["head_dim"] == config.get("head_dim", 16)
    assert got["rms_norm_eps"] == pytest.approx(config["rms_norm_eps"], rel=1e-6)
    assert got["rope_theta"] == 10000.0
    assert got["rope_scaling"] is None
    assert got["torch_dtype"] == "float32"


def _llama3_divisors(
    theta: float, dim: int, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    out = []
    for i in range(0, dim, 2):
        wave = 2 * math.pi * theta ** (i / dim)
        if wave < original / high:
            out.append(1.0)
        elif wave > original / low:
            out.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


@pytest.mark.parametrize(
    ("theta", "dim", "factor", "low", "high", "original"),
    [
        (500000.0, 128, 8.0, 1.0, 4.0, 8192),
        (500000.0, 64, 32.0, 1.0, 4.0, 8192),
        (10000.0, 128, 4.0, 2.0, 5.0, 4096),
    ],
)
def test_llama3_scaling_from_its_divisors(tmp_path, theta, dim, factor, low, high, original):
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"rope_theta": theta, "head_dim": dim}
    (folder / "config.json").write_text(json.dumps(config))
    divisors = _llama3_divisors(theta, dim, factor, low, high, original)
    path = write_gguf(
        folder, tmp_path / "m.gguf", extra=lambda writer: writer.add_tensor("rope_freqs.weight", divisors)
    )
    assert gguf_config(path)["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    assert "rope_freqs.weight" not in {raw.name for raw in iterate_gguf_raw(path)}


def test_divisors_of_another_kind_are_refused(tmp_path):
    divisors = np.linspace(1, 9, 8, dtype=np.float32)
    path = write_gguf(
        tiny_model("llama"),
        tmp_path / "m.gguf",
        extra=lambda writer: writer.add_tensor("rope_freqs.weight", divisors),
    )
    with pytest.raises(ModelLoadError, match="not those of llama3"):
        gguf_config(path)


def test_linear_and_yarn_scaling(tmp_path):
    def linear(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(8.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    def longrope(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    folder = tiny_model("qwen2")
    path = write_gguf(folder, tmp_path / "a.gguf", extra=linear)
    assert gguf_config(path)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    path = write_gguf(folder, tmp_path / "b.gguf", extra=yarn)
    assert gguf_config(path)["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    }
    with pytest.raises(ModelLoadError, match="longrope"):
        gguf_config(write_gguf(folder, tmp_path / "c.gguf", extra=longrope))


def test_ends_of_turn_and_sliding_window(tmp_path):
    def extra(writer):
        writer.add_eot_token_id(3)
        writer.add_sliding_window(16)

    config = gguf_config(write_gguf(tiny_model("llama"), tmp_path / "m.gguf", extra=extra))
    assert config["eos_token_id"] == [1, 3]
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 16


def _split(path: Path, parts: int) -> list[Path]:
    """Split a GGUF file as llama.cpp's gguf-split does: metadata in the first part, tensors over all."""
    reader = gguf.GGUFReader(path)
    files = []
    for part in range(parts):
        file = path.with_name(f"split-{part + 1:05d}-of-{parts:05d}.gguf")
        writer = gguf.GGUFWriter(file, "llama")
        if part == 0:
            for field in reader.fields.values():
                if field.name.startswith("llama."):
                    value = field.contents()
                    (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(field.name, value)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[part::parts]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(file)
    return files


def test_split_files(tmp_path):
    whole = write_gguf(tiny_model("llama"), tmp_path / "whole.gguf", "Q8_0")
    expected = dict(iterate_tensors(whole))
    folder = tmp_path / "split"
    folder.mkdir()
    files = _split(Path(shutil.move(whole, folder / "whole.gguf")), 3)
    (folder / "whole.gguf").unlink()
    for given in (folder, files[0], files[2]):
        got = dict(iterate_tensors(given))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert gguf_config(folder)["num_hidden_layers"] == 3
    assert checkpoint_size(folder) == sum(file.stat().st_size for file in files)
    files[1].unlink()
    with pytest.raises(ModelLoadError, match=r"00002-of-00003\.gguf is missing"):
        gguf_config(files[0])


def test_parts_of_different_models(tmp_path):
    files = _split(write_gguf(tiny_model("llama"), tmp_path / "whole.gguf"), 2)
    shutil.copy(files[0], files[1])
    with pytest.raises(ModelLoadError, match="not of one model"):
        read_gguf(files[0])


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.001, 0.5, 0.999])
def test_truncated_files(tmp_path, keep):
    path = write_gguf(tiny_model("llama"), tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ModelLoadError, match=r"m\.gguf"):
        list(iterate_tensors(path))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"PK\x03\x04" + b"\0" * 100, "not a GGUF file"),
        (b"GGUF\x01\0\0\0" + b"\0" * 100, "of version 1"),
        (b"GGUF\0\0\0\x03" + b"\0" * 100, "big-endian"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 100, "truncated|damaged"),
    ],
)
def test_files_that_are_not_gguf(tmp_path, content, what):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=what):
        read_gguf(path)


def test_models_that_are_not_supported(tmp_path):
    path = write_gguf(tiny_model("qwen2"), tmp_path / "m.gguf")
    data = path.read_bytes()
    (tmp_path / "other.gguf").write_bytes(data.replace(b"qwen2", b"gemma"))
    with pytest.raises(ModelLoadError, match=r"'gemma'; llama, qwen2, qwen3 are supported"):
        gguf_config(tmp_path / "other.gguf")
    with pytest.raises(ModelLoadError, match=r"several GGUF models .*give the path"):
        list(iterate_tensors(tmp_path))
    strange = write_gguf(
        tiny_model("llama"),
        tmp_path / "strange.gguf",
        extra=lambda writer: writer.add_tensor("blk.0.ssm_in.weight", np.zeros((2, 32), np.float32)),
    )
    with pytest.raises(ModelLoadError, match=r"blk\.0\.ssm_in\.weight"):
        list(iterate_tensors(strange))


@needs_smollm2
@pytest.mark.timeout(600)  # transformers reads the file once, slowly, and the result is kept
def test_smollm2_equals_transformers():
    path = smollm2_gguf()
    reference = smollm2_reference()
    expected = load_file(reference / "model.safetensors")
    got = dict(iterate_tensors(path, dtype=torch.float32))
    assert set(got) == set(expected) - {"lm_head.weight"}
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name
    config, theirs = gguf_config(path), json.loads((reference / "config.json").read_text())
    for key in (
        "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps", "eos_token_id", "bos_token_id",
        "tie_word_embeddings",
    ):  # fmt: skip
        assert config[key] == theirs[key], key
    assert config["rope_theta"] == theirs["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_dequantization_is_faster_than_the_packages(name):
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.zeros((2048, 2048 // block * size), np.uint8)
    data = torch.from_numpy(raw).reshape(-1)
    ours, theirs = [], []
    for _ in range(5):
        start = time.process_time()
        dequantize(data, name, (2048, 2048), block, torch.bfloat16)
        middle = time.process_time()
        gguf.quants.dequantize(raw, kind)
        ours.append(middle - start)
        theirs.append(time.process_time() - middle)
    assert min(ours) < min(theirs)
