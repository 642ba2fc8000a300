"""Under batch invariance a row's result is the same to the bit, alone, in any batch and at any place in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kubeinfer.kernels.attention import decode_workspace, paged_attention, paged_attention_reference
from kubeinfer.kernels.batch_invariance import use_batch_invariance
from kubeinfer.kernels.fused_linear import add_linear, gated_linear, norm_linear
from kubeinfer.kernels.linear import few_rows, linear
from kubeinfer.kernels.norm import fused_add_rms_norm, rms_norm
from kubeinfer.kernels.rope import rope_and_cache
from kubeinfer.kernels.sampling import logprobs, sample

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def invariance() -> Iterator[None]:
    use_batch_invariance(True)
    yield
    use_batch_invariance(False)


def parts(count: int) -> Iterator[slice | Tensor]:
    """Batches of rows: the first, the last, a few, most, all in another order."""
    yield from (slice(0, 1), slice(count - 1, count), slice(count // 3, count // 3 + 7), slice(1, count))
    yield torch.arange(count - 1, -1, -1)


def assert_rows_alone(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    whole = function(x)
    for rows in parts(x.shape[0]):
        where = rows.to(x.device) if isinstance(rows, Tensor) else rows
        assert torch.equal(function(x[where]), whole[where])
    return whole


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("n", "k", "bias"), [(96, 128, False), (37, 200, True), (130, 1000, True)])
def test_linear(device: str, dtype: torch.dtype, n: int, k: int, bias: bool) -> None:
    torch.manual_seed(n)
    x = torch.randn(150, k).to(dtype).to(device)
    weight = (torch.randn(n, k) / k**0.5).to(dtype).to(device)
    some = torch.randn(n).to(dtype).to(device) if bias else None
    whole = assert_rows_alone(lambda rows: linear(rows, weight, some), x)
    want = x.double().cpu() @ weight.double().cpu().T + (some.double().cpu() if some is not None else 0)
    assert (whole.double().cpu() - want).norm() / want.norm() < TOLERANCE[dtype]
    assert not few_rows(x[:1])


def test_linear_into_given_memory(device: str) -> None:
    if not torch.zeros(1, device=device).is_cuda:
        pytest.skip("only GPUs write logits into given memory")
    x, weight = torch.randn(70, 96).half().to(device), torch.randn(50, 96).half().to(device)
    out = torch.empty(80, 50, dtype=torch.float16, device=device)[:70]
    assert linear(x, weight, None, None, out) is out
    assert torch.equal(out, linear(x, weight))


def test_linear_with_its_neighbours(device: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(40, 64).half().to(device)
    weight, gates = torch.randn(64, 64).half().to(device) / 8, torch.randn(96, 64).half().to(device) / 8
    scale = torch.rand(64).half().to(device) + 0.5
    assert_rows_alone(lambda rows: add_linear(rows.clone(), rows, weight), x)
    if torch.zeros(1, device=device).is_cuda:  # torch's norms and activations on CPUs are run a row at a time
        assert_rows_alone(lambda rows: norm_linear(rows, scale, 1e-5, weight), x)
        assert_rows_alone(lambda rows: gated_linear(rows, gates, None, None, scale, 1e-5), x)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 896, 3584, 8192])
def test_norm(device: str, width: int) -> None:
    if not torch.zeros(1, device=device).is_cuda:
        pytest.skip("about GPUs")
    x, weight = torch.randn(1500, width).bfloat16().to(device), torch.rand(width).bfloat16().to(device)
    assert_rows_alone(lambda rows: rms_norm(rows, weight, 1e-5), x)
    assert_rows_alone(lambda rows: fused_add_rms_norm(rows, rows.clone(), weight, 1e-5)[0], x)


@pytest.mark.gpu
def test_rope_with_head_norms(device: str) -> None:
    if not torch.zeros(1, device=device).is_cuda:
        pytest.skip("about GPUs")
    tokens, heads, kv_heads, dim = 1200, 8, 2, 128
    projected = torch.randn(tokens, heads + 2 * kv_heads, dim).bfloat16().to(device)
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    cos_sin = torch.randn(tokens, dim, device=device)
    norms = torch.rand(2, dim).bfloat16().to(device)

    def keys_and_queries(where: Tensor) -> Tensor:
        cache = torch.zeros(2, tokens // 16, kv_heads, 16, dim, dtype=torch.bfloat16, device=device)
        q, k, v = projected[where].split((heads, kv_heads, kv_heads), 1)
        q = q.clone()
        slots = positions[where]
        rope_and_cache(
            q, k, v, positions[where], cos_sin, slots, cache, q_norm_weight=norms[0], k_norm_weight=norms[1], eps=1e-6
        )  # fmt: skip
        stored = cache[0].transpose(1, 2).reshape(tokens, kv_heads, dim)[slots.long()]
        return torch.cat((q, stored), 1)

    assert_rows_alone(keys_and_queries, torch.arange(tokens, device=device))


@pytest.mark.parametrize(
    ("dtype", "heads", "window"),
    [(torch.float32, (4, 2), 0), (torch.float16, (14, 2), 0), (torch.float16, (4, 4), 20)],
)
def test_attention(
    device: str, dtype: torch.dtype, heads: tuple[int, int], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token beside others, in a batch that takes several launches, and in a graph's scratch memory."""
    is_cuda = torch.zeros(1, device=device).is_cuda
    if is_cuda:
        from kubeinfer.kernels import triton_attention

        monkeypatch.setattr(triton_attention, "FIXED_ROWS", 16)
    torch.manual_seed(2)
    hq, hk, dim, size, count = *heads, 64, 16, 37
    lengths = torch.randint(1, 200, (count,), dtype=torch.int32)
    lengths[:3] = torch.tensor([1, 200, 64])
    blocks = -(-200 // size)
    table = (torch.randperm(count * blocks) + 1).int().view(count, blocks).to(device)
    cache = torch.randn(2, count * blocks + 1, hk, size, dim).to(dtype).to(device)
    q, lengths = torch.randn(count, hq, dim).to(dtype).to(device), lengths.to(device)
    workspace = decode_workspace(count, hq, hk, dim, device) if is_cuda else None

    def attend(where: Tensor) -> Tensor:
        some = q[where].clone()
        number = some.shape[0]
        start = torch.arange(number + 1, dtype=torch.int32, device=device)
        return paged_attention(
            some, cache, start, lengths[where].clone(), table[where].clone(), torch.empty_like(some), scale=dim**-0.5,
            max_query_len=1, max_seq_len=200, sliding_window=window, num_decodes=number, workspace=workspace,
        )  # fmt: skip

    whole = assert_rows_alone(attend, torch.arange(count, device=device))
    start = torch.arange(count + 1, dtype=torch.int32)
    want = paged_attention_reference(
        q.double().cpu(), cache.double().cpu(), start, lengths.cpu(), table.cpu(), torch.empty(q.shape).double(),
        scale=dim**-0.5, sliding_window=window,
    )  # fmt: skip
    assert (whole.double().cpu() - want).norm() / want.norm() < TOLERANCE[dtype]


@pytest.mark.gpu
def test_attention_refuses_queries_side_by_side(device: str) -> None:
    if not torch.zeros(1, device=device).is_cuda:
        pytest.skip("about GPUs")
    q, cache = torch.zeros(3, 2, 64, device=device), torch.zeros(2, 2, 2, 16, 64, device=device)
    ints = torch.tensor([0, 3], dtype=torch.int32, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="one query token"):
        paged_attention(q, cache, ints, ints[1:].clone(), table, q, scale=1.0, max_query_len=3, max_seq_len=3)


def test_sampling(device: str) -> None:
    """What others ask for decides no row's token: filters of a batch are the same program for all its rows."""
    torch.manual_seed(4)
    count, vocab = 30, 5000
    logits = (torch.randn(count, vocab) * 3).half().to(device)
    temperature = torch.where(torch.arange(count) % 4 == 0, 0.0, 0.9).to(device)
    top_k = torch.where(torch.arange(count) % 3 == 0, 20, 0).int().to(device)
    top_p = torch.where(torch.arange(count) % 2 == 0, 0.8, 1.0).to(device)
    seeds = torch.arange(count).to(device)

    def tokens(where: Tensor) -> Tensor:
        args = [logits[where].clone(), temperature[where], top_k[where], top_p[where]]
        return sample(
            *args, torch.zeros_like(args[1]), seeds[where], seeds[where],
            any_top_k=bool((top_k[where] > 0).any()), any_top_p=bool((top_p[where] < 1).any()), any_min_p=False,
        )  # fmt: skip

    whole = assert_rows_alone(tokens, torch.arange(count, device=device))
    if torch.zeros(1, device=device).is_cuda:
        for i in range(count):
            alone = logprobs(logits[i : i + 1].clone(), whole[i : i + 1], 3)
            together = logprobs(logits, whole, 3)
            assert torch.equal(alone[0][0], together[0][i])
