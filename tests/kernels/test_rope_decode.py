"""Rotation, cache write and attention of few decode rows in one kernel, against the references of the two it replaces."""

from __future__ import annotations

import os
import random

import pytest
import torch
from references import cos_sin_table

from kubeinfer.kernels import batch_invariance
from kubeinfer.kernels.attention import decode_workspace, paged_attention_reference, rope_and_decode
from kubeinfer.kernels.rope import rope_and_cache_reference

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32] if INTERPRET else [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
CONTEXTS = [1, 200, 16, 65, 0, 33, 17, 32]  # rows that are cut in enough splits, of two KV heads


def on_gpu(device: str) -> None:
    if not torch.empty(0, device=device).is_cuda:  # which the interpreter's tensors say they are
        pytest.skip("about the kernel for GPUs")


class Rows:
    """A batch of decode rows before their step: a cache that holds all but the newest positions, and nothing else."""

    def __init__(
        self,
        contexts: list[int],
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        *,
        rotary: int | None = None,
        normed: bool = False,
        block_size: int = 16,
    ):
        torch.manual_seed(random.randrange(1 << 30))
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype
        hq, hk = heads
        rotary = head_dim if rotary is None else rotary
        blocks = [-(-n // block_size) for n in contexts]
        pool = torch.randperm(sum(blocks) + 2) + 1
        self.cache = torch.full((2, sum(blocks) + 3, hk, block_size, head_dim), float("nan"), dtype=dtype)
        self.table = torch.zeros(len(contexts), max(blocks) + 2, dtype=torch.int32)
        self.seq_lens = torch.tensor(contexts, dtype=torch.int32)
        self.positions = (self.seq_lens - 1).clamp(min=0).to(random.choice([torch.int32, torch.int64]))
        self.slots = torch.full((len(contexts),), -1, dtype=torch.int32)
        used = 0
        for i, n in enumerate(contexts):
            self.table[i, : blocks[i]] = pool[used : used + blocks[i]].int()
            used += blocks[i]
            at = torch.arange(n)
            block, offset = self.table[i, at // block_size].long(), at % block_size
            if n:
                self.cache[:, block[:-1], :, offset[:-1]] = torch.randn(n - 1, 2, hk, head_dim).to(dtype)
                self.slots[i] = block[-1] * block_size + offset[-1]
        self.qkv = torch.randn(len(contexts), (hq + 2 * hk) * head_dim).to(dtype)
        self.cos_sin = cos_sin_table(max(contexts) + 1, rotary) if rotary else None
        self.norms = [1 + 0.1 * torch.randn(head_dim).to(dtype) if normed else None for _ in range(2)]

    def split(self, qkv: torch.Tensor) -> list[torch.Tensor]:
        hq, hk = self.heads
        return list(qkv.unflatten(1, (-1, self.head_dim)).split((hq, hk, hk), 1))

    def want(self, window: int, soft_cap: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The result and the cache, from the references."""
        cache = self.cache.clone()
        q, k, v = (x.clone() for x in self.split(self.qkv))
        rope_and_cache_reference(
            q, k, v, self.positions, self.cos_sin, self.slots, cache, *self.norms, eps=1e-5
        )
        starts = torch.arange(len(q) + 1, dtype=torch.int32)
        out = paged_attention_reference(
            q, cache, starts, self.seq_lens, self.table, torch.empty_like(q), scale=self.head_dim**-0.5,
            sliding_window=window, soft_cap=soft_cap,
        )  # fmt: skip
        return out, cache

    def check(self, device: str, window: int = 0, soft_cap: float = 0.0) -> None:
        want, want_cache = self.want(window, soft_cap)
        hq, hk = self.heads
        cache, qkv = self.cache.to(device, copy=True), self.qkv.to(device, copy=True)
        q, k, v = self.split(qkv)
        workspace = None
        if device == "cuda":
            workspace = decode_workspace(len(q), hq, hk, self.head_dim, device)
            assert workspace is not None
            workspace.partial.fill_(float("nan"))
            workspace.lse.fill_(float("nan"))
        for _ in range(2):  # a kernel's second launch takes another way than its first
            out = torch.full((len(q), hq, self.head_dim), float("nan"), dtype=self.dtype, device=device)
            served = rope_and_decode(
                q, k, v, self.positions.to(device), None if self.cos_sin is None else self.cos_sin.to(device),
                self.slots.to(device), cache, self.seq_lens.to(device), self.table.to(device), out,
                scale=self.head_dim**-0.5, sliding_window=window, soft_cap=soft_cap, workspace=workspace,
                q_norm_weight=None if self.norms[0] is None else self.norms[0].to(device),
                k_norm_weight=None if self.norms[1] is None else self.norms[1].to(device), eps=1e-5,
            )  # fmt: skip
            assert served
        assert torch.equal(qkv.cpu(), self.qkv)
        limit = TOLERANCE[self.dtype]
        got, want = out.cpu().double(), want.double()
        assert (got - want).norm() / want.norm() < limit
        assert (got - want).abs().max() < 50 * limit
        # The newest keys and values are where they belong; what no row owns, and all that was there, is as it was.
        cached, wanted = cache.cpu(), want_cache
        assert torch.equal(cached.isnan(), wanted.isnan())
        assert torch.allclose(
            cached.nan_to_num().float(), wanted.nan_to_num().float(), rtol=2 * limit, atol=2 * limit
        )
        older = ~self.cache.isnan()
        assert torch.equal(cached[older], self.cache[older])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (14, 2), (20, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows(device: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    on_gpu(device)
    Rows(CONTEXTS, heads, head_dim, dtype).check(device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("head_dim", "rotary", "normed"),
    [(128, 128, True), (80, 32, False), (80, 32, True), (64, 0, False), (96, 96, True)],
)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (40, 0.0), (0, 20.0)])
def test_kinds_of_attention(
    device: str, dtype: torch.dtype, head_dim: int, rotary: int, normed: bool, window: int, soft_cap: float
) -> None:
    on_gpu(device)
    Rows(CONTEXTS, (6, 2), head_dim, dtype, rotary=rotary, normed=normed).check(device, window, soft_cap)


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "longest"), [(1, 17000), (1, 512), (4, 9000), (4, 90)])
def test_one_row_and_as_many_as_are_served(device: str, count: int, longest: int) -> None:
    """Splits of several tiles; the newest position alone in a tile, in a split, and in a block."""
    on_gpu(device)
    if INTERPRET and count * longest > 3000:
        pytest.skip("too slow in the interpreter")
    contexts = [longest, *(random.randrange(longest) for _ in range(count - 1))]
    for block_size in (16, 32):
        for more in (0, 1):
            Rows([n + more for n in contexts], (28, 4), 128, DTYPES[-1], block_size=block_size).check(device)


def test_others_are_left_to_two_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def served(count: int, cache_dtype: torch.dtype = torch.float16) -> bool:
        q = torch.zeros(count, 8, 64, dtype=torch.float16, device=device)
        kv = torch.zeros(count, 2, 64, dtype=torch.float16, device=device)
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        cache = torch.zeros(2, 1, 2, 16, 64, dtype=cache_dtype, device=device)
        return rope_and_decode(
            q, kv, kv, zeros, None, zeros - 1, cache, zeros, zeros[:, None], torch.empty_like(q), scale=1.0
        )

    assert served(2) is torch.empty(0, device=device).is_cuda
    assert served(8) is served(2)
    assert not served(9)  # cut in fewer splits
    assert not served(67)  # rows enough to fill the GPU
    assert not served(2, torch.float8_e4m3fn)
    assert not served(0)
    monkeypatch.setattr(batch_invariance, "_enabled", True)
    assert not served(2)
