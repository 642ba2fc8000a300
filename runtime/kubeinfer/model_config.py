"""What the engine must know of a model before it loads a weight: read from its files, without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubeinfer.errors import KubeinferError, ModelLoadError, OptionError
from kubeinfer.options import EngineOptions
from kubeinfer.quantization import QuantizationConfig, gguf_quantization, read_quantization

_DTYPES = {"half": "float16", "float": "float32"}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base, the share of each head that is rotated, and how the base is stretched.

    ``scaling`` is the checkpoint's ``rope_scaling`` with a normalised ``rope_type``
    (default, linear, dynamic, llama3, yarn).
    """

    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    scaling: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})


@dataclass(frozen=True)
class ModelConfig:
    """One model, normalised over the architectures. Sizes are those of the whole model, not of a shard."""

    path: Path
    served_path: str  # what the user named
    architecture: str
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    eos_token_ids: list[int]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_model_len: int
    dtype: str  # float32, float16 or bfloat16
    rope: RopeConfig
    norm_eps: float
    tie_word_embeddings: bool
    layer_windows: tuple[int, ...]  # sliding window of each layer, 0: all tokens
    quantization: QuantizationConfig | None = None

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as exc:
        raise ModelLoadError(f"{path} is not valid JSON ({exc}); download the model again.") from None
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path} must hold a JSON object.")
    return data


def resolve_path(options: EngineOptions) -> Path:
    """The folder or GGUF file of ``options.model``, downloaded if it names a hub's repository."""
    from kubeinfer.weights.locate import resolve_model_path

    if not options.model:
        raise OptionError("model: give a folder, a GGUF file or ORG/NAME.", "model")
    return Path(
        resolve_model_path(
            options.model,
            revision=options.revision,
            download_dir=options.download_dir,
            weights=options.load_format != "dummy",
        )
    )


def load_model_config(options: EngineOptions) -> ModelConfig:
    """Read and check the model's configuration against the options.

    Raises :class:`ModelLoadError` for files that are missing or an architecture that is not supported, and
    :class:`OptionError` for options that this model cannot have.
    """
    path = resolve_path(options)
    if path.is_file():
        from kubeinfer.weights.readers import gguf_config

        hf = gguf_config(path)
        generation = {}
    else:
        hf = _read_json(path / "config.json")
        if not hf and (path / "config.json").is_file():
            raise ModelLoadError(f"{path / 'config.json'} says nothing; download the model again.")
        if not hf:
            raise ModelLoadError(
                f"{path} has no config.json, so it is not a model folder; give a folder made by a hub's download, "
                "or the path of a .gguf file."
            )
        generation = _read_json(path / "generation_config.json")
    if options.hf_overrides:
        hf = _overridden(hf, options.hf_overrides)
    generation = _generation_config(options, generation)
    try:
        return _normalise(options, path, hf, generation, _architecture(hf, path))
    except KubeinferError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as exc:
        raise ModelLoadError(
            f"{path}: config.json (with --hf-overrides) has a value that cannot be used: {type(exc).__name__}: {exc}."
        ) from exc


