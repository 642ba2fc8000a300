"""The tensors of a model and where each comes from in a checkpoint.

A layer makes its tensors here and says which checkpoint tensor goes where: fused weights (qkv, gate and up) are views of
one tensor, shards of tensor parallelism are slices. Loading then is copying by name, and what is left over or missing
is known exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kubeinfer.errors import ModelLoadError
from kubeinfer.layers.parallel import Group, Stage
from kubeinfer.quantization import QuantizationConfig

# Buffers that some exporters save and no layer reads; the last ones are scales of an 8-bit KV cache.
_IGNORED_ENDINGS = (
    "rotary_emb.inv_freq", "attn.masked_bias", "attn.bias_mask", "rope_freqs.weight",
    ".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".output_scale", ".kv_scale",
)  # fmt: skip

# Standard deviation of dummy FP8 weights before their scale: well inside the format's range (448).
FP8_DUMMY_SPREAD = 64.0


@dataclass(slots=True)
class Slot:
    """Destination of one checkpoint tensor; ``dim``, ``start`` and ``length`` choose this rank's slice of it."""

    into: Tensor
    dim: int | None = None
    start: int = 0
    length: int = 0
    loaded: bool = False
    required: bool = True

    def load(self, name: str, tensor: Tensor) -> None:
        if self.dim is not None:
            if tensor.dim() <= self.dim or tensor.shape[self.dim] < self.start + self.length:
                raise ModelLoadError(
                    f"{name} has shape {tuple(tensor.shape)}, too small for this model's config.json."
                )
            tensor = tensor.narrow(self.dim, self.start, self.length)
        if tensor.shape != self.into.shape:
            raise ModelLoadError(
                f"{name} has shape {tuple(tensor.shape)} but config.json asks for {tuple(self.into.shape)}; "
                "the weights and the configuration are not of the same model."
            )
        self.into.copy_(tensor)
        self.loaded = True


@dataclass(slots=True)
class ConvertingSlot:
    """Destination of a checkpoint tensor that is not copied as it is: ``put`` gets it whole.

    ``put`` raises ``ValueError`` with what is wrong where the tensor does not fit.
    """

    put: Callable[[Tensor], None]
    required: bool = True
    loaded: bool = False

    def load(self, name: str, tensor: Tensor) -> None:
        try:
            self.put(tensor)
        except ValueError as exc:
            raise ModelLoadError(f"{name} {exc}") from None
        self.loaded = True


@dataclass(frozen=True)
class HostLayers:
    """Decoder layers whose matrices are made in host memory: ``allocate(bytes)`` gives uint8 of it."""

    layers: frozenset[int]
    allocate: Callable[[int], Tensor]


