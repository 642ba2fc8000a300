"""Our C kernels against the torch references, on random shapes. Each variant that this processor can run."""

from __future__ import annotations

import pytest
import torch

from kubeinfer.kernels import activation, attention, linear, norm, rope
from kubeinfer.kernels.cpu import library as cpu

pytestmark = pytest.mark.usefixtures("cpu_variant")
BF16 = torch.bfloat16


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert not got.isnan().any()
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [
        (1, 960, 576),
        (2, 100, 64),
        (5, 576, 1536),
        (13, 48, 128),
        (32, 3072, 576),
        (130, 576, 576),
        (250, 333, 1536),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_independence_of_the_batch(rows: int, outputs: int, inputs: int, bias: bool) -> None:
    x, weight = torch.randn(rows, inputs).to(BF16), torch.randn(outputs, inputs).to(BF16)
    b = torch.randn(outputs).to(BF16) if bias else None
    packed = linear.pack_weight(weight)
    assert packed is not None
    got = linear.linear(x, weight, b, packed)
    expected = x.double() @ weight.double().T + (0 if b is None else b.double())
    assert error(got, expected) < 5e-3
    one_by_one = torch.cat([linear.linear(x[i : i + 1], weight, b, packed) for i in range(rows)])
    assert torch.equal(got, one_by_one)


@pytest.mark.parametrize("size", [64, 100, 576])
def test_norms_and_activation(size: int) -> None:
    x, residual, weight = (
        torch.randn(7, size).to(BF16),
        torch.randn(7, size).to(BF16),
        torch.randn(size).to(BF16),
    )
    total = residual + x
    got, updated = norm.fused_add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(updated, total)
    assert error(got, norm.rms_norm_reference(total, weight, 1e-5)) < 5e-3
    assert error(norm.rms_norm(x, weight, 1e-5), norm.rms_norm_reference(x, weight, 1e-5)) < 5e-3
    pair = torch.randn(7, 2 * size).to(BF16) * 3
    assert error(activation.silu_and_mul(pair), activation.silu_and_mul_reference(pair)) < 5e-3


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block", "window"),
    [(9, 3, 64, 32, 0), (14, 2, 64, 16, 0), (4, 4, 128, 16, 0), (8, 2, 80, 32, 20), (32, 1, 64, 16, 0),
     (6, 2, 256, 16, 7), (5, 5, 40, 8, 50)],
)  # fmt: skip
def test_attention_over_mixed_batches(heads: int, kv_heads: int, dim: int, block: int, window: int) -> None:
    queries, contexts = [1, 1, 1, 37, 200, 5, 64], [1, 33, 300, 37, 260, 100, 64]
    kv = torch.randn(2, 300, kv_heads, block, dim).to(BF16)
    table = torch.zeros(len(queries), 40, dtype=torch.int32)
    free = iter((torch.randperm(299) + 1).tolist())
    for i, context in enumerate(contexts):
        for j in range(-(-context // block)):
            table[i, j] = next(free)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    q = torch.randn(int(starts[-1]), heads, dim).to(BF16)
    got = torch.full(q.shape, float("nan")).to(BF16)
    lens = torch.tensor(contexts).int()
    attention.paged_attention(
        q, kv, starts, lens, table, got, scale=dim**-0.5, max_query_len=200, max_seq_len=300,
        sliding_window=window, num_decodes=3,
    )  # fmt: skip
    expected = torch.empty(q.shape)
    attention.paged_attention_reference(
        q.float(), kv.float(), starts, lens, table, expected, scale=dim**-0.5, sliding_window=window
    )
    assert error(got, expected) < 1e-2


@pytest.mark.parametrize(("dim", "rotary", "normed"), [(64, 64, False), (128, 64, True), (80, 40, True)])
def test_rope_and_the_write_to_the_cache(dim: int, rotary: int, normed: bool) -> None:
    heads, kv_heads, tokens = 9, 3, 50
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim).to(BF16)
    other = qkv.clone()
    cos_sin, positions = torch.randn(100, rotary), torch.randint(0, 100, (tokens,)).int()
    slots = torch.randperm(30 * 16)[:tokens].int()
    slots[3] = -1
    weight = torch.randn(dim).to(BF16) if normed else None
    caches = [torch.zeros(2, 30, kv_heads, 16, dim).to(BF16) for _ in range(2)]
    for function, tensor, cache in (
        (rope.rope_and_cache, qkv, caches[0]),
        (rope.rope_and_cache_reference, other, caches[1]),
    ):
        parts = tensor.split((heads, kv_heads, kv_heads), 1)
        function(*parts, positions, cos_sin, slots, cache, q_norm_weight=weight, k_norm_weight=weight)
    assert error(qkv[:, :heads], other[:, :heads]) < 5e-3
    assert error(caches[0], caches[1]) < 5e-3


def test_argmax_takes_the_first_of_equals() -> None:
    logits = torch.randn(5, 49153)
    logits[2, 7] = logits[2, 40000] = 50.0
    found = cpu.argmax(logits)
    assert torch.equal(found, logits.argmax(-1))
    assert found[2] == 7


@pytest.mark.parametrize("rows", [1, 3, 32, 150])
def test_logits_keep_what_bfloat16_would_round_away(rows: int) -> None:
    hidden, weight = torch.randn(rows, 576).to(BF16), torch.randn(1003, 576).to(BF16)
    got = linear.logits(hidden, weight, linear.pack_weight(weight))
    expected = hidden.double() @ weight.double().T
    assert got.dtype == torch.float32
    assert error(got, expected) < 1e-6
    assert torch.equal(got[:1], linear.logits(hidden[:1], weight, linear.pack_weight(weight)))


AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx2", "fma"}


@pytest.mark.parametrize(
    ("flags", "setting", "expected"),
    [
        (AVX512, "1", ["avx512", "avx2"]),
        (AVX512, "avx2", ["avx2"]),
        (AVX512, "0", []),
        (AVX512 - {"avx512_bf16"}, "1", ["avx2"]),
        (AVX512 - {"avx512_bf16"}, "avx512", []),
        ({"avx2"}, "1", []),
    ],
)
def test_the_processor_and_the_setting_choose_the_variant(
    flags: set[str], setting: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_processor_flags", lambda: flags)
    monkeypatch.setenv("KUBEINFER_CPU_KERNELS", setting)
    assert cpu.variants() == expected
