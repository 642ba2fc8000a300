"""Paged attention against dense softmax in float64."""

from __future__ import annotations

import os
import random

import pytest
import torch
from torch import Tensor

from kubeinfer.kernels.attention import decode_workspace, paged_attention

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
FASTEST = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, soft_cap: float) -> Tensor:
    """``q [n, Hq, D]`` are the last positions of ``k, v [m, Hk, D]``; float64, by torch on the fastest device there is."""
    n, m = q.shape[0], k.shape[0]
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.to(FASTEST).double() for x in (q, k, v))
    logits = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(group, 1)) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    query = torch.arange(m - n, m, device=FASTEST)[:, None]
    key = torch.arange(m, device=FASTEST)[None]
    hidden = key > query
    if window:
        hidden |= key <= query - window
    return torch.einsum(
        "hnm,mhd->nhd", logits.masked_fill(hidden, float("-inf")).softmax(-1), v.repeat_interleave(group, 1)
    ).cpu()


def check(
    device: str,
    dtype: torch.dtype,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    block_size: int = 16,
    window: int = 0,
    soft_cap: float = 0.0,
    num_decodes: int | None = None,
    fp8: bool = False,
    strided: bool = False,
    exact: bool = False,
) -> None:
    """``lengths``: (query, context with the query) of each sequence."""
    torch.manual_seed(random.randrange(1 << 30))
    hq, hk = heads
    blocks = [-(-m // block_size) for _, m in lengths]
    num_blocks = sum(blocks) + 3
    pool = torch.randperm(num_blocks - 1) + 1
    # What no sequence owns, the slots past a sequence's end included, must never be used.
    cache = torch.full((2, num_blocks, hk, block_size, head_dim), float("nan"), dtype=dtype)
    table = torch.zeros(len(lengths), max(1, *blocks) + 2, dtype=torch.int32)
    k_scale, v_scale = (0.5, 2.0) if fp8 else (1.0, 1.0)
    expected, queries, used = [], [], 0
    scale = head_dim**-0.5
    for i, (n, m) in enumerate(lengths):
        table[i, : blocks[i]] = pool[used : used + blocks[i]].int()
        used += blocks[i]
        k, v = torch.randn(m, hk, head_dim).to(dtype), torch.randn(m, hk, head_dim).to(dtype)
        if fp8:
            k, v = k.to(torch.float8_e4m3fn).to(dtype), v.to(torch.float8_e4m3fn).to(dtype)
        at = torch.arange(m)
        block, offset = table[i, at // block_size].long(), at % block_size
        cache[0, block, :, offset], cache[1, block, :, offset] = k, v
        q = torch.randn(n, hq, head_dim).to(dtype)
        queries.append(q)
        expected.append(
            dense(q, k.double() * k_scale, v.double() * v_scale, scale, window, soft_cap)
            if m
            else q.double() * 0
        )
    if fp8:
        cache = cache.to(torch.float8_e4m3fn)
    q = torch.cat(queries).to(device)
    if strided:
        wide = torch.full((q.shape[0], (hq + 2 * hk) * head_dim), float("nan"), dtype=dtype, device=device)
        wide[:, : hq * head_dim] = q.flatten(1)
        q = wide[:, : hq * head_dim].unflatten(1, (hq, head_dim))
    out = torch.full((q.shape[0], hq, head_dim), float("nan"), dtype=dtype, device=device)
    start = torch.tensor([0, *torch.tensor([n for n, _ in lengths]).cumsum(0).tolist()], dtype=torch.int32)
    workspace = None
    if device == "cuda":
        workspace = decode_workspace(len(lengths), hq, hk, head_dim, device)
        assert workspace is not None
        workspace.partial.fill_(float("nan"))
        workspace.lse.fill_(float("nan"))
    arguments = (
        q, cache.to(device), start.to(device), torch.tensor([m for _, m in lengths], dtype=torch.int32, device=device),
        table.to(device),
    )  # fmt: skip
    for _ in range(2):  # a kernel's second launch takes another way than its first
        out.fill_(float("nan"))
        result = paged_attention(
            *arguments,
            out,
            scale=scale,
            max_query_len=max(n for n, _ in lengths),
            max_seq_len=max(m for _, m in lengths),
            sliding_window=window,
            soft_cap=soft_cap,
            num_decodes=num_decodes,
            workspace=workspace,
            k_scale=k_scale,
            v_scale=v_scale,
            prefill_kv_tokens=sum(m for _, m in lengths[num_decodes or 0 :]) if exact else None,
        )
    assert result is out
    want = torch.cat(expected)
    error = (result.double().cpu() - want).norm() / want.norm()
    assert error < TOLERANCE[dtype] * (2 if fp8 else 1), f"relative error {error:.2e}"
    worst = (result.double().cpu() - want).abs().max()
    assert worst < 50 * TOLERANCE[dtype], f"largest error {worst:.2e}"


DTYPES = [torch.float32] if INTERPRET else [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (14, 2), (9, 3), (20, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decode(device: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    check(device, dtype, [(1, 1), (1, 200), (1, 16), (1, 65), (1, 0)], heads, head_dim)


@pytest.mark.parametrize("head_dim", [80, 96, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes(device: str, dtype: torch.dtype, head_dim: int) -> None:
    check(device, dtype, [(1, 70), (1, 5), (33, 40), (2, 17)], head_dim=head_dim, num_decodes=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (14, 2), (20, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_prefill(device: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    check(device, dtype, [(5, 5), (150, 150), (64, 128), (1, 90), (37, 300)], heads, head_dim)


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_mixed(device: str, block_size: int) -> None:
    lengths = [(1, 33), (1, 170), (1, 1), (40, 40), (3, 90), (130, 131)]
    check(device, torch.float32, lengths, (14, 2), 64, block_size, num_decodes=3)
    check(device, torch.float32, lengths, (14, 2), 64, block_size, num_decodes=0, strided=True)
    check(device, torch.float32, lengths[:3], (14, 2), 64, block_size, strided=True)


@pytest.mark.parametrize("num_decodes", [2, 5, 70])
def test_unused_sequences_of_a_captured_step(device: str, num_decodes: int) -> None:
    """Decodes and chunks without a token; the places of unused decodes are those of the chunks' first tokens."""
    nothing = (0, 0)
    decodes = [(1, 33), (1, 170)] + [nothing] * (num_decodes - 2)
    for chunks in ([(130, 131), nothing, nothing], [(40, 40), (3, 90), (1, 7), (64, 700)], [(90, 600)]):
        check(device, torch.float32, decodes + chunks, (14, 2), 64, num_decodes=num_decodes)
        check(device, torch.bfloat16, decodes + chunks, (14, 2), 64, num_decodes=num_decodes, window=50)
        check(device, torch.bfloat16, decodes + chunks, (28, 4), 128, num_decodes=num_decodes)


@pytest.mark.parametrize("window", [1, 7, 64, 100])
def test_sliding_window(device: str, window: int) -> None:
    lengths = [(1, 33), (1, 190), (1, 1), (40, 40), (3, 90), (130, 201)]
    check(device, torch.float32, lengths, window=window, num_decodes=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(device: str, dtype: torch.dtype) -> None:
    check(device, dtype, [(1, 33), (1, 190), (40, 40), (3, 90)], soft_cap=1.5, num_decodes=2)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.float32])
def test_fp8_cache(device: str, dtype: torch.dtype) -> None:
    for head_dim in (64, 128):
        check(
            device, dtype, [(1, 33), (1, 190), (40, 40), (3, 90)], (14, 2), head_dim, num_decodes=2, fp8=True
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_large(dtype: torch.dtype) -> None:
    """Many splits, many tiles and long contexts, at the shapes that are timed."""
    check("cuda", dtype, [(1, random.randrange(1, 4000)) for _ in range(40)], (28, 4), 128)
    check("cuda", dtype, [(1, 9000)], (14, 2), 64)
    check("cuda", dtype, [(1, random.randrange(1, 300)) for _ in range(300)], (14, 2), 64)
    for count in (150, 300):  # enough rows for the GPU, of which only the long ones are cut
        uneven = [(1, random.choice((1, 90, 1024, 1025, 2500, 6000))) for _ in range(count)]
        check("cuda", dtype, [*uneven, (1, 0)], (28, 4), 128)
    mixed = [(1, 700), (1, 3), (1500, 1500), (300, 2000), (70, 70)]
    check("cuda", dtype, mixed, (28, 4), 128, num_decodes=2)
    check("cuda", dtype, mixed, (14, 2), 64, num_decodes=2, exact=True, strided=True)
    check("cuda", dtype, mixed, (16, 4), 128, num_decodes=0, exact=True, window=200)
    check("cuda", dtype, mixed, (20, 1), 64, num_decodes=2, soft_cap=2.0, block_size=32)
    # Too much context for gathered rows.
    check("cuda", dtype, [(100, 9000), (50, 9000), (3, 20)], (8, 2), 128)
    many = [(n, n) for n in (random.randrange(1, 700) for _ in range(70))]
    check("cuda", dtype, many, (14, 2), 64, exact=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(8, 8), (16, 4), (20, 4), (28, 4), (32, 4), (33, 1)])
def test_long_prompts(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """Keys and values gathered into rows: tiles that end within, at and past a tile of keys, prefixes, one token, none."""
    lengths = [(700, 700), (1, 1), (129, 900), (18, 18), (127, 128), (128, 128), (2, 1024), (0, 0)]
    check("cuda", dtype, lengths, heads, 128)
    for _ in range(4):
        lengths = []
        for _ in range(random.randrange(1, 6)):
            context = random.choice((1, 90, 512, 640, random.randrange(1, 2500)))
            lengths.append((random.randrange(1, context + 1), context))
        lengths.append((random.randrange(1, 600), random.randrange(600, 1500)))
        check(
            "cuda", dtype, lengths, heads, 128, exact=random.random() < 0.5, strided=random.random() < 0.5, num_decodes=0
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_decode_graph_replays_any_context() -> None:
    """One captured graph, other contexts at each replay."""
    hq, hk, d, size = 14, 2, 64, 8
    cache = torch.randn(2, 600, hk, 16, d, device="cuda", dtype=torch.bfloat16)
    table = torch.zeros(size, 64, dtype=torch.int32, device="cuda")
    lens = torch.zeros(size, dtype=torch.int32, device="cuda")
    q = torch.randn(size, hq, d, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    start = torch.arange(size + 1, dtype=torch.int32, device="cuda")
    workspace = decode_workspace(size, hq, hk, d, "cuda")

    def step(target: Tensor, on: str) -> None:
        paged_attention(
            q.to(on), cache.to(on), start.to(on), lens.to(on), table.to(on), target, scale=0.125, max_query_len=1,
            max_seq_len=1024, workspace=workspace,
        )  # fmt: skip

    step(out, "cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(out, "cuda")
    for _ in range(5):
        lens.copy_(torch.randint(0, 1024, (size,)))
        table.copy_(torch.randint(1, 600, (size, 64)))
        q.normal_()
        out.fill_(float("nan"))
        graph.replay()
        want = torch.empty(size, hq, d, dtype=torch.bfloat16)
        step(want, "cpu")
        torch.testing.assert_close(out.cpu().float(), want.float(), atol=2e-2, rtol=2e-2)
