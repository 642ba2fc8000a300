"""Linear layers of a few tokens, alone and fused with norm, gate and residual, against float64."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
import torch
from torch import Tensor

from kubeinfer.kernels import tuned
from kubeinfer.kernels.fused_linear import (
    add_linear,
    add_linear_before_norm,
    gated_linear,
    norm_linear,
)
from kubeinfer.kernels.linear import (
    MAX_FEW_ROWS,
    MAX_TENS_ROWS,
    few_rows,
    few_rows_config,
    linear,
    logits,
    pack_weight,
)

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-5
# Tokens, N, K, bias, and on GPUs the tile, warps and prefetch depth: N and K that fit no block; one step, several that are
# written out, many in a loop; rows that are summed by one warp and by several.
CASES = [
    (1, 1, 64, True, (4, 256, 1, 2)),
    (1, 37, 896, False, (2, 1024, 4, 1)),
    (1, 130, 3584, True, (4, 512, 2, 3)),
    (2, 9, 4872, False, (1, 1024, 4, 3)),
    (3, 64, 200, True, (4, 256, 1, 2)),
    (8, 37, 3584, False, (2, 512, 2, 2)),
    # of the kernel for tens of tokens: outputs and inputs of a tile, warps, stages, splits of the inputs
    (5, 37, 200, True, (32, 64, 4, 3, 1)),
    (16, 96, 896, False, (32, 128, 4, 4, 2)),
    (33, 130, 896, True, (64, 64, 4, 5, 3)),
    (64, 100, 3584, True, (64, 128, 4, 4, 4)),
    (64, 257, 4872, False, (128, 64, 4, 3, 8)),
    # of the kernel whose programs take runs of tiles: outputs and inputs of a step, warps, stages, programs a processor
    (3, 37, 200, True, ("stream", 64, 64, 4, 4, 1)),
    (16, 1000, 896, False, ("stream", 64, 128, 4, 4, 2)),
    (7, 3584, 3584, True, ("stream", 64, 128, 4, 3, 1)),
    (32, 9473, 1032, True, ("stream", 64, 64, 4, 4, 2)),
    (20, 300, 4872, False, ("stream", 32, 128, 4, 4, 1)),
    (50, 3584, 1032, True, ("stream", 64, 128, 4, 4, 1)),
    # of the kernel of small programs: warps, chunks of 64 inputs fetched ahead
    (3, 37, 200, True, ("few", 4, 2)),
    (8, 130, 3584, True, ("few", 4, 3)),
    (2, 96, 896, False, ("few", 8, 3)),
    (6, 1000, 4872, True, ("few", 16, 2)),
    (7, 300, 18944, True, ("few", 8, 4)),
    (5, 64, 3584, False, ("few", 8, 4)),
]


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    assert got.shape == want.shape
    assert got.dtype == dtype
    return bool((got.double().cpu() - want).norm() / want.norm() < TOLERANCE[dtype])


def normed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


def use(monkeypatch: pytest.MonkeyPatch, device: str, config: tuple[Any, ...]) -> None:
    """On GPUs every small product takes our kernel, so configured."""
    if torch.zeros(1, device=device).is_cuda:
        from kubeinfer.kernels import (
            triton_few_linear,
            triton_linear,
            triton_skinny_linear,
            triton_stream_linear,
        )

        chosen: Any
        if config[0] == "stream":
            if not triton_stream_linear.streams():
                pytest.skip("about GPUs with a copy engine")
            chosen = triton_stream_linear.StreamConfig(*config[1:])
        elif config[0] == "few":
            chosen = triton_few_linear.FewConfig(*config[1:])
        else:
            chosen = (triton_skinny_linear.SkinnyConfig if len(config) == 5 else triton_linear.Config)(
                *config
            )
        monkeypatch.setattr(triton_linear, "find_config", lambda *_: chosen)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("m", "n", "k", "with_bias", "config"), CASES)
def test_fused_linear(
    device: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    with_bias: bool,
    config: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, device, config)
    torch.manual_seed(n + k + m)
    x, scale = (torch.randn(m, k) * 2).to(dtype), (torch.rand(k) + 0.5).to(dtype)
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    gate_up = (torch.randn(2 * n, k) / k**0.5).to(dtype)
    bias = torch.randn(2 * n).to(dtype)
    residual = torch.randn(m, n).to(dtype)

    def on(t: Tensor) -> Tensor:
        return t.to(device)

    def dense(y: Tensor, wide: Tensor) -> Tensor:
        return y.double() @ wide.T + (bias[: wide.shape[0]].double() if with_bias else 0)

    wide, wide_gate_up = weight.double(), gate_up.double()
    some = on(bias[:n]) if with_bias else None
    both = on(bias) if with_bias else None
    assert close(linear(on(x), on(weight), some), dense(x, wide), dtype)
    assert close(norm_linear(on(x), on(scale), EPS, on(weight), some), dense(normed(x, scale), wide), dtype)
    for y, norm_weight in ((x, None), (normed(x, scale), on(scale))):
        gate, up = dense(y, wide_gate_up).chunk(2, 1)
        got = gated_linear(on(x), on(gate_up), both, None, norm_weight, EPS)
        assert close(got, gate * torch.sigmoid(gate) * up, dtype)
    total = on(residual.clone())
    assert add_linear(total, on(x), on(weight), some) is total
    assert close(total, residual.double() + dense(x, wide), dtype)


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (3, 200, 256, ("stream", 64, 64, 4, 4, 1)),
        (16, 136, 1000, ("stream", 64, 128, 4, 4, 2)),
        (33, 320, 448, ("stream", 128, 64, 4, 4, 1)),
        (4, 200, 256, ("few", 4, 2)),
        (8, 3584, 448, ("few", 8, 3)),
        (2, 136, 1000, ("few", 8, 4)),
        (5, 64, 256, (64, 64, 4, 3, 1)),
    ],
)
def test_norm_between_products(
    device: str, m: int, n: int, k: int, config: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first product begins the norm of its result, where its kernel can, and the second ends it."""
    use(monkeypatch, device, config)
    torch.manual_seed(n + k + m)
    dtype = torch.bfloat16
    x, residual = (torch.randn(m, k) * 2).to(dtype), torch.randn(m, n).to(dtype)
    first = (torch.randn(n, k) / k**0.5).to(dtype)
    second, bias = (torch.randn(2 * n, n) / n**0.5).to(dtype), torch.randn(2 * n).to(dtype)
    scale = (torch.rand(n) + 0.5).to(dtype)

    def on(t: Tensor) -> Tensor:
        return t.to(device)

    total = on(residual.clone())
    begun = add_linear_before_norm(total, on(x), on(first), None, None, on(scale))
    assert (begun is not None) == (total.is_cuda and config[0] in ("stream", "few"))
    assert close(total, residual.double() + x.double() @ first.double().T, dtype)
    after = normed(total.cpu(), scale) @ second.double().T + bias.double()
    assert close(norm_linear(total, on(scale), EPS, on(second), on(bias), None, begun), after, dtype)
    gate, up = after.chunk(2, 1)
    got = gated_linear(total, on(second), on(bias), None, on(scale), EPS, begun)
    assert close(got, gate * torch.sigmoid(gate) * up, dtype)


