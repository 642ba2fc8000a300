"""Qwen2 and Qwen2.5: Llama's shape with biases on query, key and value."""

from __future__ import annotations

from kubeinfer.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    qkv_bias = True
