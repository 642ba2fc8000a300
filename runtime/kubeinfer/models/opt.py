"""OPT: learned positions, LayerNorm, plain MLP with ReLU, biases everywhere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kubeinfer.errors import ModelLoadError
from kubeinfer.layers.attention import SelfAttention, StepContext
from kubeinfer.layers.embedding import VocabEmbedding
from kubeinfer.layers.linear import ReplicatedLinear
from kubeinfer.layers.mlp import PlainMLP
from kubeinfer.layers.norm import LayerNorm
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.model_config import ModelConfig

_POSITION_OFFSET = 2  # OPT's learned positions start at index 2
_PREFIX = "model.decoder"


class OPTLayer:
    """``do_layer_norm_before`` decides on which side of each block the norm stands (350m: after)."""

    def __init__(self, store: ParameterStore, config: ModelConfig, layer: int, norm_first: bool):
        prefix = f"{_PREFIX}.layers.{layer}"
        bias = bool(config.hf_config.get("enable_bias", True))
        self.norm_first = norm_first
        self.attention = SelfAttention(
            store,
            config,
            layer,
            f"{prefix}.self_attn",
            None,
            qkv_bias=bias,
            out_bias=bias,
            out_name="out_proj",
        )
        self.attention_norm = LayerNorm(store, f"{prefix}.self_attn_layer_norm", config.hidden_size)
        self.mlp = PlainMLP(store, prefix, config.hidden_size, config.intermediate_size, F.relu, bias)
        self.mlp_norm = LayerNorm(store, f"{prefix}.final_layer_norm", config.hidden_size)

    def __call__(self, hidden: Tensor, step: StepContext) -> Tensor:
        if self.norm_first:
            hidden = hidden + self.attention(self.attention_norm(hidden), step)
            return hidden + self.mlp(self.mlp_norm(hidden))
        hidden = self.attention_norm(hidden + self.attention(hidden, step))
        return self.mlp_norm(hidden + self.mlp(hidden))


class OPTForCausalLM:
    """Zhang et al. 2022, "OPT: Open Pre-trained Transformer Language Models"."""

    def __init__(self, config: ModelConfig, store: ParameterStore):
        hf = config.hf_config
        if hf.get("activation_function", "relu") != "relu":
            raise ModelLoadError(
                f"OPT with activation {hf['activation_function']!r} is not supported, only relu."
            )
        self.config = config
        norm_first = bool(hf.get("do_layer_norm_before", True))
        width = int(hf.get("word_embed_proj_dim") or config.hidden_size)
        stage, tied, total = store.stage, config.tie_word_embeddings, config.num_layers
        projected = width != config.hidden_size
        elsewhere = stage.layers_elsewhere(f"{_PREFIX}.layers", total)
        self.embedding: VocabEmbedding | None = None
        self.project_in: ReplicatedLinear | None = None
        if stage.first:
            self.embedding = VocabEmbedding(store, f"{_PREFIX}.embed_tokens", config.vocab_size, width)
            self.positions = store.empty(
                int(hf["max_position_embeddings"]) + _POSITION_OFFSET, config.hidden_size
            )
            store.expect(f"{_PREFIX}.embed_positions.weight", self.positions)
            if projected:
                self.project_in = ReplicatedLinear(
                    store, f"{_PREFIX}.project_in", config.hidden_size, width, False
                )
        else:
            elsewhere += [f"{_PREFIX}.embed_positions.", f"{_PREFIX}.project_in."]
        self.project_out: ReplicatedLinear | None = None
        if stage.last and projected:
            self.project_out = ReplicatedLinear(
                store, f"{_PREFIX}.project_out", width, config.hidden_size, False
            )
        self.layers = [OPTLayer(store, config, layer, norm_first) for layer in stage.layers(total)]
        self.norm: LayerNorm | None = None
        self.head: VocabEmbedding | None = None
        if stage.last:
            if norm_first and not hf.get("_remove_final_layer_norm", False):
                self.norm = LayerNorm(store, f"{_PREFIX}.final_layer_norm", config.hidden_size)
            if tied and self.embedding is not None:
                self.head = self.embedding
            else:
                name = f"{_PREFIX}.embed_tokens" if tied else "lm_head"
                self.head = VocabEmbedding(store, name, config.vocab_size, width)
        else:
            elsewhere += [f"{_PREFIX}.final_layer_norm.", f"{_PREFIX}.project_out.", "lm_head."]
        if not (stage.first or (stage.last and tied)):
            elsewhere.append(f"{_PREFIX}.embed_tokens.")
        self.optional_weights = frozenset({"lm_head.weight"} if tied else ())
        self.weights_elsewhere = tuple(elsewhere)  # beginnings of names that belong to other stages

    def finish_loading(self) -> None:
        for layer in self.layers:
            for linear in (layer.attention.qkv, layer.attention.out, layer.mlp.fc1, layer.mlp.fc2):
                linear.finish_loading()
        for projection in (self.project_in, self.project_out):
            if projection is not None:
                projection.finish_loading()
        if self.head is not None:
            self.head.finish_loading()

    def forward(self, inputs: Tensor, step: StepContext) -> Tensor:
        """Token ids ``[T]``, or the hidden states ``[T, hidden]`` of the stage before -> those after this stage.

        The last stage's are normed, as wide as the embedding, and of ``step.wanted`` tokens only (all, if None).
        """
        hidden = inputs
        if self.embedding is not None:
            hidden = self.embedding.embed(inputs)
            if self.project_in is not None:
                hidden = self.project_in(hidden)
            hidden = hidden + F.embedding(step.positions + _POSITION_OFFSET, self.positions)
        for layer in self.layers:
            hidden = layer(hidden, step)
        if step.wanted is not None:
            hidden = hidden.index_select(0, step.wanted)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden if self.project_out is None else self.project_out(hidden)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """``hidden [N, H]`` -> ``[N, vocab_size]``; into ``out`` where given. The last stage's."""
        if self.head is None:
            raise RuntimeError("only the last stage has the output head")
        return self.head.logits(hidden, out)