def test_rows_of_a_wider_tensor(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, device, (4, 256, 1, 1))
    wide = torch.randn(4, 3, 256).bfloat16()
    weight = torch.randn(24, 256).bfloat16()
    got = linear(wide.to(device)[:, 1], weight.to(device))
    assert close(got, wide[:, 1].double() @ weight.double().T, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [(32, 128, 4, 4, 8), ("stream", 64, 128, 4, 4, 2)])
def test_split_sums_do_not_depend_on_who_was_last(
    device: str, config: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, device, config)
    x, weight = torch.randn(16, 4096).bfloat16().to(device), torch.randn(512, 4096).bfloat16().to(device)
    first = linear(x, weight)
    for _ in range(200):
        assert torch.equal(linear(x, weight), first)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_cut_in_two_is_the_same_product(
    device: str, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubeinfer.kernels import fused_linear
    from kubeinfer.kernels import linear as module

    for user in (module, fused_linear):
        monkeypatch.setattr(user, "whole_waves", lambda m, n, k: 128)
    x, weight, bias = (
        torch.randn(160, 256).bfloat16(),
        torch.randn(320, 256).bfloat16(),
        torch.randn(320).bfloat16(),
    )
    got = linear(x.to(device), weight.to(device), bias.to(device) if with_bias else None)
    want = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    assert close(got, want, torch.bfloat16)
    residual = torch.randn(160, 320).bfloat16()
    total = residual.to(device).clone()
    add_linear(total, x.to(device), weight.to(device), bias.to(device) if with_bias else None)
    assert close(total, want + residual.double(), torch.bfloat16)


def test_cpu_tensors_never_take_the_gpu_kernel() -> None:
    x, weight = torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)
    assert not few_rows(x)
    assert few_rows_config(x, weight, 8, "plain") is None


