"""Llama and all that share its shape: Mistral, SmolLM, Yi, DeepSeek-distilled Llama."""

from __future__ import annotations

from itertools import zip_longest

from torch import Tensor

from kubeinfer.kernels.cpu.decoder import DecoderShape, DecoderStack, LayerWeights, decoder_stack
from kubeinfer.kernels.norm import NormBegun
from kubeinfer.layers.attention import SelfAttention, StepContext
from kubeinfer.layers.mlp import GatedMLP
from kubeinfer.layers.norm import RMSNorm
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.layers.rotary import rope_table
from kubeinfer.model_config import ModelConfig
from kubeinfer.models.causal_lm import CausalLM


class DecoderLayer:
    """Pre-norm attention and gated MLP around one residual stream."""

    def __init__(self, store: ParameterStore, config: ModelConfig, layer: int, attention: SelfAttention):
        prefix = f"model.layers.{layer}"
        bias = bool(config.hf_config.get("mlp_bias", False))
        self.group = store.group
        self.attention = attention
        self.mlp = GatedMLP(store, f"{prefix}.mlp", config.hidden_size, config.intermediate_size, bias)
        self.input_norm = RMSNorm(store, f"{prefix}.input_layernorm", config.hidden_size, config.norm_eps)
        self.mlp_norm = RMSNorm(
            store, f"{prefix}.post_attention_layernorm", config.hidden_size, config.norm_eps
        )

    def adds(self, hidden: Tensor, residual: Tensor | None) -> bool:
        """Whether norms and additions ride along with the matrix products, and ``hidden`` is the whole residual stream."""
        return residual is None and self.group.size == 1 and self.mlp.down.adds(hidden)

    def add_to(
        self, hidden: Tensor, step: StepContext, begun: NormBegun | None, next_norm: RMSNorm | None
    ) -> NormBegun | None:
        """Add to the whole residual stream, whose ``input_norm`` may be ``begun``, as may ``next_norm`` of the sum."""
        begun = self.attention.add_to(hidden, self.input_norm, step, begun, self.mlp_norm)
        return self.mlp.add_to(hidden, self.mlp_norm, begun, next_norm)

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, step: StepContext
    ) -> tuple[Tensor, Tensor | None]:
        """``residual`` None: ``hidden`` is the whole residual stream; else it lacks the sum of the ranks' ``hidden``."""
        if residual is None:
            hidden, residual = self.input_norm(hidden, None)
        else:
            hidden, residual = self.input_norm.of_sum(self.group, hidden, residual)
        hidden, residual = self.mlp_norm.of_sum(self.group, self.attention.partial(hidden, step), residual)
        return self.mlp.partial(hidden), residual

    def finish(
        self, hidden: Tensor, residual: Tensor | None, wanted: Tensor, step: StepContext
    ) -> tuple[Tensor, Tensor | None]:
        """As the last layer: all tokens' keys and values, but only the ``wanted`` tokens' states ``[N, H]``."""
        if residual is not None and self.group.size > 1:  # rows are chosen below, and a rank may lack some
            hidden, residual = self.group.all_reduce_add(hidden, residual), None
        hidden, residual = self.input_norm(hidden, residual)
        attended = self.attention.attend(hidden, step)
        if not wanted.shape[0]:
            return residual[:0], residual
        attended, residual = attended.index_select(0, wanted), residual.index_select(0, wanted)
        hidden, residual = self.mlp_norm.of_sum(self.group, self.attention.out.partial(attended), residual)
        return self.mlp.partial(hidden), residual

    def weights(self) -> LayerWeights | None:
        """What the CPU's stack of layers reads, where every product is packed."""
        attention, mlp = self.attention, self.mlp
        packed = [linear.packed for linear in (attention.qkv, attention.out, mlp.gate_up, mlp.down)]
        if any(weight is None for weight in packed):
            return None
        qkv, out, gate_up, down = (weight.data for weight in packed if weight is not None)
        q_norm, k_norm = attention.q_norm, attention.k_norm
        return LayerWeights(
            self.input_norm.weight, qkv, attention.qkv.bias, q_norm.weight if q_norm else None,
            k_norm.weight if k_norm else None, out, attention.out.bias, self.mlp_norm.weight, gate_up,
            mlp.gate_up.bias, down, mlp.down.bias, attention.window,
        )  # fmt: skip


