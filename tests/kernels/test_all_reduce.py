"""Sums and gathers over peer memory: the kernels' arithmetic in one process, and whole groups of GPUs, a process each."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from kubeinfer.kernels.all_reduce import (
    COUNTER_BYTES,
    MOST_PROGRAMS,
    Inboxes,
    Peers,
    gather_columns,
    sum_packets,
    sum_rows,
    sum_rows_reference,
)

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
EPS = 1e-5


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want).norm() / want.norm())


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_reference_against_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(5, 96).to(dtype) for _ in range(4)]
    residual, weight = torch.randn(5, 96).to(dtype), torch.rand(96).to(dtype)
    total = torch.stack(parts).double().sum(0)
    assert error(sum_rows_reference(parts), total) < TOLERANCE[dtype]
    whole = total + residual.double()
    got = sum_rows_reference(parts, residual, weight, EPS)
    assert error(residual, whole) < TOLERANCE[dtype]
    assert error(got, normed(whole, weight)) < TOLERANCE[dtype]


class OneProcess:
    """All ranks' peer memory in one process: each rank's kernel runs alone, once all parts are there."""

    def __init__(self, size: int, dtype: torch.dtype, device: str):
        self.slot, self.result, num_bytes = (
            COUNTER_BYTES,
            COUNTER_BYTES + 65536,
            COUNTER_BYTES + 65536 + 2**22,
        )
        self.dtype = dtype
        self.memory = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(size)]
        addresses = torch.tensor([m.data_ptr() for m in self.memory], device=device)
        meetings = torch.zeros(MOST_PROGRAMS, dtype=torch.int32, device=device)
        self.ranks = [Peers(rank, size, addresses, meetings, 4, 1 << 20, meet=False) for rank in range(size)]

    def view(self, rank: int, offset: int, rows: int, width: int) -> torch.Tensor:
        num_bytes = rows * width * self.dtype.itemsize
        return self.memory[rank][offset : offset + num_bytes].view(self.dtype).view(rows, width)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("size", "rows", "width"), [(2, 1, 3584), (2, 9, 64), (4, 7, 200), (8, 3, 896)])
def test_kernels_in_one_process(device: str, dtype: torch.dtype, size: int, rows: int, width: int) -> None:
    world = OneProcess(size, dtype, device)
    if not world.memory[0].is_cuda:
        pytest.skip("about CUDA tensors")
    torch.manual_seed(rows + width)
    parts = [torch.randn(rows, width).to(dtype) for _ in range(size)]
    residual, weight = torch.randn(rows, width).to(dtype), (torch.rand(width) + 0.5).to(dtype)
    for rank, part in enumerate(parts):
        world.view(rank, world.slot, rows, width).copy_(part)
    total = torch.stack(parts).double().sum(0)
    whole, scale = total + residual.double(), weight.to(device)
    share = -(-rows // size)
    for rank, peers in enumerate(world.ranks):
        out = torch.full((rows, width), float("nan"), dtype=dtype, device=device)
        sum_rows(peers, world.slot, rows, width, out)
        assert error(out, total) < TOLERANCE[dtype]
        kept = residual.to(device, copy=True)
        sum_rows(peers, world.slot, rows, width, out, residual=kept, weight=scale, eps=EPS)
        assert error(kept, whole) < TOLERANCE[dtype]
        assert error(out, normed(whole, weight)) < TOLERANCE[dtype]
        kept = residual.to(device, copy=True)
        own = world.view(rank, world.result, rows, width)
        sum_rows(
            peers, world.slot, rows, width, own, residual=kept, weight=scale, eps=EPS, result=world.result
        )
        mine = slice(min(rank * share, rows), min((rank + 1) * share, rows))
        if mine.start < mine.stop:
            assert error(kept[mine], whole[mine]) < TOLERANCE[dtype]
    for rank in range(size):
        own = world.view(rank, world.result, rows, width)
        assert error(own, normed(whole, weight)) < TOLERANCE[dtype]
    calls = torch.zeros(16, dtype=torch.int32, device=device)
    inboxes = Inboxes(world.result, 16, width, calls)
    for turn in range(2):  # nobody waits here: the first turn only sends
        for peers, part in zip(world.ranks, parts):
            out = torch.full((rows, width), float("nan"), dtype=dtype, device=device)
            on = part.to(device)
            sum_packets(peers, inboxes, on, out)
            assert not turn or error(out, total) < TOLERANCE[dtype]
            kept = residual.to(device, copy=True)
            sum_packets(peers, inboxes, on, out, residual=kept, weight=scale, eps=EPS)
            if turn:
                assert error(kept, whole) < TOLERANCE[dtype]
                assert error(out, normed(whole, weight)) < TOLERANCE[dtype]
    for total_width in (size * width, size * width - 3):
        out = torch.full((rows, total_width), float("nan"), dtype=dtype, device=device)
        gather_columns(world.ranks[1], world.slot, rows, width, out)
        assert torch.equal(out.cpu(), torch.cat(parts, 1)[:, :total_width])


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [2, 4])
def test_a_group_of_gpus(size: int) -> None:
    """`all_reduce_ranks.py` on each rank: sums of all kinds, a thousand calls back to back, replayed graphs, slow ranks."""
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    script = str(Path(__file__).with_name("all_reduce_ranks.py"))
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank{rank}.log") for rank in range(size)]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, script, str(rank), str(size), f"file://{folder}/rendezvous"],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        deadline = time.monotonic() + 200
        codes: list[int | None] = [None] * size
        # One rank's failure is enough: its peers would wait for it.
        while time.monotonic() < deadline and None in codes and not any(codes):
            codes = [process.poll() for process in processes]
            time.sleep(0.1)
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        said = "\n".join(f"rank {rank}: {log.read_text()[-3000:]}" for rank, log in enumerate(logs))
    assert codes == [0] * size, said
