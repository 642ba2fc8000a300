"""Architectures by the name in config.json's ``architectures``. Plain names: importing this loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODELS = {
    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("llama", "LlamaForCausalLM"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM"),
    "OPTForCausalLM": ("opt", "OPTForCausalLM"),
}

SUPPORTED_ARCHITECTURES = frozenset(_MODELS)


def model_class(architecture: str) -> Any:
    """The model's class, imported on first use."""
    module, name = _MODELS[architecture]
    return getattr(import_module(f"kubeinfer.models.{module}"), name)