class LlamaForCausalLM(CausalLM):
    """The model of one rank. Subclasses say how their attention differs."""

    qkv_bias = False
    qk_norm = False

    def __init__(self, config: ModelConfig, store: ParameterStore):
        super().__init__(config, store, "model", config.hidden_size, last_only=("norm",))
        trained = int(config.hf_config.get("max_position_embeddings") or config.max_model_len)
        cos_sin = rope_table(config.rope, config.head_dim, config.max_model_len, trained).to(store.device)
        self.layers = [
            DecoderLayer(store, config, layer, self.attention(store, config, layer, cos_sin))
            for layer in store.stage.layers(config.num_layers)
        ]
        self.norm: RMSNorm | None = None
        if store.stage.last:
            self.norm = RMSNorm(store, "model.norm", config.hidden_size, config.norm_eps)
        self.make_head(store)
        self.stack: DecoderStack | None = None

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
            layer.attention.qkv.quantized_by(layer.input_norm)
            layer.mlp.gate_up.quantized_by(layer.mlp_norm)
            layer.mlp.down.quantized_by(layer.mlp.gate_up)
        if self.head is not None:
            self.head.finish_loading()
        self.stack = self._cpu_stack()

    def _cpu_stack(self) -> DecoderStack | None:
        """The layers as one call into the CPU's library, where it serves them."""
        weights = [layer.weights() for layer in self.layers]
        if not weights or any(w is None for w in weights) or self.group.size > 1:
            return None
        config, attention = self.config, self.layers[0].attention
        shape = DecoderShape(
            config.hidden_size, config.intermediate_size, attention.num_heads, attention.num_kv_heads, config.head_dim,
            attention.cos_sin, config.norm_eps, attention.scale,
        )  # fmt: skip
        return decoder_stack(shape, [w for w in weights if w is not None])

    def forward(self, inputs: Tensor, step: StepContext) -> Tensor:
        """Token ids ``[T]``, or the hidden states ``[T, hidden]`` of the stage before -> those after this stage.

        The last stage's are normed, and of ``step.wanted`` tokens only (all, if None); what stages hand on is the whole
        residual stream.
        """
        hidden, residual = inputs if self.embedding is None else self.embedding.embed(inputs), None
        if self.stack is not None:
            hidden = self.stack(
                hidden, step.positions, step.slot_mapping, step.query_start, step.seq_lens, step.block_table,
                step.kv_caches, step.wanted,
            )  # fmt: skip
            return hidden if self.norm is None else self.norm(hidden, None)[0]
        if step.wanted is None:
            hidden, residual = self._through(self.layers, hidden, residual, step)
        else:
            hidden, residual = self._through(self.layers[:-1], hidden, residual, step)
            hidden, residual = self.layers[-1].finish(hidden, residual, step.wanted, step)
            if not hidden.shape[0]:
                return hidden
        if self.norm is None:
            return hidden if residual is None else self.group.all_reduce_add(hidden, residual)
        if residual is None:
            return self.norm(hidden, None)[0]
        return self.norm.of_sum(self.group, hidden, residual)[0]

    def _through(
        self, layers: list[DecoderLayer], hidden: Tensor, residual: Tensor | None, step: StepContext
    ) -> tuple[Tensor, Tensor | None]:
        """``layers`` one after the other."""
        if layers and layers[0].adds(hidden, residual):
            begun = None
            for layer, following in zip_longest(layers, layers[1:]):
                begun = layer.add_to(hidden, step, begun, following.input_norm if following else None)
            return hidden, None
        for layer in layers:
            hidden, residual = layer(hidden, residual, step)
        return hidden, residual
