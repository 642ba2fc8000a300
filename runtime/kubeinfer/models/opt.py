"""OPT: learned positions, LayerNorm, plain MLP with ReLU, biases everywhere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kubeinfer.errors import ModelLoadError
from kubeinfer.layers.attention import SelfAttention, StepContext
from kubeinfer.layers.linear import ReplicatedLinear
from kubeinfer.layers.mlp import PlainMLP
from kubeinfer.layers.norm import LayerNorm
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.model_config import ModelConfig
from kubeinfer.models.causal_lm import CausalLM

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


class OPTForCausalLM(CausalLM):
    """Zhang et al. 2022, "OPT: Open Pre-trained Transformer Language Models"."""

    def __init__(self, config: ModelConfig, store: ParameterStore):
        hf = config.hf_config
        if hf.get("activation_function", "relu") != "relu":
            raise ModelLoadError(
                f"OPT with activation {hf['activation_function']!r} is not supported, only relu."
            )
        norm_first = bool(hf.get("do_layer_norm_before", True))
        hidden, width = config.hidden_size, int(hf.get("word_embed_proj_dim") or config.hidden_size)
        projected = width != hidden
        stage = store.stage
        super().__init__(
            config, store, _PREFIX, width,
            first_only=("embed_positions", "project_in"), last_only=("final_layer_norm", "project_out"),
        )  # fmt: skip
        self.project_in: ReplicatedLinear | None = None
        if stage.first:
            self.positions = store.empty(int(hf["max_position_embeddings"]) + _POSITION_OFFSET, hidden)
            store.expect(f"{_PREFIX}.embed_positions.weight", self.positions)
            if projected:
                self.project_in = ReplicatedLinear(store, f"{_PREFIX}.project_in", hidden, width, False)
        self.project_out: ReplicatedLinear | None = None
        if stage.last and projected:
            self.project_out = ReplicatedLinear(store, f"{_PREFIX}.project_out", width, hidden, False)
        self.layers = [OPTLayer(store, config, i, norm_first) for i in stage.layers(config.num_layers)]
        self.norm: LayerNorm | None = None
        if stage.last and norm_first and not hf.get("_remove_final_layer_norm", False):
            self.norm = LayerNorm(store, f"{_PREFIX}.final_layer_norm", hidden)
        self.make_head(store)

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
