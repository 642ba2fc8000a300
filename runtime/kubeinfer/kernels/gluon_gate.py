# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What the epilogues of our gated products in Gluon are made of: sums whose left half is gates, and whose right half theirs ups."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def halves(sums):
    """The left and the right half of the columns."""
    M: gl.constexpr = sums.shape[0]
    N: gl.constexpr = sums.shape[1] // 2
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    left, right = gl.split(gl.permute(gl.reshape(sums, [M, 2, N]), (0, 2, 1)))
    return gl.convert_layout(left, L, assert_trivial=True), gl.convert_layout(right, L, assert_trivial=True)


@gluon.jit
def with_bias(sums, bias_ptr, column, N: gl.constexpr):
    columns = column + gl.arange(0, sums.shape[1], gl.SliceLayout(0, sums.type.layout))
    return sums + gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def activated(gate, up):
    return gate / (1.0 + gl.exp(-gate)) * up
