"""Messages between two processes of one machine: frames over a pair of connected Unix sockets.

A frame is its payload's length (8 bytes, little endian) and the payload. The reader is woken by the sender's own system
call; a message queue's threads in between would make every message wait for two more wake-ups.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections import deque

_HEADER = struct.Struct("<Q")
_READ = 2**16  # bytes at once


class Channel:
    """One end. Nothing here blocks but :meth:`wait` and :meth:`linger`; any thread may send, one receives.

    A peer that is gone shows in :attr:`closed` once all that it sent has been received; what is sent to it is dropped.
    """

    def __init__(self, connected: socket.socket):
        connected.setblocking(False)
        connected.set_inheritable(False)
        self.closed = False
        self._socket = connected
        self._sending = threading.Lock()
        self._unsent: deque[memoryview] = deque()  # what the kernel had no room for, in order
        self._received = bytearray()  # the beginning of a frame that has not come whole

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether :meth:`flush` has something left to do."""
        return bool(self._unsent)

    def send(self, payload: bytes) -> None:
        """Send one frame, or as much of it as the kernel takes; :meth:`flush` and later calls send the rest."""
        with self._sending:
            self._unsent.append(memoryview(_HEADER.pack(len(payload)) + payload))
            self._flush()

    def flush(self) -> None:
        """Send what is left, as far as the kernel takes it."""
        with self._sending:
            self._flush()

    def _flush(self) -> None:
        unsent = self._unsent
        while unsent:
            try:
                sent = self._socket.send(unsent[0])
            except BlockingIOError:
                return
            except OSError:
                unsent.clear()  # nobody is there to read it
                return
            if sent == len(unsent[0]):
                unsent.popleft()
            else:
                unsent[0] = unsent[0][sent:]

    def receive(self) -> list[bytes]:
        """The payloads that are there, without waiting for any."""
        frames: list[bytes] = []
        received = self._received
        while not self.closed:
            try:
                data = self._socket.recv(_READ)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
                break
            received += data
            start = 0
            while len(received) - start >= _HEADER.size:
                end = start + _HEADER.size + _HEADER.unpack_from(received, start)[0]
                if end > len(received):
                    break
                frames.append(bytes(received[start + _HEADER.size : end]))
                start = end
            del received[:start]
            if len(data) < _READ:
                break
        return frames

    def wait(self, seconds: float) -> None:
        """Wait for something to receive, and send meanwhile what is left."""
        if not self.closed and self._poll(select.POLLIN, seconds) & select.POLLOUT:
            self.flush()

    def linger(self, seconds: float) -> None:
        """Wait until the peer has taken what is left, for at most ``seconds``."""
        deadline = time.monotonic() + seconds
        while self._unsent and (left := deadline - time.monotonic()) > 0:
            self._poll(0, left)
            self.flush()

    def _poll(self, events: int, seconds: float) -> int:
        poller = select.poll()
        poller.register(self._socket, events | (select.POLLOUT if self._unsent else 0))
        found = poller.poll(int(seconds * 1e3))
        return found[0][1] if found else 0

    def close(self) -> None:
        self.closed = True
        self._socket.close()
