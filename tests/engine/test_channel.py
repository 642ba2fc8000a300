"""The messages between the server's two processes."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kubeinfer.engine.channel import Channel


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(end) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def take(channel: Channel, count: int) -> list[bytes]:
    """The next ``count`` payloads."""
    found: list[bytes] = []
    deadline = time.monotonic() + 10
    while len(found) < count and not channel.closed and time.monotonic() < deadline:
        channel.wait(0.1)
        found += channel.receive()
    return found


def test_payloads_of_any_size_come_whole_and_in_order(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    rng = random.Random(3)
    payloads = [rng.randbytes(rng.choice((0, 1, 7, 8, 9, 300, 65_528, 65_536, 400_000))) for _ in range(60)]
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.extend(take(other, len(payloads))))
    reader.start()
    for payload in payloads:
        one.send(payload)
    one.linger(10)
    reader.join()
    assert found == payloads
    assert other.receive() == []


def test_sending_never_waits_for_a_peer_that_does_not_read(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    payloads = [bytes([index]) * 100_000 for index in range(50)]
    began = time.monotonic()
    for payload in payloads:
        one.send(payload)
    one.linger(0.05)
    assert one.has_unsent
    assert time.monotonic() - began < 2
    one.send(b"last")  # goes behind what waits
    found: list[bytes] = []
    while len(found) < 51:
        found += other.receive()
        one.wait(0.01)  # sends the rest
    assert found == [*payloads, b"last"]
    assert not one.has_unsent


def test_what_was_sent_before_the_end_is_still_received(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    other.send(b"never read")
    one.send(b"why")
    one.close()
    assert other.receive() == [b"why"]
    assert not other.closed
    assert other.receive() == []
    assert other.closed
    other.send(b"nobody reads this")
    assert not other.has_unsent
    other.wait(5)  # returns at once


def test_threads_may_send_at_once(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    kinds = [bytes([65 + index]) * 3000 for index in range(4)]
    senders = [
        threading.Thread(target=lambda kind=kind: [one.send(kind) for _ in range(200)]) for kind in kinds
    ]
    for sender in senders:
        sender.start()
    found: list[bytes] = []
    while len(found) < 800:
        found += other.receive()
        one.flush()
    for sender in senders:
        sender.join()
    assert sorted(found) == sorted(kinds * 200)
