"""Quantized products and quantization, against float64 on the numbers that the quantized ones stand for."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from references import EPS, error, gated, normed
from torch import Tensor

from kubeinfer.kernels import fp8, int4
from kubeinfer.kernels.fp8 import FP8, QuantizedRows
from kubeinfer.kernels.int4 import Int4Weight, int4_linear, pack_int4, pack_with_minimums
from kubeinfer.quantization import GGUF_FORMS
from kubeinfer.weights.readers.gguf_dequant import unpack
from kubeinfer.weights.readers.gguf_file import _TYPES

HALVES = [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}


def numbers(rows: QuantizedRows, block: int | None = None) -> Tensor:
    scale = rows.scale.double().cpu()
    if block is not None:
        scale = scale.repeat_interleave(block, 1)[:, : rows.shape[1]]
    return rows.data.double().cpu() * scale


# Quantization of activations


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (9, 896), (40, 1000), (3, 3584), (600, 96)])
@pytest.mark.parametrize("static", [False, True])
def test_rows_in_8_bits(device: str, dtype: torch.dtype, tokens: int, width: int, static: bool) -> None:
    torch.manual_seed(tokens + width)
    x = (torch.randn(tokens, width) * torch.rand(tokens, 1) * 3).to(dtype)
    residual, weight = torch.randn(tokens, width).to(dtype), (torch.rand(width) + 0.5).to(dtype)
    scale = torch.tensor([0.02]) if static else None
    given = None if scale is None else scale.to(device)
    total = (x.float() + residual.float()).to(dtype)
    residual_on = residual.clone().to(device)
    for got, want in (
        (fp8.quantize_rows(x.to(device), given), x.double()),
        (fp8.rms_norm_quantize(x.to(device), None, weight.to(device), EPS, given), normed(x, weight)),
        (
            fp8.rms_norm_quantize(x.to(device), residual_on, weight.to(device), EPS, given),
            normed(total, weight),
        ),
        (
            fp8.silu_and_mul_quantize(torch.cat((x, residual), 1).to(device), given),
            gated(torch.cat((x, residual), 1).double()),
        ),
    ):
        assert got.data.dtype == FP8
        assert got.dtype == dtype
        assert got.scale.shape == (tokens, 1)
        expected = (
            want.abs().amax(1, keepdim=True) / 448 if scale is None else scale.double().expand(tokens, 1)
        )
        assert torch.allclose(got.scale.double().cpu(), expected, rtol=1e-2)
        bound = want.clamp(-448 * expected, 448 * expected)
        # Half a unit in the last of 3 bits of mantissa, or of the smallest number; and the dtype's own rounding.
        off = (numbers(got) - bound).abs()
        assert bool((off <= 0.075 * bound.abs() + expected * 2**-9 + 1e-6).all())
    assert torch.equal(residual_on.cpu(), total)


@pytest.mark.parametrize(("tokens", "width"), [(1, 128), (3, 896), (70, 1000)])
def test_blocks_in_8_bits(device: str, tokens: int, width: int) -> None:
    x = torch.randn(tokens, width, dtype=torch.bfloat16)
    x[0, :128] = 0
    got = fp8.quantize_rows(x.to(device), None, 128)
    assert got.scale.shape == (tokens, -(-width // 128))
    spread = got.scale.double().cpu().repeat_interleave(128, 1)[:, :width]
    off = (numbers(got, 128) - x.double()).abs()
    assert bool((off <= 0.075 * x.double().abs() + spread * 2**-9).all())


def test_strided_rows_in_8_bits(device: str) -> None:
    wide = torch.randn(9, 300, dtype=torch.bfloat16)
    got = fp8.quantize_rows(wide.to(device)[:, 32:288])
    assert error(numbers(got), wide[:, 32:288].double()) < 0.04


# Products with FP8 weights


def fp8_weight(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    data, scale = fp8.quantize_weight_rows(torch.randn(n, k) / k**0.5 * (1 + torch.rand(n, 1)))
    return data, scale, data.double() * scale.double()[:, None]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("tokens", "n", "k"),
    [(1, 48, 896), (2, 32, 3584), (4, 80, 208), (3, 16, 4864), (7, 64, 256), (33, 96, 512)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_fp8_products(device: str, dtype: torch.dtype, tokens: int, n: int, k: int, bias: bool) -> None:
    """Fused and not; of a few tokens nearly exact, of more with their inputs in 8 bits too."""
    torch.manual_seed(tokens * n + k)
    x, norm = torch.randn(tokens, k).to(dtype), (torch.rand(k) + 0.5).to(dtype)
    data, scale, plain = fp8_weight(2 * n, k)
    b = torch.randn(2 * n).to(dtype) if bias else None
    residual = torch.randn(tokens, 2 * n).to(dtype)
    few = tokens <= 4 and torch.zeros(1, device=device).is_cuda
    tolerance = TOLERANCE[dtype] if few else 0.06

    def dense(y: Tensor) -> Tensor:
        return y.double() @ plain.T + (b.double() if b is not None else 0)

    w, s, nw = data.to(device), scale.to(device), norm.to(device)
    b_on = None if b is None else b.to(device)
    on = x.to(device)
    assert error(fp8.fp8_linear(on, w, s, b_on), dense(x)) < tolerance
    assert error(fp8.fp8_norm_linear(on, nw, EPS, w, s, b_on, None), dense(normed(x, norm))) < tolerance
    assert error(fp8.fp8_gated_linear(on, None, 0.0, w, s, b_on, None), gated(dense(x))) < 2 * tolerance
    got = fp8.fp8_gated_linear(on, nw, EPS, w, s, b_on, None)
    assert got.dtype == dtype
    assert error(got, gated(dense(normed(x, norm)))) < 2 * tolerance
    total = residual.clone().to(device)
    assert fp8.fp8_add_linear(total, on, w, s, b_on, None) is total
    assert error(total, residual.double() + dense(x)) < tolerance


@pytest.mark.parametrize("static", [False, True])
def test_products_of_quantized_rows(device: str, static: bool) -> None:
    """Nothing is lost but the rounding of the result: what is multiplied is known exactly."""
    x = torch.randn(50, 256, dtype=torch.bfloat16)
    data, scale, plain = fp8_weight(64, 256)
    rows = fp8.quantize_rows(x.to(device), torch.tensor([0.01], device=device) if static else None)
    got = fp8.fp8_linear(rows, data.to(device), scale.to(device))
    assert got.dtype == torch.bfloat16
    assert error(got, numbers(rows) @ plain.T) < 5e-3


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("tokens", "n", "k"), [(1, 48, 896), (5, 130, 3584), (40, 96, 208), (70, 200, 512), (300, 64, 256)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_block_fp8_products(device: str, dtype: torch.dtype, tokens: int, n: int, k: int, bias: bool) -> None:
    torch.manual_seed(tokens + n + k)
    x = torch.randn(tokens, k).to(dtype)
    data = torch.randn(n, k).clamp(-440, 440).to(FP8)
    scale = torch.rand(-(-k // 128), n) + 0.5
    b = torch.randn(n).to(dtype) if bias else None
    plain = data.double() * scale.double().t().repeat_interleave(128, 1)[:, :k]
    rows = fp8.quantize_rows_reference(x, None, 128)
    want = numbers(rows, 128) @ plain.T + (b.double() if b is not None else 0)
    got = fp8.block_fp8_linear(
        x.to(device), data.to(device), scale.to(device), 128, None if b is None else b.to(device)
    )
    assert got.dtype == dtype
    assert error(got, want) < TOLERANCE[dtype]
    assert error(got, x.double() @ plain.T + (b.double() if b is not None else 0)) < 0.05


# Products with 4-bit weights


def int4_weight(n: int, k: int, group: int, act_order: bool = False) -> tuple[Int4Weight, Tensor]:
    """Packed, and in float64 with inputs in the layer's own order."""
    groups = -(-k // group)
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (groups, n), dtype=torch.uint8)
    scales = (torch.rand(groups, n) / k**0.5).half().float() / 4
    at = torch.arange(k) // group
    plain = ((codes.double() - zeros.double()[at]) * scales.double()[at]).T
    if not act_order:
        return pack_int4(codes, scales, zeros, group, None), plain
    order = torch.randperm(k)
    own = torch.empty_like(plain)
    own[:, order] = plain
    return pack_int4(codes, scales, zeros, group, order), own