class ParameterStore:
    """Makes a model's tensors on ``device`` in ``dtype`` and fills them from a checkpoint.

    The matrices of ``host``'s layers are made in host memory instead; ``host_tensors`` has them by layer. On the device
    ``meta`` a store only measures.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        group: Group,
        host: HostLayers | None = None,
        stage: Stage | None = None,
        quantization: QuantizationConfig | None = None,
    ):
        self.device = device
        self.dtype = dtype
        self.group = group
        self.stage = stage or Stage()
        self.quantization = quantization
        self.host = host
        self.slots: dict[str, list[Slot | ConvertingSlot]] = {}
        self.stored_names: set[str] = set()  # GGUF tensors that are wanted as the file holds them
        self.tensors: list[Tensor] = []
        self.host_tensors: dict[int, list[Tensor]] = {}
        self.layer_bytes: dict[int, int] = {}  # of a decoder layer's matrices
        self.num_bytes = 0  # on the device
        self.num_host_bytes = 0
        self._dummy_values: dict[int, float] = {}
        self._layer: int | None = None

    def begin_layer(self, layer: int | None) -> None:
        """The tensors made from now on are decoder layer ``layer``'s; None: they belong to no layer."""
        self._layer = layer

    def empty(self, *shape: int, dtype: torch.dtype | None = None, dummy: float | None = None) -> Tensor:
        """An unfilled tensor; of the store's dtype when none is given. ``dummy`` is its one value under load_format dummy."""
        dtype = dtype or self.dtype
        size = prod(shape) * dtype.itemsize
        layer = self._layer if len(shape) > 1 else None  # vectors are small, and stay with the device
        if layer is not None:
            self.layer_bytes[layer] = self.layer_bytes.get(layer, 0) + size
        if layer is not None and self.host is not None and layer in self.host.layers:
            tensor = self.host.allocate(size).view(dtype).view(shape)
            self.host_tensors.setdefault(layer, []).append(tensor)
            self.num_host_bytes += size
        else:
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
            self.num_bytes += size
        if dummy is not None:
            self._dummy_values[len(self.tensors)] = dummy
        self.tensors.append(tensor)
        return tensor

    def expect(
        self, name: str, into: Tensor, dim: int | None = None, start: int = 0, length: int = 0
    ) -> None:
        """Checkpoint tensor ``name`` (or its slice along ``dim``) belongs in ``into``."""
        self.slots.setdefault(name, []).append(Slot(into, dim, start, length))

    def expect_converted(self, name: str, put: Callable[[Tensor], None], required: bool = True) -> None:
        """Checkpoint tensor ``name`` goes through ``put``; it may be missing where not ``required``."""
        self.slots.setdefault(name, []).append(ConvertingSlot(put, required))

    def load(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        optional: frozenset[str] = frozenset(),
        elsewhere: tuple[str, ...] = (),
    ) -> None:
        """Copy every tensor to its place. ``optional`` names may be there or not (a tied head's copy).

        Names that begin like one of ``elsewhere`` are other stages'.
        Raises :class:`ModelLoadError` naming what is left over or missing.
        """
        left_over = []
        for name, tensor in tensors:
            # A checkpoint saved from the model without its head lacks the prefix (facebook/opt-125m).
            slots = self.slots.get(name) or self.slots.get(f"model.{name}")
            if slots is None:
                if not (name in optional or name.endswith(_IGNORED_ENDINGS) or belongs(name, elsewhere)):
                    left_over.append(name)
                continue
            for slot in slots:
                slot.load(name, tensor)
        missing = [
            name for name, slots in self.slots.items() if not all(s.loaded or not s.required for s in slots)
        ]
        if missing:
            raise ModelLoadError(
                f"the checkpoint lacks {_some(missing)}; it is incomplete or of another model."
            )
        if left_over:
            raise ModelLoadError(
                f"the checkpoint has tensors that this model has no place for: {_some(left_over)}."
            )

    def release(self) -> None:
        """Let go of the tensors: from now on they live as long as the layers that use them."""
        self.tensors.clear()
        self.host_tensors.clear()
        self._dummy_values.clear()
        self.slots.clear()

    def fill_random(self, seed: int) -> None:
        """Random weights of a sane scale, the same for a seed (load_format dummy)."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        for index, tensor in enumerate(self.tensors):
            # What belongs in host memory is drawn on the device too, so that it has the same values there.
            made = tensor if tensor.device == self.device else torch.empty_like(tensor, device=self.device)
            if index in self._dummy_values:
                made.fill_(self._dummy_values[index])
            elif not made.is_floating_point():
                made.random_(-(2**31), 2**31 - 1, generator=generator)
            elif made.dim() == 1:
                made.fill_(1.0)
            elif made.dtype == torch.float8_e4m3fn:
                wide = torch.empty(made.shape, dtype=self.dtype, device=self.device)
                wide.normal_(0.0, FP8_DUMMY_SPREAD, generator=generator)
                made.copy_(wide.clamp_(-6 * FP8_DUMMY_SPREAD, 6 * FP8_DUMMY_SPREAD))  # beyond 448 is NaN
            else:
                made.normal_(0.0, 0.02, generator=generator)
            if made is not tensor:
                tensor.copy_(made)


def belongs(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether checkpoint tensor ``name`` begins like one of ``prefixes``, which are written with ``model.``."""
    return name.startswith(prefixes) or f"model.{name}".startswith(prefixes)


def _some(names: list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
