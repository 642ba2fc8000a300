"""Which part of peer memory a call uses: no device is needed to decide that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from kubeinfer.distributed import peer_memory
from kubeinfer.distributed.peer_memory import PeerMemory
from kubeinfer.kernels.all_reduce import ALIGNMENT, COUNTER_BYTES, MOST_PROGRAMS, Peers

SLOT = 16 * ALIGNMENT
H = 64


@dataclass
class Launches:
    """Stands where the kernels are launched: what they were told."""

    slots: list[int] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)
    results: list[int] = field(default_factory=list)

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
    monkeypatch.setattr(peer_memory, "gather_columns", found.gather_columns)
    return found


def make(size: int) -> PeerMemory:
    memory = torch.zeros(COUNTER_BYTES + 4 * SLOT, dtype=torch.uint8)
    addresses = torch.full((size,), memory.data_ptr())
    peers = Peers(0, size, addresses, torch.zeros(MOST_PROGRAMS, dtype=torch.int32), 8, 1)
    return PeerMemory(memory, peers, SLOT)


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


def test_what_does_not_fit_is_not_taken() -> None:
    peer = make(2)
    most = SLOT // (H * 4)
    assert peer.fits(most, H, torch.float32)
    assert not peer.fits(most + 1, H, torch.float32)
    assert peer.lend(most + 1, H, torch.float32) is None
    assert not peer.fits(1, 6, torch.bfloat16)  # rows that are not aligned to 16 bytes
    assert not peer.fits(1, H, torch.float64)
    assert not peer.fits(0, H, torch.float32)
