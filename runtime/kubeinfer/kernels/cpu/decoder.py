"""A model's whole stack of decoder layers as one call into the C library: no Python between its kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kubeinfer.kernels.cpu.library import MAX_HEAD_DIM, PANEL, library, usable

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@dataclass(slots=True)
class LayerWeights:
    """One layer's tensors, bfloat16; products in packed form (`kubeinfer.kernels.cpu.library.pack_linear`)."""

    input_norm: Tensor  # [H]
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor  # [H]
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    window: int


@dataclass(slots=True)
class DecoderShape:
    """Sizes that all layers share; ``cos_sin`` fp32 ``[positions, rotary_dim]``, cosines first."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    cos_sin: Tensor | None
    eps: float
    scale: float


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in (
            "input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias", "mlp_norm", "gate_up",
            "gate_up_bias", "down", "down_bias", "cache",
        )),
        ("window", _INT),
    ]  # fmt: skip


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("layers", "hidden", "inner", "heads", "kv_heads", "head_dim", "rotary_dim")),
        ("cos_sin", _POINTER),
        ("eps", _FLOAT),
        ("scale", _FLOAT),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("tokens", "seqs", "blocks", "block_size")),
        *((name, _POINTER) for name in ("positions", "slots", "query_start", "seq_lens", "table")),
        ("ld_table", _INT),
        ("wanted", _POINTER),
        ("num_wanted", _INT),
    ]


class DecoderStack:
    """Layers ready to run. Make one with `decoder_stack`."""

    def __init__(self, shape: DecoderShape, layers: list[LayerWeights]):
        self._weights = layers  # the library reads them by address
        self._cos_sin = shape.cos_sin
        self._caches: list[Tensor] = []
        self._layers = (_Layer * len(layers))()
        for entry, layer in zip(self._layers, layers):
            for name in LayerWeights.__slots__:
                value = getattr(layer, name)
                setattr(entry, name, value.data_ptr() if isinstance(value, Tensor) else value)
        rotary_dim = 0 if shape.cos_sin is None else shape.cos_sin.shape[1]
        self._shape = _Shape(
            len(layers), shape.hidden, shape.inner, shape.heads, shape.kv_heads, shape.head_dim, rotary_dim,
            None if shape.cos_sin is None else shape.cos_sin.data_ptr(), shape.eps, shape.scale,
        )  # fmt: skip

    def __call__(
        self,
        hidden: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        kv_caches: list[Tensor],
        wanted: Tensor | None,
    ) -> Tensor:
        """All layers of ``hidden [T, H]``, which is overwritten.

        Args:
            positions, slot_mapping: int32 ``[T]``.
            query_start, seq_lens, block_table: int32 ``[B + 1]``, ``[B]``, ``[B, blocks]``, as for paged attention.
            kv_caches: a layer each, bfloat16 ``[2, blocks, kv heads, block_size, head_dim]``.
            wanted: int32 ``[N]``, tokens whose states are asked for; None: all.

        Returns:
            ``[N, H]`` (``[T, H]`` without ``wanted``), before the model's last norm.
        """
        if kv_caches is not self._caches:
            for entry, cache in zip(self._layers, kv_caches):
                entry.cache = cache.data_ptr()
            self._caches = kv_caches
        tokens, num_wanted = hidden.shape[0], 0 if wanted is None else wanted.shape[0]
        step = _Step(
            tokens, seq_lens.shape[0], kv_caches[0].shape[1], kv_caches[0].shape[3], positions.data_ptr(),
            slot_mapping.data_ptr(), query_start.data_ptr(), seq_lens.data_ptr(), block_table.data_ptr(),
            block_table.stride(0), None if wanted is None else wanted.data_ptr(), num_wanted,
        )  # fmt: skip
        shape = ctypes.byref(self._shape)
        scratch = torch.empty(library().ki_decoder_scratch(shape, tokens), dtype=torch.bfloat16)
        result = hidden if wanted is None else torch.empty(num_wanted, hidden.shape[1], dtype=torch.bfloat16)
        if library().ki_decoder(
            shape, self._layers, ctypes.byref(step), hidden.data_ptr(), result.data_ptr(), scratch.data_ptr()
        ):
            raise MemoryError("no memory for the attention kernel's scratch space")
        return result


def decoder_stack(shape: DecoderShape, layers: list[LayerWeights]) -> DecoderStack | None:
    """The stack, or None where the library is missing or does not serve these sizes and dtypes."""
    tensors = [
        value
        for layer in layers
        for name in LayerWeights.__slots__
        if isinstance(value := getattr(layer, name), Tensor)
    ]
    if not usable(*tensors) or shape.inner % PANEL or shape.head_dim % 2 or shape.head_dim > MAX_HEAD_DIM:
        return None
    return DecoderStack(shape, layers)
