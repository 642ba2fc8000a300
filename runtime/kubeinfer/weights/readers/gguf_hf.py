"""What a GGUF file's names and metadata are in Hugging Face's terms: tensor names, layouts, config.json (no torch)."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

from kubeinfer.errors import ModelLoadError
from kubeinfer.weights.readers.gguf_file import GGUFFile, GGUFTensorInfo, read_gguf

ROPE_FREQS = "rope_freqs.weight"
"""Divisors of the rotary frequencies (llama3 scaling): configuration, not a weight."""

# GGUF architecture -> (architectures[0], model_type) of config.json
_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"^blk\.(\d+)\.(\w+)\.(weight|bias)$")


def hf_name(name: str, path: Path) -> str:
    """The Hugging Face name of the GGUF tensor ``name``. Raises :class:`ModelLoadError` where there is none."""
    match = _LAYER_NAME.match(name)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    base, _, kind = name.rpartition(".")
    if base in _TOP and kind in ("weight", "bias"):
        return f"{_TOP[base]}.{kind}"
    raise ModelLoadError(
        f"{path} holds a tensor {name!r} that kubeinfer has no place for; the model is not supported."
    )


def permuted_heads(name: str, file: GGUFFile) -> int | None:
    """Number of heads whose rows were interleaved when ``name`` was written, or None where rows are in HF's order.

    llama.cpp's rotary embedding for the llama architecture turns neighbours (2i, 2i+1); Hugging Face's turns halves
    (i, i + d/2). The converter reorders the rows of the q and k projections accordingly, and a reader undoes it.
    """
    if file.architecture != "llama":
        return None
    match = _LAYER_NAME.match(name)
    if match is None or match[2] not in ("attn_q", "attn_k"):
        return None
    heads = _per_layer(file, "{arch}.attention.head_count")
    return heads if match[2] == "attn_q" else _per_layer(file, "{arch}.attention.head_count_kv", heads)


def check_architecture(file: GGUFFile) -> tuple[str, str]:
    """(architecture, model_type) in Hugging Face's names. Raises :class:`ModelLoadError` for what is not supported."""
    if file.architecture not in _ARCHITECTURES:
        raise ModelLoadError(
            f"{file.path} holds a model of GGUF architecture {file.architecture!r}; "
            f"{', '.join(_ARCHITECTURES)} are supported."
        )
    if file.get("{arch}.expert_count", 0):
        raise ModelLoadError(f"{file.path} holds a mixture-of-experts model, which is not supported yet.")
    return _ARCHITECTURES[file.architecture]


