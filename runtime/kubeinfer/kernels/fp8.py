"""Products with float8_e4m3fn weights, and the quantization of what they are multiplied by (Micikevicius et al. 2022).

Few tokens read the weights and multiply in the activations' own 16 bits; more are quantized too, each token by its own scale
(or by the checkpoint's static one), and multiplied by the tensor cores in 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kubeinfer.kernels.activation import silu_and_mul, silu_and_mul_reference
from kubeinfer.kernels.linear import few_rows
from kubeinfer.kernels.norm import rms_norm_reference

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# Up to so many tokens inputs stay in 16 bits, where a kernel of few tokens is known.
MAX_WIDE_ROWS = 4
# Scales of rows of zeros: anything that is not zero.
MIN_SCALE = 1e-12


@dataclass(slots=True)
class QuantizedRows:
    """``data`` float8_e4m3fn ``[T, K]`` times ``scale`` fp32 ``[T, 1]``, or ``[T, K / block]`` by columns; made from ``dtype``."""

    data: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.data.shape


@dataclass(slots=True)
class RowQuantizer:
    """How a layer wants its input in 8 bits, for the layer before to give it so: by ``static_scale``, or a scale a token."""

    static_scale: Tensor | None

    def wants(self, x: Tensor) -> bool:
        """Whether the layer's input, with as many rows as ``x``, is to be quantized."""
        return x.shape[0] > MAX_WIDE_ROWS

    def rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> QuantizedRows:
        """`rms_norm_quantize`."""
        return rms_norm_quantize(x, residual, weight, eps, self.static_scale)

    def silu_and_mul(self, x: Tensor) -> QuantizedRows:
        """`silu_and_mul_quantize`."""
        return silu_and_mul_quantize(x, self.static_scale)


