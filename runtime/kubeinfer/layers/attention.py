"""Self-attention over the paged KV cache, and what a step tells every layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kubeinfer.kernels.attention import DecodeWorkspace, paged_attention, rope_and_decode
from kubeinfer.kernels.norm import NormBegun
from kubeinfer.kernels.rope import rope_and_cache
from kubeinfer.kernels.shared_prefix import SharedPrefix
from kubeinfer.layers.linear import QKVLinear, RowLinear
from kubeinfer.layers.norm import RMSNorm
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.model_config import ModelConfig


@dataclass(slots=True)
class StepContext:
    """One step's inputs besides its tokens; tensors live on the model's device.

    Decode rows come first: the first ``num_decodes`` sequences have one query token each.
    """

    positions: Tensor  # int64 [T]
    slot_mapping: Tensor  # int32 [T]
    query_start: Tensor  # int32 [B + 1]
    seq_lens: Tensor  # int32 [B]
    block_table: Tensor  # int32 [B, max_blocks]
    max_query_len: int
    max_seq_len: int
    num_decodes: int
    kv_caches: list[Tensor] = field(
        default_factory=list
    )  # one for each layer of this stage: [2, blocks, kv heads, block_size, head_dim]
    workspace: DecodeWorkspace | None = None
    wanted: Tensor | None = None  # int32 [N]: tokens whose final states are asked for; None: all
    prefill_kv_tokens: int | None = None  # sum of seq_lens after the decodes, where the host knows it
    shared: SharedPrefix | None = None  # of the decode rows, where some may begin with the same blocks
    units: Tensor | None = (
        None  # of `plan_decodes`, of the decode rows where they may be many and share nothing
    )


def each_token_alone(step: StepContext) -> StepContext:
    """The same step with each token a sequence of its own: its attention then depends on nothing but its context."""
    tokens = step.positions.shape[0]
    device = step.positions.device
    lengths = step.query_start.diff()
    owners = torch.arange(lengths.shape[0], device=device).repeat_interleave(lengths, output_size=tokens)
    return replace(
        step,
        query_start=torch.arange(tokens + 1, dtype=torch.int32, device=device),
        seq_lens=step.positions + 1,
        block_table=step.block_table[owners],
        max_query_len=1,
        num_decodes=tokens,
        prefill_kv_tokens=None,
        shared=None,
        units=None,
    )


class SelfAttention:
    """Grouped-query attention with rotary embedding; optional per-head norm of queries and keys (Qwen3)."""

    def __init__(
        self,
        store: ParameterStore,
        config: ModelConfig,
        layer: int,
        prefix: str,
        cos_sin: Tensor | None,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        out_name: str = "o_proj",
    ):
        store.begin_layer(layer)  # a decoder layer begins with its attention
        self.cache_index = layer - store.stage.layers(config.num_layers).start
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.window = config.layer_windows[layer]
        self.cos_sin = cos_sin
        self.qkv = QKVLinear(
            store,
            (f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"),
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qkv_bias,
        )
        self.num_heads, self.num_kv_heads = self.qkv.num_heads, self.qkv.num_kv_heads
        self.out = RowLinear(
            store, f"{prefix}.{out_name}", config.hidden_size, config.num_heads * config.head_dim, out_bias
        )
        self.q_norm = (
            RMSNorm(store, f"{prefix}.q_norm", config.head_dim, config.norm_eps) if qk_norm else None
        )
        self.k_norm = (
            RMSNorm(store, f"{prefix}.k_norm", config.head_dim, config.norm_eps) if qk_norm else None
        )
        self._eps = config.norm_eps

    def __call__(self, hidden: Tensor, step: StepContext) -> Tensor:
        """``hidden [T, H]`` -> ``[T, H]``; this step's keys and values are written to the cache."""
        return self.out(self.attend(hidden, step))

    def attend(self, hidden: Tensor, step: StepContext) -> Tensor:
        """All but the output projection: ``[T, H]`` -> ``[T, Hq D]``."""
        return self._attend(self.qkv(hidden), step)

    def partial(self, hidden: Tensor, step: StepContext) -> Tensor:
        """This rank's part of the result."""
        return self.out.partial(self._attend(self.qkv(hidden), step))

    def add_to(
        self,
        residual: Tensor,
        norm: RMSNorm,
        step: StepContext,
        begun: NormBegun | None = None,
        next_norm: RMSNorm | None = None,
    ) -> NormBegun | None:
        """``residual += self(norm(residual))`` in place; a group of one rank only.

        ``begun`` is ``norm(residual)`` if the layer before began it; ``next_norm`` of the sum may be begun for the next.
        """
        attended = self._attend(self.qkv.after_norm(residual, norm, begun), step)
        return self.out.add_to(residual, attended, next_norm)

    def _attend(self, projected: Tensor, step: StepContext) -> Tensor:
        """Queries, keys and values side by side ``[T, (Hq + 2 Hkv) D]`` -> ``[T, Hq D]``."""
        tokens = projected.shape[0]
        qkv = projected.view(tokens, -1, self.head_dim)
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        cache = step.kv_caches[self.cache_index]
        out = torch.empty(tokens, self.num_heads, self.head_dim, dtype=q.dtype, device=q.device)
        q_norm = self.q_norm.weight if self.q_norm else None
        k_norm = self.k_norm.weight if self.k_norm else None
        if (
            step.num_decodes == tokens
            and step.shared is None
            and rope_and_decode(
                q, k, v, step.positions, self.cos_sin, step.slot_mapping, cache, step.seq_lens, step.block_table, out,
                scale=self.scale, sliding_window=self.window, workspace=step.workspace, q_norm_weight=q_norm,
                k_norm_weight=k_norm, eps=self._eps,
            )
        ):  # fmt: skip
            return out.view(tokens, -1)
        rope_and_cache(
            q, k, v, step.positions, self.cos_sin, step.slot_mapping, cache, q_norm_weight=q_norm, k_norm_weight=k_norm,
            eps=self._eps,
        )  # fmt: skip
        paged_attention(
            q, cache, step.query_start, step.seq_lens, step.block_table, out,
            scale=self.scale, max_query_len=step.max_query_len, max_seq_len=step.max_seq_len,
            sliding_window=self.window, num_decodes=step.num_decodes, workspace=step.workspace,
            prefill_kv_tokens=step.prefill_kv_tokens, shared=step.shared, units=step.units,
        )  # fmt: skip
        return out.view(tokens, -1)
