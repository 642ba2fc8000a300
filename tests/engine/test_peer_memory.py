"""Which part of peer memory a call uses, and a simulation that shows it safe: no device is needed for either."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from kubeinfer.distributed import peer_memory
from kubeinfer.distributed.peer_memory import PeerMemory
from kubeinfer.kernels.all_reduce import ALIGNMENT, COUNTER_BYTES, MOST_PROGRAMS, Inboxes, Peers

SLOT = 16 * ALIGNMENT
H = 64


@dataclass
class Launches:
    """Stands where the kernels are launched: what they were told."""

    slots: list[int] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)
    results: list[int] = field(default_factory=list)
    packets: list[int] = field(default_factory=list)

    def sum_packets(self, peers: Peers, inboxes: Inboxes, x: Tensor, out: Tensor, **_: Any) -> None:
        self.packets.append(x.shape[0])

    def sum_rows(
        self,
        peers: Peers,
        slot: int,
        rows: int,
        width: int,
        out: Tensor,
        *,
        result: int,
        close: bool,
        **_: Any,
    ) -> None:
        self.slots.append((slot - COUNTER_BYTES) // SLOT)
        self.closed.append(close or result >= 0)
        self.results.append(result)

    def gather_columns(self, peers: Peers, slot: int, rows: int, width: int, out: Tensor) -> None:
        self.slots.append((slot - COUNTER_BYTES) // SLOT)
        self.closed.append(True)
        self.results.append(-1)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    monkeypatch.setattr(peer_memory, "sum_rows", found.sum_rows)
    monkeypatch.setattr(peer_memory, "sum_packets", found.sum_packets)
    monkeypatch.setattr(peer_memory, "gather_columns", found.gather_columns)
    return found


def make(size: int) -> PeerMemory:
    memory = torch.zeros(COUNTER_BYTES + 4 * SLOT, dtype=torch.uint8)
    addresses = torch.full((size,), memory.data_ptr())
    peers = Peers(0, size, addresses, torch.zeros(MOST_PROGRAMS, dtype=torch.int32), 8, 1)
    inboxes = Inboxes(COUNTER_BYTES + 4 * SLOT, 4, H, torch.zeros(4, dtype=torch.int32))
    peer = PeerMemory(memory, peers, SLOT, inboxes)
    peer.packet_bytes = 0
    return peer


def lend(peer: PeerMemory, rows: int = 2, once: bool = False) -> Tensor:
    place = peer.lend(rows, H, torch.float32, once)
    assert place is not None
    return place


def test_lent_places_take_turns_and_a_copied_one_begins_anew(launches: Launches) -> None:
    peer, residual, weight = make(2), torch.zeros(2, H), torch.ones(H)
    for _ in range(3):
        peer.sum(lend(peer), residual, weight, 1e-5)
    peer.sum(torch.zeros(2, H))
    peer.sum(lend(peer), residual)
    peer.sum(lend(peer))
    peer.gather(lend(peer, once=True), torch.zeros(2, 2 * H))
    peer.sum(lend(peer), residual)
    assert launches.slots == [0, 1, 0, 2, 0, 1, 2, 0]
    assert launches.closed == [False, False, False, True, False, False, True, False]


def test_what_is_not_in_peer_memory_is_copied_there(launches: Launches) -> None:
    peer, x = make(2), torch.randn(3, H)
    peer.sum(x)
    assert torch.equal(lend(peer, 3, once=True), x)
    peer.gather(x + 1, torch.zeros(3, 2 * H))
    assert torch.equal(lend(peer, 3, once=True), x + 1)


def test_two_shot_from_a_size_on_and_only_with_a_residual(launches: Launches) -> None:
    peer, residual = make(4), torch.zeros(8, H)
    peer.one_shot_bytes = 4 * H * 4
    for rows in (4, 5):
        place = lend(peer, rows)
        got = peer.sum(place, residual[:rows])
        assert (got.data_ptr() == peer._memory.data_ptr() + peer._result) == (rows == 5)
    peer.sum(lend(peer, 8))
    assert [result >= 0 for result in launches.results] == [False, True, False]


def test_a_few_rows_are_sent_as_packets_and_need_no_slot(launches: Launches) -> None:
    peer, residual = make(2), torch.zeros(8, H)
    peer.packet_bytes = 3 * H * 4
    for rows, dtype in ((3, torch.float32), (4, torch.bfloat16)):
        assert peer.lend(rows, H, dtype) is None
        peer.sum(torch.zeros(rows, H, dtype=dtype), residual[:rows].to(dtype))
    assert lend(peer, 4).data_ptr() == lend(peer, 4).data_ptr()  # more bytes
    assert peer.lend(5, H, torch.bfloat16) is not None  # more rows than an inbox has
    assert peer.lend(1, 2 * H, torch.float32) is not None  # longer rows
    assert peer.lend(1, H, torch.float32, once=True) is not None  # a gather
    peer.sum(torch.zeros(4, H))
    assert launches.packets == [3, 4]
    assert launches.slots == [2]


def test_what_does_not_fit_is_not_taken() -> None:
    peer = make(2)
    most = SLOT // (H * 4)
    assert peer.fits(most, H, torch.float32)
    assert not peer.fits(most + 1, H, torch.float32)
    assert peer.lend(most + 1, H, torch.float32) is None
    assert not peer.fits(1, 6, torch.bfloat16)  # rows that are not aligned to 16 bytes
    assert not peer.fits(1, H, torch.float64)
    assert not peer.fits(0, H, torch.float32)


class RaceError(Exception):
    """A rank read a part that was not the call's."""