def move(weight: Int4Weight, device: str) -> Int4Weight:
    order = None if weight.order is None else weight.order.to(device)
    return replace(weight, words=weight.words.to(device), meta=weight.meta.to(device), order=order)


@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(48, 256, 128), (8, 896, 32), (24, 1000, 64), (16, 4864, 256), (40, 200, 200), (8, 3584, 3584)],
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_dequantized(device: str, n: int, k: int, group: int, dtype: torch.dtype) -> None:
    weight, plain = int4_weight(n, k, group)
    got = int4.dequantize_int4(move(weight, device), dtype)
    assert torch.equal(got.cpu(), int4.dequantize_int4_reference(weight, dtype))
    assert error(got, plain) < TOLERANCE[dtype]


def check_products(
    packed: Int4Weight,
    plain: Tensor,
    x: Tensor,
    norm: Tensor,
    bias: bool,
    device: str,
    tolerance: float,
    gated_tolerance: float,
) -> None:
    """Every form of a product with ``packed`` against one with ``plain``, the same weight in fp64."""
    outputs, dtype = plain.shape[0], x.dtype
    weight = move(packed, device)
    b = torch.randn(outputs).to(dtype) if bias else None
    b_on = None if b is None else b.to(device)
    residual = torch.randn(x.shape[0], outputs).to(dtype)
    on, nw = x.to(device), norm.to(device)

    def dense(y: Tensor) -> Tensor:
        return y.double() @ plain.T + (b.double() if b is not None else 0)

    got = int4_linear(on, weight, b_on)
    assert got.dtype == dtype
    assert error(got, dense(x)) < tolerance
    assert error(int4_linear(on, weight, b_on, nw, EPS), dense(normed(x, norm))) < tolerance
    assert error(int4_linear(on, weight, b_on, gated=True), gated(dense(x))) < gated_tolerance
    got = int4_linear(on, weight, b_on, nw, EPS, gated=True)
    assert error(got, gated(dense(normed(x, norm)))) < gated_tolerance
    total = residual.clone().to(device)
    assert int4_linear(on, weight, b_on, residual=total) is total
    assert error(total, residual.double() + dense(x)) < tolerance


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("tokens", "n", "k", "group", "act_order", "bias"),
    [
        (1, 48, 256, 128, False, True),
        (1, 20, 896, 32, False, False),
        (1, 16, 4864, 64, True, False),
        (2, 42, 1000, 1000, False, True),
        (3, 32, 3584, 128, False, False),
        (8, 40, 1024, 1024, True, True),
        (9, 32, 18944, 128, False, True),
        (16, 48, 896, 64, False, False),
        (24, 64, 512, 32, False, True),
        (33, 130, 1024, 32, True, False),
        (100, 64, 3584, 128, False, True),
        (200, 24, 200, 200, False, False),
        (300, 40, 256, 128, True, True),
    ],
)
def test_int4_products(
    device: str, dtype: torch.dtype, tokens: int, n: int, k: int, group: int, act_order: bool, bias: bool
) -> None:
    torch.manual_seed(tokens * n + k)
    x, norm = torch.randn(tokens, k).to(dtype), (torch.rand(k) + 0.5).to(dtype)
    packed, plain = int4_weight(2 * n, k, group, act_order)
    check_products(packed, plain, x, norm, bias, device, TOLERANCE[dtype], TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "tokens", "k", "gated_rows"),
    [
        ((1, 1, 1), 1, 256, False),
        ((1, 4, 4), 1, 3584, False),
        ((1, 16, 2), 5, 3584, False),
        ((1, 8, 4), 8, 18944, False),
        ((2, 8, 2), 13, 3584, False),
        ((1, 4, 2), 32, 2432, False),
        ((2, 4, 3), 1, 3584, True),
        ((2, 2, 2), 3, 1000, True),
        ((2, 8, 1), 16, 3584, True),
        ((4, 4, 2), 7, 896, True),
        ((4, 2, 1), 30, 512, True),
    ],
)
def test_every_tile_of_the_int4_kernel(
    device: str, config: tuple[int, int, int], tokens: int, k: int, gated_rows: bool
) -> None:
    if not torch.zeros(1, device=device).is_cuda:
        pytest.skip("about the Triton kernel")
    from kubeinfer.kernels.triton_int4 import Int4Config, int4_few_triton

    packed, plain = int4_weight(96 if gated_rows else 52, k, 128 if k % 128 == 0 else 40 * k)
    x, norm = torch.randn(tokens, k).bfloat16(), (torch.rand(k) + 0.5).bfloat16()
    weight, on = move(packed, device), x.to(device)
    got = int4_few_triton(on, weight, None, norm.to(device), EPS, gated_rows, None, Int4Config(*config))
    want = normed(x, norm) @ plain.T
    assert error(got, gated(want) if gated_rows else want) < TOLERANCE[torch.bfloat16]
    if not gated_rows:
        total = torch.randn(tokens, 52).half()
        want = total.double() + x.double() @ plain.T
        got = int4_few_triton(
            on.half(), weight, None, None, 0.0, False, total.to(device), Int4Config(*config)
        )
        assert error(got, want) < TOLERANCE[torch.float16]


