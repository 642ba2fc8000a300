"""Llama and all that share its shape: Mistral, SmolLM, Yi, DeepSeek-distilled Llama."""

from __future__ import annotations

from torch import Tensor

from kubeinfer.kernels.linear import few_rows
from kubeinfer.layers.attention import SelfAttention, StepContext
from kubeinfer.layers.embedding import VocabEmbedding
from kubeinfer.layers.mlp import GatedMLP
from kubeinfer.layers.norm import RMSNorm
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.layers.rotary import rope_table
from kubeinfer.model_config import ModelConfig


class DecoderLayer:
    """Pre-norm attention and gated MLP around one residual stream."""

    def __init__(self, store: ParameterStore, config: ModelConfig, layer: int, attention: SelfAttention):
        prefix = f"model.layers.{layer}"
        bias = bool(config.hf_config.get("mlp_bias", False))
        self.alone = store.group.size == 1
        self.attention = attention
        self.mlp = GatedMLP(store, f"{prefix}.mlp", config.hidden_size, config.intermediate_size, bias)
        self.input_norm = RMSNorm(store, f"{prefix}.input_layernorm", config.hidden_size, config.norm_eps)
        self.mlp_norm = RMSNorm(
            store, f"{prefix}.post_attention_layernorm", config.hidden_size, config.norm_eps
        )

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, step: StepContext
    ) -> tuple[Tensor, Tensor | None]:
        if residual is None and self.alone and few_rows(hidden):
            # Norms and additions ride along with the matrix products, and ``hidden`` is the whole residual stream.
            self.attention.add_to(hidden, self.input_norm, step)
            return self.mlp.add_to(hidden, self.mlp_norm), None
        hidden, residual = self.input_norm(hidden, residual)
        hidden, residual = self.mlp_norm(self.attention(hidden, step), residual)
        return self.mlp(hidden), residual


class LlamaForCausalLM:
    """The model of one rank. Subclasses say how their attention differs."""

    qkv_bias = False
    qk_norm = False

    def __init__(self, config: ModelConfig, store: ParameterStore):
        self.config = config
        stage, tied, total = store.stage, config.tie_word_embeddings, config.num_layers
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = VocabEmbedding(store, "model.embed_tokens", *shape) if stage.first else None
        trained = int(config.hf_config.get("max_position_embeddings") or config.max_model_len)
        cos_sin = rope_table(config.rope, config.head_dim, config.max_model_len, trained).to(store.device)
        self.layers = [
            DecoderLayer(store, config, layer, self.attention(store, config, layer, cos_sin))
            for layer in stage.layers(total)
        ]
        elsewhere = stage.layers_elsewhere("model.layers", total)
        self.norm: RMSNorm | None = None
        self.head: VocabEmbedding | None = None
        if stage.last:
            self.norm = RMSNorm(store, "model.norm", config.hidden_size, config.norm_eps)
            if tied and self.embedding is not None:
                self.head = self.embedding
            else:
                self.head = VocabEmbedding(store, "model.embed_tokens" if tied else "lm_head", *shape)
        else:
            elsewhere += ["model.norm.", "lm_head."]
        if not (stage.first or (stage.last and tied)):
            elsewhere.append("model.embed_tokens.")
        self.optional_weights = frozenset({"lm_head.weight"} if tied else ())
        self.weights_elsewhere = tuple(elsewhere)  # beginnings of names that belong to other stages

    def attention(
        self, store: ParameterStore, config: ModelConfig, layer: int, cos_sin: Tensor
    ) -> SelfAttention:
        bias = bool(config.hf_config.get("attention_bias", False))
        return SelfAttention(
            store, config, layer, f"model.layers.{layer}.self_attn", cos_sin,
            qkv_bias=self.qkv_bias or bias, out_bias=bias, qk_norm=self.qk_norm,
        )  # fmt: skip

    def finish_loading(self) -> None:
        for layer in self.layers:
            for linear in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
                linear.finish_loading()
        if self.head is not None:
            self.head.finish_loading()

    def forward(self, inputs: Tensor, step: StepContext) -> Tensor:
        """Token ids ``[T]``, or the hidden states ``[T, hidden]`` of the stage before -> those after this stage.

        The last stage's are normed; what stages hand on is the whole residual stream.
        """
        hidden, residual = inputs if self.embedding is None else self.embedding.embed(inputs), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, step)
        if self.norm is None:
            return hidden if residual is None else hidden + residual
        return self.norm(hidden, residual)[0]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """``hidden [N, H]`` -> ``[N, vocab_size]``; into ``out`` where given. The last stage's."""
        if self.head is None:
            raise RuntimeError("only the last stage has the output head")
        return self.head.logits(hidden, out)