def gguf_config(path: Path) -> dict[str, Any]:
    """What config.json would hold for the GGUF file ``path``, in Hugging Face's names.

    Raises :class:`ModelLoadError` for architectures that are not supported and for metadata that cannot be right.
    """
    file = read_gguf(path)
    architecture, model_type = check_architecture(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelLoadError(f"{path} has no tensor token_embd.weight: it is not a whole language model.")
    heads = _per_layer(file, "{arch}.attention.head_count")
    hidden = int(_need(file, "{arch}.embedding_length"))
    head_dim = int(file.get("{arch}.attention.key_length", hidden // heads))
    rotary = int(file.get("{arch}.rope.dimension_count", head_dim))
    if rotary != head_dim or int(file.get("{arch}.attention.value_length", head_dim)) != head_dim:
        raise ModelLoadError(
            f"{path}: heads of {head_dim} with {rotary} rotary dimensions are not supported by {architecture}."
        )
    theta = float(file.get("{arch}.rope.freq_base", 10000.0))
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _per_layer(file, "{arch}.feed_forward_length"),
        "num_hidden_layers": int(_need(file, "{arch}.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": _per_layer(file, "{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": float(_need(file, "{arch}.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, theta, head_dim),
        "max_position_embeddings": int(_need(file, "{arch}.context_length")),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        # of all four projections; qwen2 has biases on three, and no word for it
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "torch_dtype": _dtype(file),
    }
    window = file.get("{arch}.attention.sliding_window")
    if window and file.architecture == "llama":
        config |= {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": int(window),
        }
    config |= _token_ids(file)
    return config


def _need(file: GGUFFile, key: str) -> Any:
    value = file.get(key)
    if value is None:
        name = key.replace("{arch}", file.architecture)
        raise ModelLoadError(
            f"{file.path} lacks the metadata {name!r}: it is damaged or not a language model."
        )
    return value


def _per_layer(file: GGUFFile, key: str, default: int | None = None) -> int:
    """An entry that may be given once or a layer; layers that differ are not supported."""
    value = file.get(key, default)
    if value is None:
        value = _need(file, key)
    if isinstance(value, list):
        if len(set(value)) != 1:
            name = key.replace("{arch}", file.architecture)
            raise ModelLoadError(f"{file.path}: {name} differs between layers, which is not supported.")
        value = value[0]
    return int(value)


def _token_ids(file: GGUFFile) -> dict[str, Any]:
    ids: dict[str, Any] = {}
    for key in ("bos", "eos"):
        value = file.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            ids[f"{key}_token_id"] = int(value)
    ends = [ids["eos_token_id"]] if "eos_token_id" in ids else []
    # Chat models end a turn with a token of its own; Hugging Face's configs list it beside the end of text.
    for key in ("eot", "eom"):
        value = file.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and int(value) not in ends:
            ends.append(int(value))
    if len(ends) > 1:
        ids["eos_token_id"] = ends
    pad = file.get("tokenizer.ggml.padding_token_id")
    if pad is not None:
        ids["pad_token_id"] = int(pad)
    return ids


def _dtype(file: GGUFFile) -> str:
    """The type that most of the weights are stored in; bfloat16 where they are quantized."""
    by_type: dict[str, int] = {}
    for tensor in file.tensors.values():
        by_type[tensor.type_name] = by_type.get(tensor.type_name, 0) + tensor.nbytes
    most = max(by_type, key=lambda name: by_type[name])
    return {"F32": "float32", "F16": "float16"}.get(most, "bfloat16")


def _rope_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    if ROPE_FREQS in file.tensors:
        return _llama3_scaling(file.tensors[ROPE_FREQS], theta, head_dim)
    kind = str(file.get("{arch}.rope.scaling.type", "none"))
    factor = float(file.get("{arch}.rope.scaling.factor", file.get("{arch}.rope.scale_linear", 1.0)))
    if kind == "none" and "{arch}.rope.scale_linear".replace("{arch}", file.architecture) in file.metadata:
        kind = "linear"
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ModelLoadError(
            f"{file.path}: rope scaling of type {kind!r} is not supported; linear and yarn are."
        )
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    for key, name, convert in (
        ("original_context_length", "original_max_position_embeddings", int),
        ("attn_factor", "attention_factor", float),
        ("yarn_beta_fast", "beta_fast", float),
        ("yarn_beta_slow", "beta_slow", float),
    ):
        value = file.get(f"{{arch}}.rope.scaling.{key}")
        if value is not None:
            scaling[name] = convert(value)
    return scaling


def _llama3_scaling(tensor: GGUFTensorInfo, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 parameters that give the divisors in ``tensor`` (float32, head_dim / 2 of them).

    Divisors are 1 for short wavelengths, ``factor`` for long ones, and between them 1/divisor goes linearly with
    1/wavelength: smooth = (original / wavelength - low) / (high - low). Only the ratios of original, low and high
    matter, so high - low is taken as 3 (low 1 and high 4, as every published model has).
    """
    count = head_dim // 2
    if tensor.shape != (count,) or tensor.type_name != "F32":
        raise ModelLoadError(f"{tensor.path}: {tensor.name} should hold {count} float32 numbers.")
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        divisors = struct.unpack(f"<{count}f", file.read(tensor.nbytes))
    factor = max(divisors)
    waves = [2 * math.pi * theta ** (2 * i / head_dim) for i in range(count)]
    between = [
        (1 / wave, (1 / divisor - 1 / factor) / (1 - 1 / factor))
        for wave, divisor in zip(waves, divisors)
        if 1.0 < divisor < factor
    ]
    if len(between) >= 2:
        (x0, y0), (x1, y1) = between[0], between[-1]
        slope = (y1 - y0) / (x1 - x0)
        low = 3 * (slope * x0 - y0)
        original = round(3 * slope)
    else:
        low, original = 1.0, 8192
    scaling = {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": round(low, 2),
        "high_freq_factor": round(low, 2) + 3.0,
        "original_max_position_embeddings": original,
    }
    for wave, divisor in zip(waves, divisors):
        smooth = (original / wave - scaling["low_freq_factor"]) / 3
        expected = 1 / ((1 - min(max(smooth, 0.0), 1.0)) / factor + min(max(smooth, 0.0), 1.0))
        if abs(expected - divisor) > 2e-3 * divisor:
            raise ModelLoadError(
                f"{tensor.path}: the divisors in {tensor.name} are not those of llama3 rope scaling."
            )
    return scaling