def on_hopper(device: str) -> bool:
    return bool(torch.zeros(1, device=device).is_cuda) and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.gpu
def test_int4_kernel_for_the_form(device: str) -> None:
    """Weights go through shared memory only where that was tuned: few tokens in bfloat16, groups of 128."""
    if not on_hopper(device):
        pytest.skip("about Hopper's kernel")
    from kubeinfer.kernels.triton_int4 import few_config
    from kubeinfer.kernels.triton_int4_bulk import Int4BulkConfig

    def shared(tokens: int, n: int, gated_rows: bool, dtype: torch.dtype, group: int = 128) -> bool:
        weight = Int4Weight(torch.empty(0), torch.empty(0), n, 3584, group)
        x = torch.empty(tokens, 3584, dtype=dtype, device=device)
        return isinstance(few_config(x, weight, gated_rows), Int4BulkConfig)

    for n, gated_rows in ((4608, False), (37888, True)):
        assert shared(1, n, gated_rows, torch.bfloat16)
        assert shared(8, n, gated_rows, torch.bfloat16)
        assert not shared(9, n, gated_rows, torch.bfloat16)
        assert not shared(1, n, gated_rows, torch.float16)
        assert not shared(1, n, gated_rows, torch.bfloat16, group=64)
    assert not shared(1, 4096, False, torch.bfloat16)


