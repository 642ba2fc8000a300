"""The gated product of many tokens against float64: sizes that fit no tile, tensors that are parts of larger ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gated_reference import EPS, TOLERANCE, Given, on_hopper, want
from torch import Tensor

from kubeinfer.kernels import batch_invariance, fused_linear
from kubeinfer.kernels.fused_linear import MIN_MANY_ROWS, GatedForm, gated_linear, many_rows_form
from kubeinfer.kernels.linear import MAX_FEW_ROWS

TOKENS = (1, 127, 128, 300, 1024 + 17)


def run(device: str, m: int, n: int, k: int, with_bias: bool, dtype: torch.dtype, form: GatedForm) -> None:
    from kubeinfer.kernels.gluon_gated_matmul import gated_matmul_gluon
    from kubeinfer.kernels.triton_split import scratch

    given = Given(device, m, n, k, dtype, with_bias)
    assert gated_matmul_gluon(given.x, given.weight, given.bias, given.out, form) is given.out
    given.check(want(given.x, given.weight, given.bias))
    assert not scratch(given.x.device).counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("k", [64, 200, 896])
@pytest.mark.parametrize("n", [136, 256, 1000])
def test_any_size(device: str, n: int, k: int, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(device)
    from kubeinfer.kernels import gluon_gated_matmul

    # Each program has several tiles; or half of one at most.
    monkeypatch.setattr(gluon_gated_matmul, "processors", lambda _: 5 if k < 896 else 132)
    torch.manual_seed(n + k)
    dtype = list(TOLERANCE)[(n // 8 + k // 8) % 2]
    for m in TOKENS:
        run(device, m, n, k, n == 256 or k == 200, dtype, GatedForm(16, paired))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "form", [*map(GatedForm, (1, 2, 3)), GatedForm(2, True), GatedForm(6, True)], ids=str
)
@pytest.mark.parametrize("programs", [2, 7, 12, 64])
def test_any_share_of_the_work(
    device: str, programs: int, form: GatedForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last wave of no tiles, of few, which two programs share, and of many."""
    on_hopper(device)
    from kubeinfer.kernels import gluon_gated_matmul

    monkeypatch.setattr(gluon_gated_matmul, "processors", lambda _: programs)
    torch.manual_seed(1)
    for m in (*TOKENS, 5 * 128):
        run(device, m, 328, 456, True, torch.bfloat16, form)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("normed", [False, True])