class Group:
    """Ranks that run the kernels' protocol step by step, in whatever order the random numbers say.

    A call is (slot, programs, closing meeting): each rank writes its part, one row a program, then runs the programs.
    """

    def __init__(self, size: int, calls: list[tuple[int, int, bool]], rng: random.Random):
        self.size, self.calls, self.rng = size, calls, rng
        self.parts = [
            [[-1] * 3 for _ in range(3)] for _ in range(size)
        ]  # rank, slot, row -> the call that wrote it
        self.counters = [[[0] * size for _ in range(3)] for _ in range(size)]  # rank, program, source
        self.met = [[0] * 3 for _ in range(size)]

    def run(self) -> None:
        ranks = {rank: self.stream(rank) for rank in range(self.size)}
        favourite, turns = 0, 0
        while ranks:
            if turns == 0:  # one rank runs ahead for a while
                favourite, turns = self.rng.randrange(self.size), self.rng.randrange(1, 60)
            turns -= 1
            rank = (
                favourite if favourite in ranks and self.rng.random() < 0.9 else self.rng.choice(list(ranks))
            )
            if next(ranks[rank], "done") == "done":
                del ranks[rank]

    def stream(self, rank: int) -> Iterator[None]:
        for call, (slot, programs, closes) in enumerate(self.calls):
            for row in range(programs):
                self.parts[rank][slot][row] = call
                yield
            running = [self.program(rank, program, call, slot, closes) for program in range(programs)]
            while running:  # the next kernel starts when the last program of this one is done
                program = self.rng.choice(running)
                if next(program, "done") == "done":
                    running.remove(program)
                yield

    def meet(self, rank: int, program: int) -> Iterator[None]:
        met = self.met[rank][program]
        peers = [peer for peer in range(self.size) if peer != rank]
        for peer in peers:
            self.counters[peer][program][rank] += 1
            yield
        for peer in peers:
            while self.counters[rank][program][peer] <= met:
                yield
        self.met[rank][program] = met + 1

    def program(self, rank: int, program: int, call: int, slot: int, closes: bool) -> Iterator[None]:
        yield from self.meet(rank, program)
        for peer in range(self.size):
            if self.parts[peer][slot][program] != call:
                raise RaceError
            yield
        if closes:
            yield from self.meet(rank, program)


def a_step(peer: PeerMemory, launches: Launches, rng: random.Random) -> list[tuple[int, int, bool]]:
    """The calls of a step as `PeerMemory` decides them: something once, a few layers, something once."""
    launches.slots.clear()
    launches.closed.clear()
    peer.sum(torch.zeros(2, H))
    for _ in range(rng.randrange(4)):
        peer.sum(lend(peer), torch.zeros(2, H))
    peer.gather(torch.zeros(2, H), torch.zeros(2, 2 * H))
    programs = rng.randrange(1, 4)
    return [(slot, programs, closed) for slot, closed in zip(launches.slots, launches.closed)]


@pytest.mark.parametrize("size", [2, 3])
def test_no_rank_reads_another_calls_part_however_ranks_are_delayed(launches: Launches, size: int) -> None:
    rng, peer = random.Random(size), make(size)
    for _ in range(60):
        captured = a_step(peer, launches, rng)  # replayed as it was captured, between other steps
        calls = [call for _ in range(3) for call in (*captured, *captured, *a_step(peer, launches, rng))]
        layers = [
            (turn % 2, rng.randrange(1, 4), False) for turn in range(4)
        ]  # a stage without embedding and head
        Group(size, calls, rng).run()
        Group(size, layers * 4, rng).run()


def test_the_simulation_finds_the_race_of_a_slot_used_twice_in_a_row() -> None:
    rng = random.Random(0)
    group = Group(2, [(0, 2, False)] * 1000, rng)
    with pytest.raises(RaceError):
        group.run()