@pytest.mark.gpu
def test_int4_products_of_huge_inputs_in_float16(device: str) -> None:
    """Norm weights times inputs would overflow float16; normed inputs do not."""
    packed, plain = int4_weight(64, 512, 128)
    x, norm = (torch.randn(2, 512) * 8000).half(), (torch.rand(512) * 40).half()
    got = int4_linear(x.to(device), move(packed, device), None, norm.to(device), EPS)
    assert error(got, normed(x, norm) @ plain.T) < 2 * TOLERANCE[torch.float16]


def test_packing_is_reversible() -> None:
    rng = random.Random(0)
    for _ in range(5):
        n, k = 8 * rng.randrange(1, 6), 32 * rng.randrange(1, 20)
        codes = torch.randint(0, 16, (k, n), dtype=torch.uint8)
        ones = torch.ones(k // 32, n)
        weight = pack_int4(codes, ones, torch.zeros_like(ones), 32, None)
        assert torch.equal(int4.dequantize_int4_reference(weight, torch.float32), codes.float().t())


def test_blocks_hold_what_threads_multiply() -> None:
    """The order that the tensor cores' left operand wants: see `kubeinfer.kernels.int4`."""
    n, k = 20, 200
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8)
    scales, zeros = torch.rand(2, n), torch.randint(0, 16, (2, n), dtype=torch.uint8)
    weight = pack_int4(codes, scales, zeros, 128, None)
    assert weight.words.shape == (2, 2, 1, 16, 16)
    assert weight.meta.shape == (2, 2, 16)
    for _ in range(200):
        row, chunk, t, j, b, c, h = (random.randrange(end) for end in (n, 2, 4, 4, 2, 2, 2))
        word = int(weight.words[row // 16, chunk, 0, row % 16, 4 * t + j])
        column = 128 * chunk + 32 * j + 16 * b + 4 * t + 2 * c + h
        assert word >> (4 * (4 * h + 2 * b + c)) & 15 == (codes[column, row] if column < k else 0)
        meta = int(weight.meta[row // 16, chunk, row % 8 * 2 + row % 16 // 8])
        assert meta & 255 == zeros[chunk, row]
    assert not weight.meta[1, :, 8::2].any(), "rows past the end"


# With minimums, and in 8 bits


@pytest.mark.parametrize("kind", list(GGUF_FORMS))
def test_gguf_blocks_are_unpacked_as_on_the_cpu(device: str, kind: str) -> None:
    _, _, size = next(entry for entry in _TYPES.values() if entry[0] == kind)
    blocks = torch.randint(0, 256, (37, size), dtype=torch.uint8)
    for got, want in zip(unpack(blocks.to(device), kind), unpack(blocks, kind), strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got.cpu().nan_to_num(), want.nan_to_num())


def weight_with_minimums(n: int, k: int, group: int, bits: int) -> tuple[Int4Weight, Tensor]:
    """Packed, and in float64."""
    codes = (
        torch.randint(0, 16, (n, k), dtype=torch.uint8)
        if bits == 4
        else torch.randint(-128, 128, (n, k), dtype=torch.int8)
    )
    scales = (torch.rand(n, k // group) / k**0.5).half() / (4 if bits == 4 else 64)
    minimums = (scales * torch.randint(-15, 16, scales.shape)).half()
    plain = (
        codes.double().view(n, -1, group) * scales.double()[..., None] + minimums.double()[..., None]
    ).flatten(1)
    return pack_with_minimums(codes, scales, minimums, group, bits), plain


BITS_AND_GROUPS = [(4, 32), (8, 32), (8, 16)]


@pytest.mark.parametrize(("bits", "group"), BITS_AND_GROUPS)
@pytest.mark.parametrize(("n", "k"), [(48, 256), (8, 896), (16, 4864), (40, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_dequantized_with_minimums(
    device: str, n: int, k: int, bits: int, group: int, dtype: torch.dtype
) -> None:
    weight, plain = weight_with_minimums(n, k, group, bits)
    reference = int4.dequantize_int4_reference(weight, dtype)
    assert torch.allclose(reference.double(), plain, rtol=TOLERANCE[dtype], atol=1e-7)
    got = int4.dequantize_int4(move(weight, device), dtype)
    assert error(got, plain) < TOLERANCE[dtype]
    assert error(got, reference.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("bits", "group", "tokens", "n", "k", "bias"),
    [
        (4, 32, 1, 48, 256, True),
        (8, 32, 1, 20, 896, False),
        (8, 16, 1, 18, 1152, True),
        (4, 32, 2, 42, 160, True),
        (8, 16, 7, 32, 4864, True),
        (8, 32, 9, 32, 1152, False),
        (8, 16, 16, 48, 896, False),
        (4, 32, 27, 32, 1152, False),
        (4, 32, 33, 130, 1024, True),
        (8, 16, 100, 64, 3584, False),
        (8, 32, 300, 40, 256, True),
    ],
)
def test_products_with_minimums(
    device: str, dtype: torch.dtype, bits: int, group: int, tokens: int, n: int, k: int, bias: bool
) -> None:
    torch.manual_seed(tokens * n + k)
    x, norm = torch.randn(tokens, k).to(dtype), (torch.rand(k) + 0.5).to(dtype)
    packed, plain = weight_with_minimums(2 * n, k, group, bits)
    check_products(packed, plain, x, norm, bias, device, TOLERANCE[dtype], 2 * TOLERANCE[dtype])
