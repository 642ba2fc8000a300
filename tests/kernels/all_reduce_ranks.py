"""One rank of the group that `test_all_reduce.py` tests: ``all_reduce_ranks.py RANK SIZE INIT_METHOD``."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from kubeinfer.distributed import peer_memory
from kubeinfer.distributed.collectives import TorchGroup
from kubeinfer.distributed.peer_memory import PeerMemory

EPS = 1e-5
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
WIDTH = 1024
# Some twenty seconds: a rank that waits for ever ends in a trap, and the test with it.
peer_memory._LOOKS = 40_000_000


def all_parts(size: int, rows: int, width: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator).to(dtype) for _ in range(size)]


def check(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    off = float((got.double().cpu() - want).norm() / want.norm())
    assert off < TOLERANCE[got.dtype], f"{what}: off by {off}"


def random_sums(group: TorchGroup, peer: PeerMemory, device: torch.device) -> None:
    """Every kind of sum and gather on random inputs against float64, lent buffers and copied ones."""
    rank, size = group.rank, group.size
    for seed, (rows, width, dtype, lend) in enumerate(
        (rows, width, dtype, lend)
        for dtype in TOLERANCE
        for rows, width in ((1, 3584), (5, 64), (7, 5120), (300, 896), (2000, 1024))
        for lend in (False, True)
    ):
        what = f"{rows} x {width} {dtype}, lent {lend}"
        parts = all_parts(size, rows, width, dtype, seed)
        residual, weight = parts[0].roll(1, 0) * 2, parts[1][0].abs() + 0.5
        total = torch.stack(parts).double().sum(0)
        whole = total + residual.double()
        norm = whole * torch.rsqrt(whole.pow(2).mean(1, keepdim=True) + EPS) * weight.double()

        def part(gather: bool = False) -> torch.Tensor:
            own = parts[rank].to(device, copy=True)  # noqa: B023 - called in the same turn
            place = (group.gather_buffer if gather else group.buffer)(*own.shape, own.dtype)
            return place.copy_(own) if lend and place is not None else own  # noqa: B023

        check(group.all_reduce(part()), total, f"all_reduce {what}")
        for one_shot_bytes, packet_bytes in ((1 << 40, 0), (0, 0), (1 << 40, 1 << 17)):
            peer.one_shot_bytes, peer.packet_bytes = one_shot_bytes, packet_bytes
            kept = residual.to(device, copy=True)
            got, same = group.all_reduce_norm(part(), kept, weight.to(device), EPS)
            assert same is kept
            check(
                got, norm, f"all_reduce_norm {what}, one-shot up to {one_shot_bytes}, packets {packet_bytes}"
            )
            everyone = [torch.empty_like(got) for _ in range(size)]
            dist.all_gather(everyone, got.clone())
            assert all(torch.equal(got, other) for other in everyone), f"ranks differ: {what}"
            share = -(-rows // size)
            mine = slice(0, rows) if one_shot_bytes else slice(rank * share, min((rank + 1) * share, rows))
            if mine.start < mine.stop:
                check(
                    kept[mine],
                    whole[mine],
                    f"residual {what}, one-shot up to {one_shot_bytes}, packets {packet_bytes}",
                )
            added = group.all_reduce_add(part(), residual.to(device, copy=True))
            check(
                added,
                whole,
                f"all_reduce_add {what}, one-shot up to {one_shot_bytes}, packets {packet_bytes}",
            )
        peer.one_shot_bytes = peer_memory.ONE_SHOT_BYTES[size]
        for total_width in (size * width, size * width - 5):
            got = group.all_gather(part(gather=True), total_width)
            assert torch.equal(got.cpu(), torch.cat(parts, 1)[:, :total_width]), f"all_gather {what}"


class Calls:
    """Calls on small whole numbers, whose sums are exact; what they find wrong is counted on the device.

    Each step's numbers differ from the last, so a part that is read too early or overwritten too soon shows.
    """

    def __init__(self, group: TorchGroup, peer: PeerMemory, device: torch.device, dtype: torch.dtype):
        self.group, self.peer, self.device, self.dtype = group, peer, device, dtype
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.bad = torch.zeros((), dtype=torch.int64, device=device)
        self.weight = torch.ones(WIDTH, dtype=dtype, device=device)
        self.base = {
            rows: (torch.arange(rows * WIDTH, device=device).view(rows, WIDTH) % 7).to(dtype)
            for rows in (1, 3, 64, 700, 2048)
        }

    def run(self, rows: int, kind: str) -> None:
        group, base = self.group, self.base[rows]
        self.peer.packet_bytes = 1 << 17 if kind == "packets" else 0
        self.step += 1
        extra = (self.step % 11).to(self.dtype)
        want = (base + extra) * group.size + group.size * (group.size - 1) // 2
        if kind == "copy":
            got = group.all_reduce(base + extra + group.rank)
            self.bad += (got != want).sum()
            return
        if kind == "gather":
            got = group.all_gather(base + extra + group.rank, group.size * WIDTH)
            ranks = torch.arange(group.size, device=self.device).repeat_interleave(WIDTH).to(self.dtype)
            self.bad += (got != (base + extra).repeat(1, group.size) + ranks).sum()
            return
        place = group.buffer(rows, WIDTH, self.dtype)
        if place is None:
            assert kind == "packets"
            place = torch.empty_like(base)
        torch.add(base, extra + group.rank, out=place)
        if kind == "sum":
            self.bad += (group.all_reduce(place) != want).sum()
            return
        residual = torch.zeros_like(base)
        usual, self.peer.one_shot_bytes = self.peer.one_shot_bytes, 0 if kind == "two-shot" else 1 << 40
        got, _ = group.all_reduce_norm(place, residual, self.weight, EPS)
        self.peer.one_shot_bytes = usual
        wide = want.float()
        norm = wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + EPS)
        self.bad += ((got.float() - norm).abs() > 0.02 * norm.abs() + 0.01).sum()
        share = -(-rows // group.size)
        mine = slice(group.rank * share, (group.rank + 1) * share) if kind == "two-shot" else slice(None)
        self.bad += (residual[mine] != want[mine]).sum()

    def verify(self, what: str) -> None:
        bad = int(self.bad.item())
        assert not bad, f"{what}: {bad} wrong numbers on rank {self.group.rank}"


def delay(rank: int, size: int, call: int, rng: random.Random) -> None:
    """Now and then one rank is up to 0.3 ms late; which one changes."""
    if (call // 50) % size == rank and rng.random() < 0.2:
        torch.cuda._sleep(rng.randrange(500_000))


def back_to_back(calls: Calls, rank: int, size: int) -> None:
    rng = random.Random(rank)  # each rank is late in its own way
    shared = random.Random(99)  # all ranks make the same calls
    kinds = ["norm", "norm", "packets", "packets", "two-shot", "sum", "copy", "gather"]
    for call in range(1000):
        rows, kind = shared.choice(list(calls.base)), shared.choice(kinds)
        delay(rank, size, call, rng)
        calls.run(rows, kind)
    calls.verify("back to back")


def replayed(calls: Calls, rank: int, size: int) -> None:
    """Graphs like a model's step (something once, then turns) and of an even number of turns, replayed in turns."""
    rng = random.Random(100 + rank)

    def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph

    def step_of(rows: int, kind: str, count: int) -> Callable[[], None]:
        def run() -> None:
            calls.run(rows, "copy")
            for _ in range(count):
                calls.run(rows, kind)
            calls.run(rows, "gather")

        return run

    def turns() -> None:
        for rows in (1, 700, 3, 64):
            calls.run(rows, "norm")

    steps = [
        turns,
        step_of(1, "norm", 8),
        step_of(64, "norm", 7),
        step_of(700, "two-shot", 6),
        step_of(3, "packets", 7),
    ]
    graphs = [captured(step) for step in steps]
    shared = random.Random(7)
    for call in range(400):
        graph = shared.choice(graphs)
        delay(rank, size, call, rng)
        graph.replay()
        if shared.random() < 0.1:
            for kind in ("copy", "norm", "packets", "norm"):  # an eager step between
                calls.run(3, kind)
    for _ in range(200):
        graphs[0].replay()
        graphs[4].replay()
    calls.verify("replayed")


def main() -> None:
    rank, size, init_method = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = TorchGroup(rank, size, init_method, device, True)
    group.reserve(2048, 5120, torch.float32)
    peer = group._peer
    assert peer is not None, "these GPUs cannot reach each other's memory"
    random_sums(group, peer, device)
    for dtype in TOLERANCE:
        calls = Calls(group, peer, device, dtype)
        calls.run(1, "copy")
        back_to_back(calls, rank, size)
        calls.run(1, "copy")
        replayed(calls, rank, size)
    group.close()
    print("ok", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
