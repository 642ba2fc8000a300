"""How a checkpoint's linear layers are quantized: read from config.json or a GGUF file's header, without torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubeinfer.errors import ModelLoadError, OptionError

# Accepted spellings of --quantization, and the checkpoint's quant_method that each stands for.
_SPELLINGS = {"awq_marlin": "awq", "gptq_marlin": "gptq"}
_SUPPORTED = "fp8, awq, gptq and compressed-tensors (float-quantized)"


@dataclass(frozen=True)
class FP8Config:
    """Weights in float8_e4m3fn.

    ``serialized``: the checkpoint holds them; else they are made at load with a scale a row. ``block``: rows and columns that
    share a scale; None: a scale a tensor or a row. ``activations``: ``dynamic`` (a scale a token, at run time), ``static``
    (a scale a layer, from the checkpoint) or ``none`` (products in the model's dtype).
    """

    ignored: tuple[str, ...] = ()
    serialized: bool = True
    block: tuple[int, int] | None = None
    activations: str = "dynamic"
    scale_name: str = "weight_scale"

    name = "fp8"


@dataclass(frozen=True)
class GroupedIntConfig:
    """Weights ``(q - zero) * scale`` of unsigned integers, a zero and a scale for each ``group_size`` inputs of an output.

    ``name`` is ``awq`` (Lin et al. 2023) or ``gptq`` (Frantar et al. 2022), which pack differently. ``group_size`` -1: all
    inputs. ``zero_offset`` is added to stored zeros (the first GPTQ format stores them less one).
    """

    name: str
    bits: int
    group_size: int
    ignored: tuple[str, ...] = ()
    zero_offset: int = 0


@dataclass(frozen=True)
class GGUFType:
    """A type of GGUF blocks as our kernels take it: codes of ``bits``, a scale and a minimum for each ``group`` of inputs."""

    name: str
    bits: int
    group: int
    block_size: int
    block_bytes: int


@dataclass(frozen=True)
class GGUFConfig:
    """A GGUF file's blocks, kept quantized. ``types`` has, by the names that Hugging Face gives them, the tensors that can be."""

    types: dict[str, GGUFType] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    name = "gguf"


QuantizationConfig = FP8Config | GroupedIntConfig | GGUFConfig

# Bits and group that hold a type of GGUF blocks without loss. Fewer bits than 4 are expanded: there are no kernels for them.
GGUF_FORMS = {
    "Q4_0": (4, 32), "Q4_1": (4, 32), "Q4_K": (4, 32),
    "Q5_0": (8, 32), "Q5_1": (8, 32), "Q5_K": (8, 32), "Q8_0": (8, 32),
    "Q2_K": (8, 16), "Q3_K": (8, 16), "Q6_K": (8, 16),
}  # fmt: skip


def gguf_quantization(path: Path) -> GGUFConfig | None:
    """How the matrices of the GGUF file ``path`` are kept in a GPU's memory; None: none of them quantized."""
    from kubeinfer.weights.readers.gguf_file import read_gguf
    from kubeinfer.weights.readers.gguf_hf import ROPE_FREQS, hf_name

    types = {
        hf_name(info.name, info.path): GGUFType(
            info.type_name, *GGUF_FORMS[info.type_name], info.block_size, info.block_bytes
        )
        for info in read_gguf(path).tensors.values()
        if info.name != ROPE_FREQS and info.type_name in GGUF_FORMS
    }
    return GGUFConfig(types) if types else None


def ignores(config: QuantizationConfig, module: str) -> bool:
    """Whether ``module`` (``model.layers.0.mlp.gate_proj``) is left unquantized: named whole, by some of its dotted parts, or
    by a pattern (``re:...``)."""
    for entry in config.ignored:
        if entry.startswith("re:"):
            if re.match(entry[3:], module):
                return True
        elif f".{entry}." in f".{module}.":
            return True
    return False


def read_quantization(hf: dict[str, Any], asked: str | None, where: object) -> QuantizationConfig | None:
    """The quantization of the model whose config.json is ``hf``, as ``--quantization asked`` allows; None: none.

    Raises :class:`OptionError` where what was asked for is not what the checkpoint is, and :class:`ModelLoadError` for formats
    that are not supported. ``where`` is the model's path, for messages.
    """
    own = hf.get("quantization_config") or hf.get("compression_config")
    if asked == "gguf":
        asked = None  # the file itself says so
    if asked in ("squeezellm", "bitsandbytes"):
        raise OptionError(f"quantization {asked} is not supported; supported: {_SUPPORTED}.", "quantization")
    wanted = _SPELLINGS.get(asked or "", asked)
    if not own:
        if wanted in (None, "fp8"):
            return FP8Config(serialized=False) if wanted else None
        raise OptionError(
            f"quantization {asked} was asked for, but {where} has unquantized weights (no quantization_config in its "
            "config.json); leave --quantization out, use fp8 (made at load), or name a quantized checkpoint.",
            "quantization",
        )
    if not isinstance(own, dict):
        raise ModelLoadError(f"{where}: quantization_config of config.json must be an object.")
    method = str(own.get("quant_method") or ("awq" if own.get("w_bit") else "unknown")).lower()
    if wanted is not None and wanted != method:
        raise OptionError(
            f"quantization {asked} was asked for, but {where} is quantized with {method}; leave --quantization out.",
            "quantization",
        )
    readers: dict[str, Callable[[dict[str, Any], str], QuantizationConfig]] = {
        "fp8": _fp8,
        "awq": _awq,
        "gptq": _gptq,
        "compressed-tensors": _compressed,
    }
    if method not in readers:
        raise ModelLoadError(f"{where}: quantization {method} is not supported; supported: {_SUPPORTED}.")
    try:
        return readers[method](own, str(where))
    except (TypeError, ValueError, AttributeError) as exc:
        raise ModelLoadError(
            f"{where}: quantization_config of config.json cannot be read ({exc!r})."
        ) from None


def _names(*lists: Any) -> tuple[str, ...]:
    return tuple(str(name) for names in lists for name in names or ())


def _refuse(where: str, what: str) -> ModelLoadError:
    return ModelLoadError(f"{where}: {what}; use another quantization of the model.")


def _fp8(own: dict[str, Any], where: str) -> FP8Config:
    ignored = _names(own.get("modules_to_not_convert"), own.get("ignored_layers"), own.get("ignore"))
    number = str(own.get("fmt") or "e4m3").lower()
    if "e4m3" not in number:
        raise _refuse(where, f"FP8 weights in {number} are not supported, only e4m3")
    activations = str(own.get("activation_scheme") or "dynamic")
    if activations not in ("dynamic", "static"):
        raise _refuse(where, f"activation_scheme {activations!r} is not supported, only dynamic and static")
    block = own.get("weight_block_size")
    if block is None:
        return FP8Config(ignored, True, None, activations)
    rows, columns = (int(size) for size in block)
    if activations != "dynamic" or min(rows, columns) < 1:
        raise _refuse(
            where, f"FP8 weights in blocks of {rows} x {columns} with {activations} activation scales are not supported"
        )  # fmt: skip
    return FP8Config(ignored, True, (rows, columns), "dynamic", "weight_scale_inv")


def _compressed(own: dict[str, Any], where: str) -> FP8Config:
    kind = str(own.get("format"))
    groups = list((own.get("config_groups") or {}).values())
    if kind != "float-quantized" or len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        raise _refuse(
            where,
            f"compressed-tensors of format {kind} with {len(groups)} config groups is not supported, only float-quantized "
            "with one group for all Linear layers",
        )
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    strategy = weights.get("strategy")
    is_float8 = weights.get("num_bits") == 8 and weights.get("type") == "float"
    if not is_float8 or strategy not in ("tensor", "channel", "block") or not weights.get("symmetric", True):
        raise _refuse(where, f"compressed-tensors weights {weights} are not supported, only symmetric FP8")
    activations = "none"
    if inputs:
        if inputs.get("num_bits") != 8 or inputs.get("type") != "float":
            raise _refuse(where, f"compressed-tensors activations {inputs} are not supported, only FP8")
        activations = "dynamic" if inputs.get("dynamic") else "static"
    block = None
    if strategy == "block":
        rows, columns = (int(size) for size in weights.get("block_structure") or ())
        block, activations = (rows, columns), "dynamic" if activations == "static" else activations
    return FP8Config(_names(own.get("ignore")), True, block, activations)


def _awq(own: dict[str, Any], where: str) -> GroupedIntConfig:
    bits = int(own.get("bits") or own.get("w_bit") or 4)
    group = int(own.get("group_size") or own.get("q_group_size") or 128)
    version = str(own.get("version") or "gemm").lower()
    if bits != 4:
        raise _refuse(where, f"AWQ weights of {bits} bits are not supported, only 4")
    if version != "gemm":
        raise _refuse(where, f"AWQ weights in the {version} layout are not supported, only gemm")
    _check_group(group, where)
    return GroupedIntConfig("awq", bits, group, _names(own.get("modules_to_not_convert")))


def _gptq(own: dict[str, Any], where: str) -> GroupedIntConfig:
    bits, group = int(own.get("bits") or 4), int(own.get("group_size") or -1)
    layout = str(own.get("checkpoint_format") or "gptq").lower()
    if bits not in (4, 8):
        raise _refuse(where, f"GPTQ weights of {bits} bits are not supported, only 4 and 8")
    if layout not in ("gptq", "gptq_v2"):
        raise _refuse(
            where, f"GPTQ weights in checkpoint_format {layout} are not supported, only gptq and gptq_v2"
        )
    if own.get("lm_head"):
        raise _refuse(where, "a quantized lm_head is not supported")
    if own.get("dynamic"):
        raise _refuse(where, "GPTQ settings that differ between layers (dynamic) are not supported")
    _check_group(group, where)
    ignored = _names(own.get("modules_to_not_convert"))
    return GroupedIntConfig("gptq", bits, group, ignored, 1 if layout == "gptq" else 0)


def _check_group(group: int, where: str) -> None:
    if group != -1 and (group < 32 or group % 32 or (group > 128 and group % 128) or group == 96):
        raise _refuse(where, f"group_size {group} is not supported, only -1, 32, 64 and multiples of 128")
