"""The gated product of some tens of tokens against float64: shares of one power of two and of two, norms that were begun before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gated_reference import EPS, TOLERANCE, Given, on_hopper, want
from torch import Tensor

from kubeinfer.kernels.fused_linear import gated_linear
from kubeinfer.kernels.linear import MAX_TENS_ROWS, few_rows_config
from kubeinfer.kernels.norm import NormBegun

# Outputs and inputs: shares of 8, of 32 + 8, of 128, and of 128 + 16 of which the last program has fewer; several tiles a program.
SHAPES = [(136, 64), (4864, 200), (14336, 456), (18944, 896), (27648, 128), (1000, 4096)]
TOKENS = (1, 9, 63, 64, 65, 100, 128)


def run(
    device: str, m: int, n: int, k: int, dtype: torch.dtype, with_bias: bool, parts: int, in_flight: int
) -> None:
    from kubeinfer.kernels.gluon_gated_columns import gated_columns_gluon
    from kubeinfer.kernels.triton_linear import ColumnsConfig

    given = Given(device, m, n, k, dtype, with_bias)
    squares, factor = None, torch.ones(m, 1, dtype=torch.float64)
    if parts:
        # Sums of parts of other rows, of which those behind the tokens' are no numbers.
        squares = torch.full((parts, 128), float("nan"), device=device)
        squares[:, :m] = torch.rand(parts, m, device=device) * 3 * k / parts
        factor = torch.rsqrt(squares[:, :m].double().sum(0).cpu() / k + EPS)[:, None]
    operands = (given.x, given.weight, given.bias, given.out)
    assert gated_columns_gluon(*operands, ColumnsConfig(in_flight), squares, EPS) is given.out
    given.check(want(given.x.double().cpu() * factor, given.weight, given.bias))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_any_size(device: str, n: int, k: int, dtype: torch.dtype) -> None:
    on_hopper(device)
    torch.manual_seed(n + k)
    for i, m in enumerate(TOKENS):
        run(device, m, n, k, dtype, i % 2 == 0, (0, 1, 56)[i % 3], 4)


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 5, 131])
def test_any_number_of_programs(device: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(device)
    from kubeinfer.kernels import gluon_gated_columns

    monkeypatch.setattr(gluon_gated_columns, "processors", lambda _: programs)
    torch.manual_seed(programs)
    for in_flight in (2, 3, 4):
        for m in (40, 128):
            run(device, m, 1032, 456, torch.bfloat16, True, 0, in_flight)


@pytest.mark.gpu
def test_a_layer_in_a_graph(device: str) -> None:
    """Replayed with other inputs, between kernels that overlap with it, at sizes that take it and that do not."""
    on_hopper(device)
    from kubeinfer.kernels.norm import rms_norm
    from kubeinfer.kernels.triton_linear import ColumnsConfig

    n, k = 18944, 3584
    weight = torch.randn(2 * n, k, dtype=torch.bfloat16, device=device) * 0.02
    down = torch.randn(k, n, dtype=torch.bfloat16, device=device) * 0.01
    ones = torch.ones(k, dtype=torch.bfloat16, device=device)
    for m in (8, 9, 33, 64, 65, 128, 129):
        taken = isinstance(
            few_rows_config(torch.empty(m, k, dtype=torch.bfloat16, device=device), weight, n, "gated"),
            ColumnsConfig,
        )
        assert taken == (8 < m <= MAX_TENS_ROWS)
        x = torch.randn(m, k, dtype=torch.bfloat16, device=device)

        def layer(x: Tensor = x) -> Tensor:
            return rms_norm(gated_linear(x, weight, None, None, ones, EPS) @ down.T, ones, EPS)

        layer()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            after = layer()
        for seed in range(5):
            torch.manual_seed(seed)
            x.normal_()
            after.fill_(float("nan"))
            graph.replay()
            wide = x.float()
            normed = (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + EPS)).bfloat16()
            gate, up = (normed.float() @ weight.float().T).chunk(2, 1)
            exact = (F.silu(gate) * up).bfloat16().float() @ down.float().T
            exact = exact * torch.rsqrt(exact.pow(2).mean(1, keepdim=True) + EPS)
            assert (after.float() - exact).norm() / exact.norm() < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_a_norm_that_the_product_before_began(device: str) -> None:
    on_hopper(device)
    n, k, m = 18944, 3584, 24
    weight = torch.randn(2 * n, k, dtype=torch.bfloat16, device=device) * 0.02
    scale = (torch.rand(k, device=device) + 0.5).bfloat16()
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    begun = NormBegun.empty(x, 7, 32)
    begun.scaled.copy_(x * scale)
    begun.squares.zero_()
    begun.squares[:, :m] = x.float().pow(2).view(m, 7, -1).sum(2).T
    got = gated_linear(x, weight, None, None, scale, EPS, begun)
    alone = gated_linear(x, weight, None, None, scale, EPS)
    assert (got.float() - alone.float()).norm() / alone.float().norm() < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_any_number_of_tokens_is_one_of_two_variants(device: str) -> None:
    """No request waits for a compiler because its step has another number of tokens."""
    on_hopper(device)
    from kubeinfer.kernels.compile_ahead import noted_launches
    from kubeinfer.kernels.gluon_gated_columns import gated_columns_gluon
    from kubeinfer.kernels.triton_linear import ColumnsConfig

    weight = torch.zeros(2 * 72, 64, dtype=torch.float16, device=device)
    with noted_launches() as found:
        for m in (1, 16, 64, 65, 96, 128):
            x = torch.zeros(m, 64, dtype=torch.float16, device=device)
            gated_columns_gluon(x, weight, None, x.new_empty(m, 72), ColumnsConfig(4))
    assert len(found) == 2


@pytest.mark.gpu
def test_what_it_does_not_take(device: str) -> None:
    on_hopper(device)
    from kubeinfer.kernels.gluon_gated_columns import fits, gated_columns_gluon
    from kubeinfer.kernels.triton_linear import ColumnsConfig

    x: Any = torch.zeros(129, 64, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="129 tokens: this kernel takes up to 128"):
        gated_columns_gluon(x, x.new_zeros(32, 64), None, x.new_empty(129, 16), ColumnsConfig(4))
    with pytest.raises(ValueError, match="at least two steps"):
        gated_columns_gluon(x[:64], x.new_zeros(32, 64), None, x.new_empty(64, 16), ColumnsConfig(1))
    assert fits(18944, 128, ColumnsConfig(4))
    assert not fits(18944, 128, ColumnsConfig(5))
    assert fits(18944, 64, ColumnsConfig(5))
    assert not fits(18944, 129, ColumnsConfig(1))
