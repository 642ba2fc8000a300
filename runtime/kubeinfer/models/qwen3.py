"""Qwen3 (dense): Llama's shape with an RMSNorm on each head's queries and keys."""

from __future__ import annotations

from kubeinfer.models.llama import LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    qk_norm = True
