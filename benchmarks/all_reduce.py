"""Latency of sums over the GPUs of a host by size: ours over peer memory, torch's over peer memory, NCCL's.

    PYTHONPATH=runtime python3 benchmarks/kernels.py --tensor-parallel 2

runs it, a process a GPU. Each figure is the time of one call in a replayed CUDA graph, the slowest rank's, in
microseconds, and includes what the call needs before it (a copy into peer memory) and the residual addition and norm
after it. `gather` is the logits' all-gather.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from kubeinfer.distributed import peer_memory
from kubeinfer.distributed.collectives import TorchGroup
from kubeinfer.distributed.peer_memory import PeerMemory
from kubeinfer.kernels.norm import fused_add_rms_norm

BF16 = torch.bfloat16
CALLS, REPLAYS = 20, 20  # an even number of calls: see peer_memory
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 8192, 16384)
MOST_SECONDS = 240


def spawn(size: int) -> int:
    """Run this file on ``size`` GPUs; rank 0 prints. Returns the first exit status that is not zero."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen([sys.executable, __file__, str(rank), str(size), f"file://{folder}/rendezvous"])
            for rank in range(size)
        ]
        deadline = time.monotonic() + MOST_SECONDS
        codes: list[int | None] = [None] * size
        # One rank's failure ends it: its peers would wait for it.
        while time.monotonic() < deadline and None in codes and not any(codes):
            codes = [rank.poll() for rank in ranks]
            time.sleep(0.1)
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
    return next((code or 1 for code in codes if code != 0), 0)


def microseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call of all ranks, the slowest's."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    spent = torch.tensor([begin.elapsed_time(end) * 1e3 / CALLS / REPLAYS], device=device)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent.item())


class Sums:
    """The same sum, addition and norm in several ways."""

    def __init__(self, group: TorchGroup, peer: PeerMemory, rows: int, width: int, theirs: Tensor):
        self.group, self.peer = group, peer
        self.x = torch.zeros(rows, width, dtype=BF16, device=group.device)
        self.residual, self.weight = torch.zeros_like(self.x), torch.ones_like(self.x[0])
        self.theirs = theirs[: rows * width].view(rows, width) if theirs.numel() >= rows * width else None

    def packets(self) -> None:
        self.peer.packet_bytes = 1 << 30
        self.peer.sum(self.x, self.residual, self.weight, 1e-6)
        self.peer.packet_bytes = 0

    def ours(self, two_shot: bool) -> None:
        place = self.peer.lend(*self.x.shape, BF16)
        if place is None:
            raise RuntimeError("too large for a slot")
        self.peer.sum(place, self.residual, self.weight, 1e-6, two_shot=two_shot)

    def torch_one_shot(self) -> None:
        if self.theirs is None:
            raise RuntimeError("too large for torch's buffer")
        self.theirs.copy_(self.x)
        self._norm(torch.ops.symm_mem.one_shot_all_reduce(self.theirs, "sum", self.group._group.group_name))

    def torch_two_shot(self) -> None:
        if self.theirs is None:
            raise RuntimeError("too large for torch's buffer")
        self.theirs.copy_(self.x)
        torch.ops.symm_mem.two_shot_all_reduce_(self.theirs, "sum", self.group._group.group_name)
        self._norm(self.theirs)

    def nccl(self) -> None:
        dist.all_reduce(self.x)
        self._norm(self.x)

    def _norm(self, x: Tensor) -> None:
        fused_add_rms_norm(x, self.residual, self.weight, 1e-6, x)


def sums(group: TorchGroup, peer: PeerMemory, width: int) -> None:
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # as ours does without
    import torch.distributed._symmetric_memory as symmetric

    theirs = symmetric.empty(
        4 * 2**20, dtype=BF16, device=group.device
    )  # 8 MiB, as much as they are asked for
    symmetric.rendezvous(theirs, group=group._group.group_name)
    say(group, f"\n{group.size} GPUs, all-reduce + residual + norm, width {width}: us")
    say(
        group,
        f"{'rows':>8} {'KiB':>8} {'one-shot':>9} {'two-shot':>9} {'torch 1':>9} {'torch 2':>9} {'NCCL':>9}",
    )
    for rows in ROWS:
        case = Sums(group, peer, rows, width, theirs)
        ways: list[Callable[[], object] | None] = [case.packets if rows <= peer.inboxes.rows else None]
        ways += [partial(case.ours, False), partial(case.ours, True)]
        ways.append(case.torch_one_shot if case.x.nbytes <= 2**20 else None)
        ways.append(case.torch_two_shot if case.theirs is not None else None)
        ways.append(case.nccl)
        figures = [f"{microseconds(way, group.device):9.1f}" if way else f"{'-':>9}" for way in ways]
        say(group, f"{rows:9} {case.x.nbytes // 1024:9} {' '.join(figures)}")


def gathers(group: TorchGroup, peer: PeerMemory, vocab: int) -> None:
    say(group, f"\n{group.size} GPUs, gather of logits, {vocab} columns: rows -> us, NCCL's")
    for rows in (1, 16, 64, 256, 512):
        shard = -(-vocab // group.size)
        x = torch.zeros(rows, shard, dtype=BF16, device=group.device)
        out = torch.empty(rows, vocab, dtype=BF16, device=group.device)
        place = peer.lend(rows, shard, BF16, once=True)
        ours = microseconds(partial(peer.gather, place, out), group.device) if place is not None else None
        group._peer = None
        theirs = microseconds(partial(group.all_gather, x, vocab, out), group.device)
        group._peer = peer
        say(group, f"{rows:8} {'-' if ours is None else f'{ours:.1f}':>9} {theirs:9.1f}")


def say(group: TorchGroup, line: str) -> None:
    if group.rank == 0:
        print(line, flush=True)


def main() -> None:
    rank, size, init_method = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    peer_memory._LOOKS = 60_000_000  # half a minute: a rank that waits for ever ends in a trap
    group = TorchGroup(rank, size, init_method, device, True)
    group.reserve(max(ROWS), 5120, BF16)
    peer = group._peer
    if peer is None:
        say(group, "these GPUs cannot reach each other's memory: NCCL does it all")
    else:
        with torch.inference_mode():
            sums(group, peer, 3584)
            gathers(group, peer, 152064)
            if size > 2:
                sums(group, peer, 5120)
    group.close()
    os._exit(0)


if __name__ == "__main__":
    main()
