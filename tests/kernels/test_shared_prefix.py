"""Decode attention over a prefix that rows share, against dense softmax in float64."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kubeinfer.kernels.attention import DecodeWorkspace, decode_workspace, paged_attention
from kubeinfer.kernels.batch_invariance import use_batch_invariance
from kubeinfer.kernels.shared_prefix import SharedPrefix, prefix_attention_reference

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32] if INTERPRET else [torch.float32, torch.bfloat16, torch.float16]
LOG2E = 1.4426950408889634
gpu_only = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


@dataclass
class Case:
    """Decode rows over a paged cache, some of them with the same first blocks, and what dense attention gives."""

    q: Tensor
    cache: Tensor
    lens: Tensor
    table: Tensor
    shared: SharedPrefix
    want: Tensor  # float64 [N, Hq, D]
    want_prefix: Tensor  # float64 [N, Hq, D], of the members' prefix alone
    want_lse: Tensor
    scales: tuple[float, float]

    def to(self, device: str) -> Case:
        moved = SharedPrefix(self.shared.members.to(device), self.shared.tokens.to(device))
        here = (self.q.to(device), self.cache.to(device), self.lens.to(device), self.table.to(device))
        return Case(*here, moved, self.want, self.want_prefix, self.want_lse, self.scales)


def dense(q: Tensor, k: Tensor, v: Tensor, soft_cap: float) -> tuple[Tensor, Tensor]:
    """One query ``[Hq, D]`` over ``k, v [m, Hk, D]``: output and log2 of the softmax denominator."""
    heads = q.double().unflatten(0, (k.shape[1], -1))
    logits = torch.einsum("kgd,mkd->kgm", heads, k.double()) * q.shape[1] ** -0.5
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    out = torch.einsum("kgm,mkd->kgd", logits.softmax(-1), v.double())
    return out.flatten(0, 1), logits.logsumexp(-1).flatten() * LOG2E


def make_case(
    dtype: torch.dtype,
    prefix: int,
    own: list[int],
    others: list[int],
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 64,
    block_size: int = 16,
    soft_cap: float = 0.0,
    fp8: bool = False,
) -> Case:
    """Members have ``prefix`` tokens in common and ``own`` tokens each; other rows have contexts of their own."""
    torch.manual_seed(random.randrange(1 << 30))
    assert prefix % block_size == 0
    hq, hk = heads
    rows = [(True, prefix + n) for n in own] + [(False, n) for n in others]
    random.shuffle(rows)
    needed = prefix + sum(-(-n // block_size) * block_size for n in [*own, *others])
    num_blocks = needed // block_size + 2
    pool = (torch.randperm(num_blocks - 1) + 1).int()
    # What no row owns, the slots past its end included, must never be used.
    cache = torch.full((2, num_blocks, hk, block_size, head_dim), float("nan"), dtype=dtype)
    k_scale, v_scale = scales = (0.5, 2.0) if fp8 else (1.0, 1.0)

    def keys(n: int) -> tuple[Tensor, Tensor]:
        made = torch.randn(2, n, hk, head_dim).to(dtype)
        if fp8:
            made = made.to(torch.float8_e4m3fn).to(dtype)
        return made[0], made[1]

    def put(blocks: Tensor, k: Tensor, v: Tensor) -> None:
        slots = torch.arange(len(k))
        cache[:, blocks[slots // block_size].long(), :, slots % block_size] = torch.stack((k, v), 1)

    width = max(n for _, n in rows) // block_size + 2
    table = torch.zeros(len(rows), width, dtype=torch.int32)
    common, used = pool[: prefix // block_size], prefix // block_size
    common_k, common_v = keys(prefix)
    put(common, common_k, common_v)
    q = torch.randn(len(rows), hq, head_dim).to(dtype)
    want = torch.zeros(len(rows), hq, head_dim, dtype=torch.float64)
    want_prefix, want_lse = want.clone(), torch.full((len(rows), hq), float("-inf"), dtype=torch.float64)
    for i, (member, length) in enumerate(rows):
        start = prefix if member else 0
        k, v = keys(length - start)
        count = -(-len(k) // block_size)
        blocks = pool[used : used + count]
        used += count
        put(blocks, k, v)
        if member:
            table[i, : len(common)] = common
            k, v = torch.cat((common_k, k)), torch.cat((common_v, v))
            want_prefix[i], want_lse[i] = dense(
                q[i], common_k.double() * k_scale, common_v.double() * v_scale, soft_cap
            )
        table[i, start // block_size : start // block_size + count] = blocks
        if length:
            want[i], _ = dense(q[i], k.double() * k_scale, v.double() * v_scale, soft_cap)
    is_member = torch.tensor([member for member, _ in rows])
    members = torch.full((len(rows),), -1, dtype=torch.int32)
    members[: len(own)] = is_member.nonzero().flatten().int()
    shared = SharedPrefix(members, is_member.int() * prefix)
    lens = torch.tensor([length for _, length in rows], dtype=torch.int32)
    return Case(
        q,
        cache.to(torch.float8_e4m3fn) if fp8 else cache,
        lens,
        table,
        shared,
        want,
        want_prefix,
        want_lse,
        scales,
    )


def attend(
    case: Case, out: Tensor, workspace: DecodeWorkspace | None, soft_cap: float = 0.0, window: int = 0
) -> Tensor:
    count, _, head_dim = case.q.shape
    return paged_attention(
        case.q, case.cache, torch.arange(count + 1, dtype=torch.int32, device=case.q.device), case.lens, case.table,
        out, scale=head_dim**-0.5, max_query_len=1, max_seq_len=int(case.lens.max()), soft_cap=soft_cap,
        sliding_window=window, num_decodes=count, workspace=workspace, k_scale=case.scales[0],
        v_scale=case.scales[1], shared=case.shared,
    )  # fmt: skip


def check_close(found: Tensor, want: Tensor, tolerance: float) -> None:
    found = found.double().cpu()
    error = (found - want).norm() / want.norm()
    assert error < tolerance, f"relative error {error:.2e}"
    worst = (found - want).abs().max()
    assert worst < 50 * tolerance, f"largest error {worst:.2e}"


def check(device: str, case: Case, soft_cap: float = 0.0) -> None:
    case = case.to(device)
    count, heads, head_dim = case.q.shape
    workspace = None
    if device == "cuda":
        workspace = decode_workspace(count, heads, case.cache.shape[2], head_dim, device)
        assert workspace is not None
        for scratch in (workspace.partial, workspace.lse, workspace.prefix_partial, workspace.prefix_lse):
            scratch.fill_(float("nan"))
    tolerance = TOLERANCE[case.q.dtype] * (2 if case.cache.element_size() == 1 else 1)
    for _ in range(2):  # a kernel's second launch takes another way than its first
        out = torch.full_like(case.q, float("nan"))
        assert attend(case, out, workspace, soft_cap) is out
        check_close(out, case.want, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (14, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_members_and_others(device: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    """Prefixes that fill no whole tile, rows of the prefix and one token, rows that share nothing, empty rows."""
    for prefix in (16, 128, 208):
        check(device, make_case(dtype, prefix, [1, 1, 5, 16, 40, 100], [1, 33, 150, 0], heads, head_dim))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_share(device: str, dtype: torch.dtype) -> None:
    check(device, make_case(dtype, 144, [random.randrange(1, 60) for _ in range(23)], [], (14, 2)))


def test_nothing_shared(device: str) -> None:
    """The pass runs, as it does in a captured step, and finds nothing to do."""
    check(device, make_case(torch.float32, 0, [], [1, 33, 150, 0, 7, 64]))


@pytest.mark.parametrize("head_dim", [80, 96, 256])
def test_head_sizes(device: str, head_dim: int) -> None:
    check(device, make_case(torch.float32, 96, [1, 20, 33], [70], head_dim=head_dim))


@pytest.mark.parametrize("block_size", [32, 64])
def test_block_sizes(device: str, block_size: int) -> None:
    check(device, make_case(torch.float32, 192, [1, 20, 65], [70], block_size=block_size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(device: str, dtype: torch.dtype) -> None:
    check(device, make_case(dtype, 80, [1, 20, 65], [70], soft_cap=1.5), soft_cap=1.5)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.float32])
def test_fp8_cache(device: str, dtype: torch.dtype) -> None:
    for head_dim in (64, 128):
        check(device, make_case(dtype, 208, [1, 20, 65], [70], (14, 2), head_dim, fp8=True))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
def test_the_prefix_alone(device: str, fp8: bool, soft_cap: float) -> None:
    """The pass over the prefix: its splits joined, or the reference, against dense attention."""
    dtype = torch.bfloat16 if fp8 and not INTERPRET else torch.float32
    case = make_case(dtype, 336, [1, 20, 65, 2], [70, 3], (8, 2), soft_cap=soft_cap, fp8=fp8).to(device)
    count, hq, d = case.q.shape
    if not case.q.is_cuda:
        out, lse = prefix_attention_reference(
            case.q, case.cache, case.table, case.shared, scale=d**-0.5, soft_cap=soft_cap, k_scale=case.scales[0],
            v_scale=case.scales[1],
        )  # fmt: skip
    else:
        from kubeinfer.kernels.triton_shared_prefix import prefix_attention_triton, prefix_splits

        cuts = prefix_splits(count, hq, 2)
        parts = torch.zeros(count * hq * cuts, d, device=case.q.device)
        lses = torch.full((count * hq * cuts,), float("-inf"), device=case.q.device)
        prefix_attention_triton(
            case.q, case.cache, case.table, case.shared, parts, lses, d**-0.5 * case.scales[0] * LOG2E,
            case.scales[1], soft_cap,
        )  # fmt: skip
        lses, parts = lses.view(count, hq, cuts), parts.view(count, hq, cuts, d)
        lse = torch.logsumexp(lses / LOG2E, 2) * LOG2E
        weights = torch.exp2(lses - torch.where(lse.isfinite(), lse, 0.0)[:, :, None])
        out = (parts * weights[..., None]).sum(2)
    check_close(out, case.want_prefix, 2e-6 if dtype is torch.float32 else 2e-2)
    members = case.want_lse.isfinite()
    assert torch.equal(lse.cpu().isfinite(), members)
    check_close(lse.cpu()[members], case.want_lse[members], 1e-6 if dtype is torch.float32 else 1e-2)


def test_a_window_or_batch_invariance_makes_no_use_of_it(device: str) -> None:
    """Wrong members would be wrong results: they are not looked at."""
    case = make_case(torch.float32, 64, [1, 20, 33], [70]).to(device)
    without = SharedPrefix(torch.full_like(case.shared.members, -1), torch.zeros_like(case.shared.tokens))
    lied = SharedPrefix(
        torch.arange(4, dtype=torch.int32, device=case.q.device), torch.full_like(case.lens, 16)
    )
    for window, invariant in ((20, False), (0, True)):
        use_batch_invariance(invariant)
        try:
            found = []
            for shared in (without, lied):
                case.shared = shared
                found.append(attend(case, torch.empty_like(case.q), None, window=window))
        finally:
            use_batch_invariance(False)
        assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("heads", [(28, 4), (8, 8), (32, 8), (16, 2)])
@pytest.mark.parametrize(
    "device",
    [pytest.param("cuda", marks=gpu_only)],
)
def test_large(device: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """As many rows as take one split and as many as take eight, prefixes of many tiles."""
    for members, others, prefix in ((33, 3, 2048), (90, 40, 1040), (300, 20, 512), (520, 0, 272)):
        own = [random.randrange(1, 200) for _ in range(members)]
        rest = [random.randrange(1, 700) for _ in range(others)]
        check(device, make_case(dtype, prefix, own, rest, heads, 64 if heads == (16, 2) else 128))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu_only)])
def test_a_graph_replays_any_sharing(device: str) -> None:
    """One captured graph: who shares, and how much, is another at each replay."""
    size = 40
    cases = [
        make_case(torch.bfloat16, prefix, [random.randrange(1, 90) for _ in range(members)], [50] * (size - members))
        for prefix, members in ((320, 20), (0, 0), (640, 40), (16, 2), (0, 0), (448, 33))
    ]  # fmt: skip
    largest = max(cases, key=lambda c: c.cache.shape[1]).to(device)
    width = max(case.table.shape[1] for case in cases)
    cache, q, lens = largest.cache.clone(), largest.q.clone(), largest.lens.clone()
    table = torch.zeros(size, width, dtype=torch.int32, device=device)
    shared = SharedPrefix(
        torch.full((size,), -1, dtype=torch.int32, device=device),
        torch.zeros(size, dtype=torch.int32, device=device),
    )
    static = Case(
        q, cache, lens, table, shared, largest.want, largest.want_prefix, largest.want_lse, (1.0, 1.0)
    )
    out = torch.empty_like(q)
    workspace = decode_workspace(size, 8, 2, 64, device)
    attend(static, out, workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    start = torch.arange(size + 1, dtype=torch.int32, device=device)
    with torch.cuda.graph(graph):
        paged_attention(
            q, cache, start, lens, table, out, scale=64**-0.5, max_query_len=1, max_seq_len=4096, num_decodes=size,
            workspace=workspace, shared=shared,
        )  # fmt: skip
    for case in cases:
        q.copy_(case.q)
        cache[:, : case.cache.shape[1]] = case.cache.to(device)
        lens.copy_(case.lens)
        table[:, : case.table.shape[1]] = case.table.to(device)
        shared.members.copy_(case.shared.members)
        shared.tokens.copy_(case.shared.tokens)
        out.fill_(float("nan"))
        graph.replay()
        check_close(out, case.want, TOLERANCE[torch.bfloat16])
