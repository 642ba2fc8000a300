"""Decode attention whose contexts are one list that is cut evenly: rows whole, in parts, empty, whatever the cuts."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from kubeinfer.kernels.attention import decode_workspace, paged_attention_reference

pytestmark = pytest.mark.gpu
LOG2E = 1.4426950408889634
# Contexts of the rows, query heads, KV heads, head size.
CASES: list[tuple[list[int], int, int, int]] = [
    ([130, 1, 64, 65, 0, 300, 3], 4, 2, 64),
    ([700, 64, 5], 7, 1, 128),
    ([10] * 9, 4, 4, 64),
    ([0, 0, 1], 2, 1, 64),
    ([2000], 28, 4, 128),
    ([63, 64, 65, 127, 128, 129, 0, 640], 14, 2, 64),
]


class Rows:
    """Rows of one query token over a cache of scattered blocks, whose other blocks and keys are NaN."""

    def __init__(
        self,
        lens: list[int],
        hq: int,
        hk: int,
        dim: int,
        device: str,
        block_size: int = 16,
        soft_cap: float = 0.0,
    ):
        blocks = [-(-n // block_size) for n in lens]
        self.cache = torch.full((2, sum(blocks) + 1, hk, block_size, dim), float("nan")).half()
        self.table = torch.zeros(len(lens), max(1, *blocks) + 8, dtype=torch.int32)
        order = (torch.randperm(sum(blocks)) + 1).int()
        for i, part in enumerate(order.split(blocks)):
            self.table[i, : len(part)] = part
            at = torch.arange(lens[i])
            page = self.table[i, at // block_size].long()
            for half in range(2):
                self.cache[half, page, :, at % block_size] = torch.randn(lens[i], hk, dim).half()
        self.lens = torch.tensor(lens, dtype=torch.int32)
        self.q = torch.randn(len(lens), hq, dim).half()
        start = torch.arange(len(lens) + 1, dtype=torch.int32)
        self.want = torch.empty(self.q.shape)
        self.soft_cap = soft_cap
        paged_attention_reference(
            self.q.float(), self.cache.float(), start, self.lens, self.table, self.want, scale=dim**-0.5,
            soft_cap=self.soft_cap,
        )  # fmt: skip
        self.cache, self.table, self.lens, self.q = (
            t.to(device) for t in (self.cache, self.table, self.lens, self.q)
        )

    def attend(self, streams: bool = False) -> tuple[Tensor, Tensor]:
        """The result, and the counters after it."""
        from kubeinfer.kernels import triton_decode_runs as kernel

        def launch() -> None:
            args = (self.q, self.cache, self.lens, self.table, out, units, dim**-0.5 * LOG2E, 1.0)
            if streams:
                from kubeinfer.kernels.gluon_decode_streams import decode_streams_gluon

                decode_streams_gluon(*args, workspace)
            else:
                kernel.decode_runs_triton(*args, self.soft_cap, workspace)

        rows, hq, dim = self.q.shape
        hk = self.cache.shape[2]
        units = kernel.list_tiles(self.lens, max(1, int(self.lens.max())))
        assert units is not None
        tiles = int(((self.lens + kernel.TILE - 1) // kernel.TILE).clamp(min=1).sum())
        assert units[0] == tiles
        parts = kernel.runs_workspace_rows(hq, hk, dim, self.q.device)
        device = self.q.device
        counters = torch.zeros(rows * hk, dtype=torch.int32, device=device)
        workspace = (
            torch.full((parts, dim), float("nan"), device=device),
            torch.full((parts,), float("nan"), device=device),
            counters,
        )
        out = torch.full_like(self.q, float("nan"))
        for _ in range(2):  # what the first launch leaves must suit the second
            out.fill_(float("nan"))
            launch()
        return out, counters


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """So many programs, whatever the GPU."""
    from kubeinfer.kernels import triton_decode_runs as kernel

    monkeypatch.setattr(kernel, "processors", lambda _: request.param)
    monkeypatch.setattr(kernel, "runs_config", lambda _: kernel.RunsConfig(4, 3, 1))
    monkeypatch.setattr(kernel, "_STREAMS_PER_PROCESSOR", 1)


@pytest.mark.parametrize("cuts", [1, 5, 13, 64], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_rows_in_any_parts(device: str, case: tuple[list[int], int, int, int], cuts: None) -> None:
    if not torch.zeros(1, device=device).is_cuda:
        pytest.skip("about the kernel for GPUs")
    torch.manual_seed(sum(case[0]))
    rows = Rows(*case, device, soft_cap=0.0 if sum(case[0]) % 2 else 5.0)
    out, counters = rows.attend()
    assert not counters.any()
    torch.testing.assert_close(out.float().cpu(), rows.want, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("cuts", [1, 5, 13, 64, 264], indirect=True)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(
    ("lens", "heads"),
    [
        ([130, 1, 64, 65, 0, 300, 3], (28, 4)),
        ([0, 0, 1], (28, 4)),
        ([2000, 7], (28, 4)),
        ([63, 64, 65, 127, 128, 129, 0, 640], (8, 1)),
        ([15, 16, 17, 31, 33, 48] * 9, (28, 4)),
        ([385] * 40, (32, 8)),
    ],
)
def test_rows_in_streams(
    device: str, lens: list[int], heads: tuple[int, int], block_size: int, cuts: None
) -> None:
    """As above, by the kernel of a warp a run; in part in bfloat16."""
    if device != "cuda":
        pytest.skip("about the kernel for GPUs")
    from kubeinfer.kernels.triton_launch import runs_gluon

    if not runs_gluon():
        pytest.skip("about Hopper GPUs")
    torch.manual_seed(sum(lens))
    rows = Rows(lens, *heads, 128, device, block_size)
    tolerance = 4e-3
    if heads[1] != 4:
        rows.q, rows.cache, tolerance = rows.q.bfloat16(), rows.cache.bfloat16(), 3e-2
    out, counters = rows.attend(streams=True)
    assert not counters.any()
    torch.testing.assert_close(out.float().cpu(), rows.want, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_streams_have_their_shared_memory_to_themselves() -> None:
    """They address it by number, from its beginning."""
    from kubeinfer.kernels import gluon_decode_streams as kernel
    from kubeinfer.kernels.triton_launch import runs_gluon

    if not runs_gluon():
        pytest.skip("about Hopper GPUs")
    Rows([100, 5], 28, 4, 128, "cuda").attend(streams=True)
    for variant in kernel._STREAMS._variants.values():
        assert variant.metadata.shared == kernel._SLOTS * (kernel._SLOT.value + 8) + 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("heads", [(28, 4, 128), (14, 2, 64)])
def test_as_the_engine_runs_it(heads: tuple[int, int, int]) -> None:
    """A plan and many layers' attention in a graph, replayed with other contexts; and a step that is not captured."""
    from kubeinfer.kernels.attention import paged_attention, plan_decodes

    torch.manual_seed(1)
    rng = random.Random(1)
    hq, hk, dim = heads
    count, most = 200, 2048  # rows enough for streams, where there is no soft cap
    contexts = [[rng.choice((1, 64, 90, 700, most)) for _ in range(count)] for _ in range(3)]
    rows = [
        Rows(lens, hq, hk, dim, "cuda", soft_cap=cap)
        for lens, cap in zip(contexts, (0.0, 5.0, 0.0), strict=True)
    ]
    largest = max(rows, key=lambda r: r.cache.shape[1])
    cache = torch.zeros_like(largest.cache)
    lens, table, q = rows[0].lens.clone(), torch.zeros(count, most // 16 + 8).int().cuda(), rows[0].q.clone()
    outs = [torch.empty_like(q) for _ in range(6)]
    start = torch.arange(count + 1, dtype=torch.int32, device="cuda")
    workspace = decode_workspace(count, hq, hk, dim, "cuda")

    def step(soft_cap: float) -> None:
        units = plan_decodes(lens, count, most, cache)
        assert units is not None
        q.mul_(1.0)  # what a layer does before its attention
        q.mul_(1.0)
        for out in outs:
            paged_attention(
                q, cache, start, lens, table, out, scale=dim**-0.5, max_query_len=1, max_seq_len=most,
                workspace=workspace, units=units, soft_cap=soft_cap,
            )  # fmt: skip

    def load(one: Rows) -> None:
        cache.zero_()
        cache[:, : one.cache.shape[1]] = one.cache.nan_to_num()
        lens.copy_(one.lens)
        table.zero_()
        table[:, : one.table.shape[1]] = one.table[:, : table.shape[1]]
        q.copy_(one.q)
        for out in outs:
            out.fill_(float("nan"))

    for soft_cap in {one.soft_cap for one in rows}:
        load(rows[0])
        step(soft_cap)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(soft_cap)
        for one in [r for r in rows if r.soft_cap == soft_cap] * 2:
            load(one)
            graph.replay()
            for out in outs:
                torch.testing.assert_close(out.float().cpu(), one.want, atol=4e-3, rtol=4e-3)