def test_gated_linear_takes_it_for_many_tokens(
    device: str, dtype: torch.dtype, normed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_hopper(device)
    from kubeinfer.kernels import gluon_gated_matmul

    taken: list[int] = []
    kernel = gluon_gated_matmul.gated_matmul_gluon

    def spied(x: Tensor, *others: Any) -> Tensor:
        taken.append(len(x))
        return kernel(x, *others)

    monkeypatch.setattr(
        gluon_gated_matmul,
        "find_gated_form",
        lambda n, k, m: GatedForm(8) if m >= MIN_MANY_ROWS else None,
    )
    monkeypatch.setattr(gluon_gated_matmul, "gated_matmul_gluon", spied)
    torch.manual_seed(2)
    n, k = 1032, 256
    weight, bias = (torch.randn(2 * n, k) * k**-0.5).to(dtype), torch.randn(2 * n).to(dtype)
    scale = (torch.rand(k) + 0.5).to(dtype)
    for m in (MIN_MANY_ROWS - 1, MIN_MANY_ROWS, 2 * MIN_MANY_ROWS + 5):
        x = torch.randn(m, k).to(dtype)
        if normed:
            got = gated_linear(x.to(device), weight.to(device), bias.to(device), None, scale.to(device), EPS)
            given = x.double() * torch.rsqrt(x.double().pow(2).mean(1, keepdim=True) + EPS) * scale.double()
        else:
            got, given = gated_linear(x.to(device), weight.to(device), bias.to(device)), x
        exact = want(given, weight, bias)
        assert got.shape == (m, n)
        assert got.dtype == dtype
        assert (got.double().cpu() - exact).norm() / exact.norm() < TOLERANCE[dtype] * 1.5
    assert taken == [MIN_MANY_ROWS, 2 * MIN_MANY_ROWS + 5]


@pytest.mark.gpu
@pytest.mark.parametrize("paired", [False, True])
def test_any_number_of_tokens_is_one_variant(device: str, paired: bool) -> None:
    """No request waits for a compiler because its step has another number of tokens."""
    on_hopper(device)
    from kubeinfer.kernels.compile_ahead import noted_launches
    from kubeinfer.kernels.gluon_gated_matmul import gated_matmul_gluon

    weight = torch.zeros(2 * 72, 64, dtype=torch.float16, device=device)
    with noted_launches() as found:
        for m in (1, 16, 1024, 1500):
            x = torch.zeros(m, 64, dtype=torch.float16, device=device)
            gated_matmul_gluon(x, weight, None, x.new_empty(m, 72), GatedForm(8, paired))
    assert len(found) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("paired", [False, True])
def test_a_layer_in_a_graph(device: str, paired: bool) -> None:
    """More tiles than multiprocessors, replayed with other inputs, between kernels that overlap with it."""
    on_hopper(device)
    from kubeinfer.kernels.gluon_gated_matmul import gated_matmul_gluon
    from kubeinfer.kernels.norm import rms_norm

    n, k, form = 5000, 1024, GatedForm(8, paired)
    weight = torch.randn(2 * n, k, dtype=torch.bfloat16, device=device) * 0.03
    ones = torch.ones(n, dtype=torch.bfloat16, device=device)
    x = torch.randn(2048, k, dtype=torch.bfloat16, device=device)
    out = torch.empty(2048, n, dtype=torch.bfloat16, device=device)

    def layer() -> tuple[Tensor, Tensor]:
        # Each kernel starts while the one before it ends, and must see all that that writes.
        before = rms_norm(x, ones[:k], EPS)
        return before, rms_norm(gated_matmul_gluon(before, weight, None, out, form), ones, EPS)

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before, after = layer()
    for seed in range(20):
        torch.manual_seed(seed)
        x.normal_()
        before.fill_(float("nan"))
        out.fill_(float("nan"))
        graph.replay()
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + EPS)).bfloat16()
        y = normed.float() @ weight.float().T
        exact = F.silu(y[:, :n]) * y[:, n:]
        exact = exact * torch.rsqrt(exact.pow(2).mean(1, keepdim=True) + EPS)
        assert (after.float() - exact).norm() / exact.norm() < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_programs_are_paired_where_the_table_says(device: str) -> None:
    on_hopper(device)
    from kubeinfer.kernels.gluon_gated_matmul import find_gated_form

    forms = {m: find_gated_form(18944, 3584, m) for m in (448, 449, 512, 513, 1024, 8191, 8192, 16384)}
    assert forms == {
        448: None, 449: GatedForm(16, True), 512: GatedForm(16, True), 513: None, 1024: GatedForm(16),
        8191: GatedForm(16), 8192: GatedForm(16, True), 16384: GatedForm(16, True),
    }  # fmt: skip
    assert find_gated_form(18944, 3580, 16384) is None


@pytest.mark.gpu
def test_what_it_does_not_take(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(device)
    from kubeinfer.kernels import gluon_gated_matmul

    monkeypatch.setattr(gluon_gated_matmul, "find_gated_form", lambda n, k, m: GatedForm(8))
    x = torch.zeros(MIN_MANY_ROWS + 1, 72, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(32, 72, dtype=torch.bfloat16, device=device)
    assert many_rows_form(x, weight, 16) == GatedForm(8)
    assert many_rows_form(x[-MAX_FEW_ROWS:], weight, 16) is None
    assert many_rows_form(x.float(), weight.float(), 16) is None
    assert many_rows_form(x, weight.half(), 16) is None
    assert many_rows_form(x[:, 1:65], weight[:, :64], 16) is None  # begins at no multiple of 16 bytes
    assert many_rows_form(x.new_zeros(MIN_MANY_ROWS, 68), weight[:, :68], 16) is None
    assert many_rows_form(x.t().contiguous().t(), weight, 16) is None
    monkeypatch.setattr(fused_linear, "batch_invariant", lambda: True)
    assert many_rows_form(x, weight, 16) is None


def test_cpu_tensors_never_take_it() -> None:
    assert not batch_invariance.batch_invariant()
    x = torch.zeros(MIN_MANY_ROWS, 64, dtype=torch.bfloat16)
    assert many_rows_form(x, torch.zeros(32, 64, dtype=torch.bfloat16), 16) is None
