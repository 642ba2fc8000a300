"""AWQ and GPTQ: integers in groups with a scale and a zero each (Lin et al. 2023; Frantar et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kubeinfer.errors import ModelLoadError, OptionError
from kubeinfer.kernels.int4 import (
    Int4Weight,
    dequantize_codes,
    int4_add_before_norm,
    int4_linear,
    pack_int4,
    unpack_awq,
    unpack_gptq_weight,
    unpack_gptq_zeros,
)
from kubeinfer.kernels.norm import NormBegun
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.layers.quantization.base import LinearMethod, LoadingWeight, Shard, say_once
from kubeinfer.layers.quantization.dense import DenseMethod
from kubeinfer.quantization import GroupedIntConfig

if TYPE_CHECKING:
    from kubeinfer.layers.norm import RMSNorm

# Dummy weights have the spread of other dummies (0.02): zeros of 7, and uniform codes have a deviation of 4.6.
_DUMMY_ZEROS, _DUMMY_SCALE = 0x77777777, 0.02 / 4.6


class GroupedIntWeight(LoadingWeight):
    """The checkpoint's packed tensors until `finish`, then `Int4Method` or, where that has no kernel, dense weights.

    AWQ packs eight outputs a word (``qweight [K, N / 8]``), GPTQ eight inputs (``[K / 8, N]``); both have ``qzeros [G, N / 8]``
    and ``scales [G, N]``. GPTQ's ``g_idx [K]`` gives each input's group, in any order with desc_act.
    """

    def __init__(self, store: ParameterStore, shard: Shard, config: GroupedIntConfig):
        self.config, self.shard, self.store = config, shard, store
        self.per_word = 32 // config.bits
        self.group = config.group_size if config.group_size != -1 else shard.in_total
        self._check_slices()
        groups = -(-shard.in_total // self.group)  # all of them, as desc_act may need any
        n, k, pack = shard.out_features, shard.in_features, self.per_word
        self.awq = config.name == "awq"
        words = (k, n // pack) if self.awq else (k // pack, n)
        self.qweight = store.empty(*words, dtype=torch.int32)
        self.qzeros = store.empty(groups, n // pack, dtype=torch.int32, dummy=_DUMMY_ZEROS)
        self.scales = store.empty(
            groups, n, dtype=torch.float32, dummy=_DUMMY_SCALE * 15 / (2**config.bits - 1)
        )
        self.num_bytes = 4 * (self.qweight.numel() + self.qzeros.numel() + self.scales.numel())
        self.g_idx: list[Tensor] = []
        for part in shard.parts:
            self._expect(part.name, part.offset, part.start, part.length)

    def _check_slices(self) -> None:
        shard, pack, size = self.shard, self.per_word, self.store.group.size
        unit = max(self.group, pack) if self.group < shard.in_total else pack
        if shard.splits_inputs and (shard.in_start % unit or shard.in_features % unit):
            raise OptionError(
                f"tensor_parallel_size {size} cuts the {shard.in_total} inputs of {shard.parts[0].name} within a group of "
                f"{unit} quantized ones; choose a size that divides {shard.in_total // unit}.",
                "tensor_parallel_size",
            )
        for part in shard.parts:
            if part.start % pack or part.length % pack or part.offset % pack:
                raise OptionError(
                    f"tensor_parallel_size {size} cuts the {part.total} outputs of {part.name} within a word of {pack} packed "
                    "ones; choose a smaller size.",
                    "tensor_parallel_size",
                )

    def _expect(self, name: str, offset: int, start: int, length: int) -> None:
        store, shard, pack = self.store, self.shard, self.per_word
        packed = (offset // pack, length // pack)
        outputs = packed if self.awq else (offset, length)
        into = self.qweight.narrow(1, *outputs)
        if shard.splits_inputs:
            unit = 1 if self.awq else pack
            store.expect(f"{name}.qweight", into, 0, shard.in_start // unit, shard.in_features // unit)
        else:
            store.expect(f"{name}.qweight", into, 1, start // pack if self.awq else start, outputs[1])
        store.expect(f"{name}.qzeros", self.qzeros.narrow(1, *packed), 1, start // pack, length // pack)
        store.expect(f"{name}.scales", self.scales.narrow(1, offset, length), 1, start, length)
        if not self.awq:
            store.expect_converted(f"{name}.g_idx", self._put_g_idx, required=False)
            # Some exporters write a bias of zeros for layers that have none; where there is one, its own slot takes it too.
            store.expect_converted(f"{name}.bias", self._check_extra_bias(f"{name}.bias"), required=False)

    def _check_extra_bias(self, name: str) -> Callable[[Tensor], None]:
        def check(tensor: Tensor) -> None:
            if len(self.store.slots[name]) == 1 and bool(tensor.any()):
                raise ValueError("is not zero, but this model's layer has no bias.")

        return check

    def _put_g_idx(self, tensor: Tensor) -> None:
        if tensor.shape != (self.shard.in_total,):
            raise ValueError(f"has shape {tuple(tensor.shape)}, not ({self.shard.in_total},)")
        own = tensor.narrow(0, self.shard.in_start, self.shard.in_features)
        self.g_idx.append(own.to(self.store.device, torch.int64))

    def _groups(self) -> tuple[Tensor, bool]:
        """The group of each input, and whether they come in order."""
        shard = self.shard
        plain = torch.arange(shard.in_start, shard.in_start + shard.in_features, device=self.store.device)
        plain //= self.group
        if not self.g_idx:
            return plain, True
        found = self.g_idx[0]
        if any(not torch.equal(found, other) for other in self.g_idx[1:]):
            names = ", ".join(part.name for part in shard.parts)
            raise ModelLoadError(
                f"{names} order their inputs differently (g_idx); they are one product here."
            )
        return found, bool(torch.equal(found, plain))

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        bits = self.config.bits
        if self.awq:
            return unpack_awq(self.qweight), unpack_awq(self.qzeros)
        return (
            unpack_gptq_weight(self.qweight, bits),
            unpack_gptq_zeros(self.qzeros, bits, self.config.zero_offset),
        )

    def finish(self) -> LinearMethod:
        groups, in_order = self._groups()
        codes, zeros = self._unpacked()
        reason = self._why_dense()
        if reason is not None:
            say_once(f"{self.config.name} weights are dequantized at load to {self.store.dtype}: {reason}")
            weight = dequantize_codes(codes, self.scales, zeros, groups).to(self.store.dtype).contiguous()
            self.store.num_bytes += weight.numel() * weight.element_size() - self.num_bytes
            return DenseMethod(weight)
        order = None
        scales = self.scales
        if not in_order:
            order = groups.argsort(stable=True)
            self._check_regular(groups)
            codes = codes.index_select(0, order)
        elif self.shard.splits_inputs and self.group < self.shard.in_total:
            own = slice(
                self.shard.in_start // self.group,
                -(-(self.shard.in_start + self.shard.in_features) // self.group),
            )
            scales, zeros = scales[own], zeros[own]
        packed = pack_int4(codes, scales, zeros, self.group, order)
        self.store.num_bytes += packed.num_bytes - self.num_bytes
        return Int4Method(packed)

    def _why_dense(self) -> str | None:
        if self.store.device.type != "cuda":
            return "there is no kernel for them on the CPU"
        if self.config.bits != 4:
            return f"there is no kernel for weights of {self.config.bits} bits"
        if self.store.dtype not in (torch.float16, torch.bfloat16):
            return "their kernel computes in 16 bits"
        return None

    def _check_regular(self, groups: Tensor) -> None:
        """In act-order each rank must hold whole groups."""
        if self.shard.splits_inputs:
            raise OptionError(
                f"tensor_parallel_size {self.store.group.size} is not supported with this checkpoint: its groups are in "
                "act-order (desc_act), and slices of its inputs hold parts of groups. Use one GPU or a checkpoint without desc_act.",
                "tensor_parallel_size",
            )
        counts = torch.bincount(groups, minlength=self.scales.shape[0])
        if bool((counts[:-1] != self.group).any()):
            raise ModelLoadError(
                f"{self.shard.parts[0].name}.g_idx has groups that are not of {self.group} inputs."
            )


class Int4Method(LinearMethod):
    """4-bit weights in our own layout, on a GPU."""

    def __init__(self, weight: Int4Weight):
        self.weight = weight

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return int4_linear(x, self.weight, bias)

    def after_norm(
        self, x: Tensor, norm: RMSNorm, bias: Tensor | None, begun: NormBegun | None = None
    ) -> Tensor:
        return int4_linear(x, self.weight, bias, norm.weight, norm.eps, begun=begun)

    def gated(
        self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None, begun: NormBegun | None = None
    ) -> Tensor:
        if norm is None:
            return int4_linear(x, self.weight, bias, gated=True)
        return int4_linear(x, self.weight, bias, norm.weight, norm.eps, gated=True, begun=begun)

    def add_to(self, residual: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        return int4_linear(x, self.weight, bias, residual=residual)

    def add_before_norm(
        self, residual: Tensor, x: Tensor, bias: Tensor | None, norm: RMSNorm
    ) -> NormBegun | None:
        return int4_add_before_norm(residual, x, self.weight, bias, norm.weight)
