"""FP8 weights: from a checkpoint that holds them, or made of unquantized ones while they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kubeinfer.errors import ModelLoadError, OptionError
from kubeinfer.kernels.fp8 import (
    FP8,
    QuantizedRows,
    RowQuantizer,
    block_fp8_linear,
    fp8_add_linear,
    fp8_gated_linear,
    fp8_linear,
    fp8_norm_linear,
    quantize_weight_rows,
)
from kubeinfer.kernels.norm import NormBegun
from kubeinfer.layers.parameters import FP8_DUMMY_SPREAD, ParameterStore
from kubeinfer.layers.quantization.base import LinearMethod, LoadingWeight, Part, Shard, say_once
from kubeinfer.layers.quantization.dense import DenseMethod
from kubeinfer.quantization import FP8Config

if TYPE_CHECKING:
    from kubeinfer.layers.norm import RMSNorm

_DUMMY_SCALE = 0.02 / FP8_DUMMY_SPREAD
_KERNEL_BLOCK = 128


class FP8Weight(LoadingWeight):
    """Weight float8_e4m3fn ``[N, K]``. However the checkpoint shares scales, here each output has its own: fp32 ``[N]``, or
    ``[K blocks, N]`` for scales in blocks. Parts of a fused layer so keep theirs."""

    def __init__(self, store: ParameterStore, shard: Shard, config: FP8Config):
        self.config, self.shard, self.store = config, shard, store
        n, k = shard.out_features, shard.in_features
        self.weight = store.empty(n, k, dtype=FP8)
        self.static_scale: Tensor | None = None
        if config.block is None:
            self.scale = store.empty(n, dtype=torch.float32, dummy=_DUMMY_SCALE)
        else:
            self._check_blocks(config.block[1])
            blocks = -(-k // config.block[1])
            self.scale = store.empty(blocks, n, dtype=torch.float32, dummy=_DUMMY_SCALE)
        if config.serialized and config.activations == "static":
            self.static_scale = store.empty(1, dtype=torch.float32, dummy=1.0 / 16)
            self.static_scale.zero_()
        for part in shard.parts:
            self._expect(part)

    def _check_blocks(self, columns: int) -> None:
        shard, size = self.shard, self.store.group.size
        if shard.splits_inputs and (shard.in_start % columns or shard.in_features % columns):
            raise OptionError(
                f"tensor_parallel_size {size} cuts the {shard.in_total} inputs of {shard.parts[0].name} within a block of "
                f"{columns} that share a scale; choose a size that divides {shard.in_total // columns}.",
                "tensor_parallel_size",
            )

    def _expect(self, part: Part) -> None:
        store, name = self.store, part.name
        weight = self.weight.narrow(0, part.offset, part.length)
        if not self.config.serialized:
            scale = self.scale.narrow(0, part.offset, part.length)
            store.expect_converted(
                f"{name}.weight", lambda tensor: self._put_unquantized(part, weight, scale, tensor)
            )
            return
        store.expect_converted(f"{name}.weight", lambda tensor: self._put_weight(part, weight, tensor))
        store.expect_converted(
            f"{name}.{self.config.scale_name}", lambda tensor: self._put_scale(part, tensor)
        )
        if self.static_scale is not None:
            store.expect_converted(f"{name}.input_scale", self._put_static_scale)

    def _own(self, part: Part, tensor: Tensor) -> Tensor:
        """This rank's slice of a whole weight."""
        shard = self.shard
        if tensor.shape != (part.total, shard.in_total):
            raise ValueError(
                f"has shape {tuple(tensor.shape)} but config.json asks for {(part.total, shard.in_total)}; "
                "the weights and the configuration are not of the same model."
            )
        return tensor[
            part.start : part.start + part.length, shard.in_start : shard.in_start + shard.in_features
        ]

    def _put_unquantized(self, part: Part, weight: Tensor, scale: Tensor, tensor: Tensor) -> None:
        data, scales = quantize_weight_rows(self._own(part, tensor).to(self.store.device))
        weight.copy_(data)
        scale.copy_(scales)

    def _put_weight(self, part: Part, weight: Tensor, tensor: Tensor) -> None:
        if tensor.dtype != FP8:
            raise ValueError(
                f"is {tensor.dtype}, but quantization_config says FP8 (e4m3) and does not name it among the unquantized layers."
            )
        weight.copy_(self._own(part, tensor))

    def _put_scale(self, part: Part, tensor: Tensor) -> None:
        """A scale for all of the weight, for each of its outputs, or for each block."""
        shard, block = self.shard, self.config.block
        into = self.scale.narrow(-1, part.offset, part.length)
        if block is not None:
            columns = -(-shard.in_total // block[1])
            if tensor.shape != (-(-part.total // block[0]), columns):
                raise ValueError(
                    f"has shape {tuple(tensor.shape)}, which is not a scale for each block of {block}."
                )
            first = shard.in_start // block[1]
            own = tensor[:, first : first + into.shape[0]].float().repeat_interleave(block[0], 0)
            into.copy_(own[part.start : part.start + part.length].t())
        elif tensor.numel() == 1:
            into.copy_(tensor.float().reshape(1).expand(part.length))
        elif tensor.numel() == part.total:
            into.copy_(tensor.float().reshape(-1)[part.start : part.start + part.length])
        else:
            raise ValueError(
                f"has shape {tuple(tensor.shape)}, which is neither a scale of the whole weight nor of its {part.total} outputs."
            )

    def _put_static_scale(self, tensor: Tensor) -> None:
        """The parts of a fused layer share their input: the widest of their scales serves all."""
        if tensor.numel() != 1:
            raise ValueError(f"has shape {tuple(tensor.shape)}, not one number.")
        if self.static_scale is None:
            raise ValueError("is not expected with dynamic activation scales.")
        wide = tensor.float().reshape(1).to(self.static_scale.device)
        self.static_scale.copy_(torch.maximum(self.static_scale, wide))

    def finish(self) -> LinearMethod:
        if self.static_scale is not None and not bool(self.static_scale > 0):
            raise ModelLoadError(f"{self.shard.parts[0].name}.input_scale must be above zero.")
        reason = self._why_dense()
        if reason is not None:
            say_once(f"FP8 weights are dequantized at load to {self.store.dtype}: {reason}")
            weight = self._dequantized()
            self.store.num_bytes += weight.numel() * weight.element_size() - self.weight.numel()
            return DenseMethod(weight)
        if self.config.block is not None:
            return BlockFP8Method(self.weight, self.scale)
        return FP8Method(self.weight, self.scale, self.static_scale)

    def _dequantized(self) -> Tensor:
        scale = self.scale[:, None]
        if self.config.block is not None:
            scale = self.scale.t().repeat_interleave(self.config.block[1], 1)[:, : self.weight.shape[1]]
        return (self.weight.float() * scale).to(self.store.dtype)

    def _why_dense(self) -> str | None:
        device, block = self.store.device, self.config.block
        if device.type != "cuda":
            return "there is no kernel for them on the CPU"
        if torch.cuda.get_device_capability(device) < (8, 9):
            return f"{torch.cuda.get_device_name(device)} has no FP8 (compute capability 8.9 or later)"
        if self.store.dtype not in (torch.float16, torch.bfloat16):
            return "their kernels compute in 16 bits"
        if self.config.activations == "none":
            return "the checkpoint leaves activations unquantized"
        if block is not None and block[1] != _KERNEL_BLOCK:
            return f"their kernel knows blocks of {_KERNEL_BLOCK} inputs, not {block[1]}"
        if any(size % 16 for size in self.weight.shape):
            return "their kernels need sizes that are multiples of 16"
        return None


class FP8Method(LinearMethod):
    """A scale an output, on a GPU with FP8."""

    def __init__(self, weight: Tensor, scale: Tensor, static_scale: Tensor | None):
        self.weight, self.scale, self.static_scale = weight, scale, static_scale
        self.quantizer = RowQuantizer(static_scale)

    def apply(self, x: Tensor | QuantizedRows, bias: Tensor | None) -> Tensor:
        return fp8_linear(x, self.weight, self.scale, bias, self.static_scale)

    def after_norm(
        self, x: Tensor, norm: RMSNorm, bias: Tensor | None, begun: NormBegun | None = None
    ) -> Tensor:
        return fp8_norm_linear(x, norm.weight, norm.eps, self.weight, self.scale, bias, self.static_scale)

    def gated(
        self,
        x: Tensor | QuantizedRows,
        bias: Tensor | None,
        norm: RMSNorm | None = None,
        begun: NormBegun | None = None,
    ) -> Tensor:
        norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return fp8_gated_linear(x, norm_weight, eps, self.weight, self.scale, bias, self.static_scale)

    def add_to(self, residual: Tensor, x: Tensor | QuantizedRows, bias: Tensor | None) -> Tensor:
        return fp8_add_linear(residual, x, self.weight, self.scale, bias, self.static_scale)


class BlockFP8Method(LinearMethod):
    """A scale for each 128 inputs of an output (DeepSeek-V3's blocks), activations quantized likewise."""

    def __init__(self, weight: Tensor, scale: Tensor):
        self.weight, self.scale = weight, scale

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return block_fp8_linear(x, self.weight, self.scale, _KERNEL_BLOCK, bias)