def quantize_weight_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight [N, K]`` -> float8_e4m3fn ``[N, K]`` and its scale fp32 ``[N]``, one a row."""
    wide = weight.float()
    scale = wide.abs().amax(1).div_(FP8_MAX).clamp_(min=MIN_SCALE)
    return (wide / scale[:, None]).to(FP8), scale


def quantize_rows_reference(
    x: Tensor, static_scale: Tensor | None, block: int | None = None
) -> QuantizedRows:
    """`quantize_rows` in torch."""
    wide = x.float()
    if block is not None:
        padded = F.pad(wide, (0, -wide.shape[1] % block)).unflatten(1, (-1, block))
        scale = padded.abs().amax(2).div(FP8_MAX).clamp(min=MIN_SCALE)
        spread = scale.repeat_interleave(block, 1)[:, : wide.shape[1]]
    else:
        if static_scale is None:
            scale = wide.abs().amax(1, keepdim=True).div(FP8_MAX).clamp(min=MIN_SCALE)
        else:
            scale = static_scale.float().reshape(1, 1).expand(wide.shape[0], 1).contiguous()
        spread = scale
    return QuantizedRows((wide / spread).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale, x.dtype)


def quantize_rows(x: Tensor, static_scale: Tensor | None = None, block: int | None = None) -> QuantizedRows:
    """``x [T, K]`` in 8 bits: by ``static_scale`` (fp32, one number), else by each token's largest number.

    ``block``: a scale for so many columns of a token.
    """
    if x.is_cuda:
        from kubeinfer.kernels.triton_fp8 import quantize_blocks_triton, quantize_rows_triton

        if block is not None:
            return quantize_blocks_triton(x, block)
        return quantize_rows_triton(x, static_scale)
    return quantize_rows_reference(x, static_scale, block)


def rms_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, static_scale: Tensor | None = None
) -> QuantizedRows:
    """`quantize_rows` of ``rms_norm(x)``, or of ``rms_norm(residual += x)`` (in place) where ``residual`` is given."""
    if x.is_cuda:
        from kubeinfer.kernels.triton_fp8 import rms_norm_quantize_triton

        return rms_norm_quantize_triton(x, residual, weight, eps, static_scale)
    if residual is not None:
        x = residual.add_(x)
    return quantize_rows_reference(rms_norm_reference(x, weight, eps), static_scale)


def silu_and_mul_quantize(x: Tensor, static_scale: Tensor | None = None) -> QuantizedRows:
    """`quantize_rows` of ``silu_and_mul(x)``: ``x [T, 2 I]`` -> ``[T, I]``."""
    if x.is_cuda:
        from kubeinfer.kernels.triton_fp8 import silu_and_mul_quantize_triton

        return silu_and_mul_quantize_triton(x, static_scale)
    return quantize_rows_reference(silu_and_mul_reference(x), static_scale)


def fp8_linear(
    x: Tensor | QuantizedRows,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    static_scale: Tensor | None = None,
) -> Tensor:
    """``x @ (weight * weight_scale).T + bias`` -> ``[T, N]``.

    Args:
        x: ``[T, K]``, as it is or quantized.
        weight: float8_e4m3fn ``[N, K]``; N and K multiples of 16.
        weight_scale: fp32 ``[N]``.
        static_scale: of the activations, fp32 ``[1]``; None: a scale a token.
    """
    if isinstance(x, QuantizedRows):
        return scaled_product(x, weight, weight_scale, bias)
    if few_rows(x):
        from kubeinfer.kernels.triton_linear import find_fp8_config, linear_triton

        config = find_fp8_config(x.shape[0], weight.shape[0], weight.shape[1], "plain")
        if config is not None:
            out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
            return linear_triton(x, weight, bias, out, config, weight_scale=weight_scale)
    return scaled_product(quantize_rows(x, static_scale), weight, weight_scale, bias)


def fp8_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    static_scale: Tensor | None,
) -> Tensor:
    """`fp8_linear` of ``rms_norm(x)``."""
    if few_rows(x):
        from kubeinfer.kernels.triton_linear import find_fp8_config, linear_triton

        config = find_fp8_config(x.shape[0], weight.shape[0], weight.shape[1], "plain")
        if config is not None:
            out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
            return linear_triton(x, weight, bias, out, config, norm_weight, eps, weight_scale=weight_scale)
    return scaled_product(
        rms_norm_quantize(x, None, norm_weight, eps, static_scale), weight, weight_scale, bias
    )


def fp8_gated_linear(
    x: Tensor | QuantizedRows,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    static_scale: Tensor | None,
) -> Tensor:
    """``silu(gate) * up`` of `fp8_linear` (of ``rms_norm(x)`` with a ``norm_weight``): weight ``[2 I, K]`` -> ``[T, I]``."""
    if not isinstance(x, QuantizedRows) and few_rows(x):
        from kubeinfer.kernels.triton_linear import find_fp8_config, linear_triton

        inner = weight.shape[0] // 2
        config = find_fp8_config(x.shape[0], inner, weight.shape[1], "gated")
        if config is not None:
            out = torch.empty(x.shape[0], inner, dtype=x.dtype, device=x.device)
            return linear_triton(
                x, weight, bias, out, config, norm_weight, eps, gated=True, weight_scale=weight_scale
            )
    if norm_weight is None:
        return silu_and_mul(fp8_linear(x, weight, weight_scale, bias, static_scale))
    return silu_and_mul(fp8_norm_linear(x, norm_weight, eps, weight, weight_scale, bias, static_scale))


def fp8_add_linear(
    residual: Tensor,
    x: Tensor | QuantizedRows,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    static_scale: Tensor | None,
) -> Tensor:
    """``residual += fp8_linear(x)`` in place, and returned."""
    if not isinstance(x, QuantizedRows) and few_rows(x):
        from kubeinfer.kernels.triton_linear import find_fp8_config, linear_triton

        config = find_fp8_config(x.shape[0], weight.shape[0], weight.shape[1], "plain")
        if config is not None:
            return linear_triton(x, weight, bias, residual, config, add=True, weight_scale=weight_scale)
    return residual.add_(fp8_linear(x, weight, weight_scale, bias, static_scale))


def scaled_product(x: QuantizedRows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ (weight * weight_scale).T + bias`` on the tensor cores, sums in fp32 -> ``[T, N]`` in ``x.dtype``."""
    if x.data.is_cuda:
        return torch._scaled_mm(
            x.data, weight.t(), x.scale, weight_scale.view(1, -1), bias=bias, out_dtype=x.dtype, use_fast_accum=True
        )  # fmt: skip
    wide = (x.data.float() @ weight.float().t()) * x.scale * weight_scale
    return (wide if bias is None else wide + bias.float()).to(x.dtype)


def block_fp8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    block: int,
    bias: Tensor | None = None,
) -> Tensor:
    """``x @ w.T + bias`` -> ``[T, N]``: weights with a scale for each ``block`` inputs of an output.

    Args:
        x: ``[T, K]``.
        weight: float8_e4m3fn ``[N, K]``, K a multiple of 16.
        scale: fp32 ``[ceil(K / block), N]``.
    """
    if x.is_cuda:
        from kubeinfer.kernels.triton_fp8_block import block_fp8_linear_triton

        return block_fp8_linear_triton(x, weight, scale, block, bias)
    return block_fp8_linear_reference(quantize_rows(x, None, block), weight, scale, block, bias)


def block_fp8_linear_reference(
    x: QuantizedRows, weight: Tensor, scale: Tensor, block: int, bias: Tensor | None
) -> Tensor:
    """The product of quantized activations (a scale for each ``block`` columns) in torch."""
    columns = weight.shape[1]
    wide = x.data.float() * x.scale.repeat_interleave(block, 1)[:, :columns]
    matrix = weight.float() * scale.t().repeat_interleave(block, 1)[:, :columns]
    result = wide @ matrix.t()
    return (result if bias is None else result + bias.float()).to(x.dtype)
