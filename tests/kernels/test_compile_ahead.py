"""Kernels noted, compiled by other processes, and found by the first real launch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kubeinfer.kernels.activation import silu_and_mul
from kubeinfer.kernels.compile_ahead import in_processes
from kubeinfer.kernels.norm import fused_add_rms_norm


def kernels_in(cache: Path) -> set[Path]:
    return set(cache.rglob("*.cubin"))


def test_processes_take_the_next_when_they_are_done(tmp_path: Path) -> None:
    def work(numbers: Iterator[int]) -> None:
        for number in numbers:
            if number == 0:
                time.sleep(0.5)
            if number == 7:
                raise ValueError("the eighth")
            (tmp_path / f"{number} {os.getpid()}").touch()

    assert in_processes(work, 300, 3) == 1
    done = [tuple(map(int, path.name.split())) for path in tmp_path.iterdir()]
    assert sorted(number for number, _ in done) == [n for n in range(300) if n != 7]
    slow = next(process for number, process in done if number == 0)
    assert sum(process == slow for _, process in done) < 50, "the others do what it has no time for"
    assert len({process for _, process in done} - {os.getpid()}) == 3


@pytest.mark.gpu
def test_a_launch_finds_what_was_compiled_ahead(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.zeros(1, device=device).is_cuda:
        pytest.skip("about CUDA tensors")
    import triton

    from kubeinfer.kernels.compile_ahead import compile_ahead, compile_launches, noted_launches

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    # sizes that no other test has, so that no kernel is in memory yet
    x, residual = torch.ones(3, 1352, device=device).half(), torch.ones(3, 1352, device=device).half()
    weight = torch.ones(1352, device=device).half()
    untouched = residual.clone()

    def steps() -> None:
        for rows in (1, 2, 3):
            fused_add_rms_norm(x[:rows], residual[:rows], weight, 1e-5)
        silu_and_mul(x)

    with noted_launches() as launches:
        steps()
    assert torch.equal(residual, untouched)
    assert len({(launch.function, repr(launch.args)) for launch in launches}) >= 2
    assert not kernels_in(tmp_path)
    major, minor = torch.cuda.get_device_capability()
    assert compile_launches(launches, 4, 10 * major + minor) == 0
    compiled = kernels_in(tmp_path)
    assert len(compiled) == len(launches)

    steps()
    assert kernels_in(tmp_path) == compiled
    assert torch.equal(residual[0], torch.full_like(residual[0], 4.0))

    calls = []
    assert compile_ahead(lambda: calls.append(1), "a key", 4) == 0
    assert compile_ahead(lambda: calls.append(1), "a key", 4) == 0
    assert calls == [1], "the second start has nothing to do"
    assert compile_ahead(lambda: calls.append(1), "a key", 4, agree=lambda _: 0) == 0
    assert calls == [1, 1], "another rank has not: all run"


@pytest.mark.gpu
def test_a_long_prompt_is_compiled_ahead(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels whose arguments are tensor descriptors, Gluon's on Hopper."""
    if not torch.zeros(1, device=device).is_cuda:
        pytest.skip("about CUDA tensors")
    import triton

    from kubeinfer.kernels.attention import paged_attention
    from kubeinfer.kernels.compile_ahead import compile_launches, noted_launches

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    tokens, hq, hk, d = 600, 6, 2, 128  # heads that no other test has
    cache = torch.randn(2, 40, hk, 16, d, device=device, dtype=torch.bfloat16)
    table = torch.arange(40, dtype=torch.int32, device=device)[None]
    q = torch.randn(tokens, hq, d, device=device, dtype=torch.bfloat16)
    start = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    out = torch.zeros_like(q)

    def step() -> None:
        paged_attention(
            q, cache, start, start[1:].clone(), table, out, scale=d**-0.5, max_query_len=tokens, max_seq_len=tokens
        )  # fmt: skip

    with noted_launches() as launches:
        step()
    assert not out.any()
    major, minor = torch.cuda.get_device_capability()
    assert compile_launches(launches, 2, 10 * major + minor) == 0
    compiled = kernels_in(tmp_path)
    assert len(compiled) == len(launches) == (2 if major >= 9 else 1)
    step()
    assert kernels_in(tmp_path) == compiled
    assert out.any()