@pytest.mark.gpu
def test_only_a_few_aligned_rows_of_16_bits_take_the_gpu_kernel(device: str) -> None:
    x, weight = torch.zeros(8, 64, dtype=torch.float16), torch.zeros(8, 64, dtype=torch.float16)
    if not x.to(device).is_cuda:
        pytest.skip("about CUDA tensors")
    x, weight = x.to(device), weight.to(device)
    assert few_rows(x)
    assert not few_rows(x.float())
    assert few_rows(x.repeat(MAX_FEW_ROWS // 8, 1))
    assert not few_rows(x.repeat(MAX_FEW_ROWS // 8 + 1, 1))
    assert few_rows_config(x.repeat(MAX_FEW_ROWS // 8 + 1, 1), weight, 8, "plain") is None
    assert few_rows_config(x[:, :60], weight[:, :60], 8, "plain") is None
    assert few_rows_config(x, weight.float(), 8, "plain") is None


def test_tuned_tiles_fit_their_kernels() -> None:
    """What the kernel's sums in registers need: a step of 8 columns for each of 32 lanes of every warp, a power of two."""
    table = json.loads((resources.files(tuned) / "linear.json").read_text())
    assert table
    for key, entry in table.items():
        if key.startswith("split/"):
            outputs = int(key.split("/")[1].split("x")[0])
            assert set(entry) == {"columns"}, key
            assert 0 < entry["columns"] < outputs, key
            assert entry["columns"] % 8 == 0, key  # an aligned start for what is computed apart
        elif key.startswith("gated_matmul/"):
            assert {"group"} <= set(entry) <= {"group", "paired"}, key
            assert entry["group"] >= (2 if "paired" in entry else 1), key
            assert entry.get("paired", 1) >= 1, key
        elif key.startswith("gated_columns/"):
            assert set(entry) == {"in_flight"}, key
            shape, tokens = key.split("/")[1], int(key.rsplit("/m", 1)[1])
            assert entry["in_flight"] >= 2, key
            assert 8 < tokens <= MAX_TENS_ROWS, key
            # Outputs of a program of an H200, rounded up to a sum of two powers of two; of any shape at most 160.
            most = int(shape.split("x")[0]) if "x" in shape else 132 * 160
            shares = [a + b for a in (8, 16, 32, 64, 128) for b in (0, 8, 16, 32) if b < a]
            own = min(share for share in shares if share * 132 >= most)
            shared = 2 * 64 * entry["in_flight"] * (2 * own + 64 * -(-tokens // 64))
            assert shared <= 226 * 1024, key
        elif "ahead" in entry:
            assert set(entry) == {"num_warps", "ahead"}, key
            assert entry["num_warps"].bit_count() == 1, key
            assert entry["ahead"] >= 1, key
            assert int(key.rsplit("/m", 1)[1]) <= 8, key
        elif "per_processor" in entry:
            assert set(entry) == {"block_n", "block_k", "num_warps", "stages", "per_processor"}, key
            tokens = max(16, int(key.rsplit("/m", 1)[1]))
            rows = tokens + entry["block_n"] * (2 if key.startswith("gated") else 1)
            shared = 2 * entry["stages"] * entry["block_k"] * rows
            assert shared * entry["per_processor"] < 220 * 1024, key
        elif entry["block_n"] and "split_k" in entry:
            assert set(entry) == {"block_n", "block_k", "num_warps", "stages", "split_k"}, key
            assert all(
                value.bit_count() == 1 for value in (entry["block_n"], entry["block_k"], entry["num_warps"])
            ), key
        elif entry["block_n"]:
            assert set(entry) == {"block_n", "block_k", "num_warps", "depth"}, key
            assert entry["block_k"] == 256 * entry["num_warps"], key
            assert entry["block_n"].bit_count() == entry["num_warps"].bit_count() == 1, key
            assert entry["depth"] >= 1, key


def test_logits_of_a_cpu_tell_near_words_apart() -> None:
    """Rounded to bfloat16 the largest would be equal."""
    torch.manual_seed(3)
    hidden, weight = torch.randn(3, 64).bfloat16(), (torch.randn(500, 64) * 0.1).bfloat16()
    weight[7] = weight[8] = (hidden[0].float() * 0.5).bfloat16()
    weight[8, 0] *= 1.0078125  # the next number
    packed = pack_weight(weight)
    got = logits(hidden, weight, packed)
    exact = hidden.double() @ weight.double().T
    assert got.dtype == torch.float32
    assert torch.equal(got.argmax(1), exact.argmax(1))
    assert got[0, 7] != got[0, 8]
    for row, want in zip(got, exact, strict=True):
        largest = want.topk(20).indices
        torch.testing.assert_close(row[largest].double(), want[largest], rtol=1e-5, atol=1e-5)