def _overridden(hf: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """``overrides`` over the model's own. What transformers 5 calls ``rope_parameters`` was ``rope_scaling``, which people still give."""
    own = hf.get("rope_parameters")
    if own and overrides.get("rope_scaling") and "rope_parameters" not in overrides:
        kept = {key: own[key] for key in ("rope_theta", "partial_rotary_factor") if key in own}
        overrides = {**overrides, "rope_parameters": kept | overrides["rope_scaling"]}
    return {**hf, **overrides}


def _generation_config(options: EngineOptions, own: dict[str, Any]) -> dict[str, Any]:
    if options.generation_config == "vllm":
        config = {k: v for k, v in own.items() if k == "eos_token_id"}
    elif options.generation_config == "auto":
        config = dict(own)
    else:
        config = _read_json(Path(options.generation_config) / "generation_config.json")
        if not config:
            raise OptionError(
                f"generation_config: {options.generation_config} has no generation_config.json.",
                "generation_config",
            )
    return {**config, **(options.override_generation_config or {})}


def _architecture(hf: dict[str, Any], path: Path) -> str:
    from kubeinfer.models.registry import SUPPORTED_ARCHITECTURES

    names = hf.get("architectures") or []
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name in SUPPORTED_ARCHITECTURES:
            return str(name)
    asked = ", ".join(names) or f"model_type {hf.get('model_type')!r}"
    raise ModelLoadError(
        f"{path}: architecture {asked} is not supported; supported are {', '.join(sorted(SUPPORTED_ARCHITECTURES))}."
    )


def _normalise(
    options: EngineOptions, path: Path, hf: dict[str, Any], generation: dict[str, Any], architecture: str
) -> ModelConfig:
    def need(name: str) -> int:
        if name not in hf:
            raise ModelLoadError(f"{path}: config.json has no {name!r}.")
        if type(hf[name]) is not int or hf[name] < 1:
            raise ModelLoadError(
                f"{path}: config.json's {name!r} must be a positive integer, got {hf[name]!r}."
            )
        return int(hf[name])

    activation = hf.get("hidden_act") or "silu"
    if architecture != "OPTForCausalLM" and activation not in ("silu", "swish"):
        raise ModelLoadError(f"{path}: hidden_act {activation!r} is not supported, only silu.")

    num_heads = need("num_attention_heads")
    hidden = need("hidden_size")
    num_layers = need("num_hidden_layers")
    rope = _rope(hf)
    limit = int(hf.get("max_position_embeddings") or 2048)
    scaling = rope.scaling
    if (
        scaling["rope_type"] in ("linear", "dynamic", "yarn")
        and "original_max_position_embeddings" not in scaling
    ):
        limit = int(limit * float(scaling.get("factor", 1.0)))
    elif scaling["rope_type"] == "yarn":
        limit = max(
            limit, int(scaling["original_max_position_embeddings"] * float(scaling.get("factor", 1.0)))
        )
    # Dynamic scaling changes every position once it stretches, so it is used only where a longer length is asked for.
    trained = int(hf.get("max_position_embeddings") or 2048)
    max_len = options.max_model_len or (trained if scaling["rope_type"] == "dynamic" else limit)
    if max_len > limit:
        raise OptionError(
            f"max_model_len {max_len} is more than the model's {limit} positions; lower --max-model-len, or give "
            "rope_scaling in --hf-overrides if the model is known to stretch.",
            "max_model_len",
        )
    eos: list[int] = []
    for source in (generation.get("eos_token_id"), hf.get("eos_token_id")):
        for token in source if isinstance(source, list) else [source]:
            if token is not None and int(token) not in eos:
                eos.append(int(token))
    return ModelConfig(
        path=path,
        served_path=options.model,
        architecture=architecture,
        hf_config=hf,
        generation_config=generation,
        eos_token_ids=eos,
        vocab_size=need("vocab_size"),
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(hf.get("num_key_value_heads") or num_heads),
        head_dim=int(hf.get("head_dim") or hidden // num_heads),
        intermediate_size=int(hf.get("intermediate_size") or hf.get("ffn_dim") or 4 * hidden),
        max_model_len=max_len,
        dtype=_dtype(options, hf),
        rope=rope,
        norm_eps=float(hf.get("rms_norm_eps") or 1e-6),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", architecture == "OPTForCausalLM")),
        layer_windows=_windows(hf, num_layers),
        quantization=_quantization(options, hf, path),
    )


def _quantization(options: EngineOptions, hf: dict[str, Any], path: Path) -> QuantizationConfig | None:
    """GGUF blocks stay quantized where there are kernels for them: on GPUs, in 16 bits. Elsewhere they are dequantized."""
    found = read_quantization(hf, options.quantization, path)
    kept = path.is_file() and options.device == "cuda" and _dtype(options, hf) != "float32"
    return gguf_quantization(path) if found is None and kept else found


def _dtype(options: EngineOptions, hf: dict[str, Any]) -> str:
    if options.dtype != "auto":
        return _DTYPES.get(options.dtype, options.dtype)
    own = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return own if own in ("float16", "bfloat16") else "bfloat16"


_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope(hf: dict[str, Any]) -> RopeConfig:
    # transformers 5 writes everything into rope_parameters; older checkpoints have rope_theta and rope_scaling.
    parameters = dict(hf.get("rope_parameters") or {})
    scaling = {**(hf.get("rope_scaling") or {}), **parameters}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise ModelLoadError(
            f"rope scaling {kind!r} is not supported; supported: linear, dynamic, llama3, yarn."
        )
    scaling["rope_type"] = kind
    if kind == "llama3":
        scaling.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    for key in _ROPE_NEEDS.get(kind, ()):
        if not isinstance(scaling.get(key), (int, float)):
            raise ModelLoadError(f"rope scaling {kind!r} needs a number {key!r}, got {scaling.get(key)!r}.")
    theta = scaling.get("rope_theta") or hf.get("rope_theta") or 10000.0
    partial = scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    return RopeConfig(float(theta), float(partial), scaling)


def _windows(hf: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    window = hf.get("sliding_window") or 0
    if hf.get("model_type") in ("qwen2", "qwen3"):
        if not hf.get("use_sliding_window", False):
            window = 0
        kinds = hf.get("layer_types")
        if window and not kinds:
            full = int(hf.get("max_window_layers", num_layers))
            return tuple(0 if i < full else int(window) for i in range(num_layers))
    kinds = hf.get("layer_types")
    if window and kinds:
        if len(kinds) != num_layers:
            raise ModelLoadError(
                f"config.json's layer_types has {len(kinds)} entries for {num_layers} layers."
            )
        return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)
    return (int(window),) * num_layers
