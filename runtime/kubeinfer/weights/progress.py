"""How far a download is: a thread-safe meter, and its events as a bar or as JSON lines."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TextIO

Phase = Literal["resolving", "waiting", "checking", "downloading", "publishing"]

_WINDOW = 10.0  # seconds over which the rate is taken


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """Bytes, ``rate`` in bytes a second over the last seconds, ``eta`` in seconds (None: unknown)."""

    phase: Phase
    bytes_done: int = 0
    bytes_total: int = 0
    files_done: int = 0
    files_total: int = 0
    rate: float = 0.0
    eta: float | None = None
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The JSON line of this event, ``event`` being ``progress``; camelCase as in an object's status."""
        out: dict[str, Any] = {
            "event": "progress",
            "phase": self.phase,
            "bytesDone": self.bytes_done,
            "bytesTotal": self.bytes_total,
            "filesDone": self.files_done,
            "filesTotal": self.files_total,
            "rate": round(self.rate),
            "eta": None if self.eta is None else round(self.eta),
        }
        if self.message:
            out["message"] = self.message
        return out


ProgressCallback = Callable[[ProgressEvent], None]


def ignore_progress(event: ProgressEvent) -> None:
    """The callback for callers that do not want to know."""


class Meter:
    """Counts bytes and files of one download; every method may be called by any thread."""

    def __init__(self, bytes_total: int, files_total: int) -> None:
        self.bytes_total = bytes_total
        self.files_total = files_total
        self.received = 0
        self._done = 0
        self._files = 0
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def received_bytes(self, n: int) -> None:
        """``n`` bytes came over the network and were kept."""
        with self._lock:
            self._done += n
            self.received += n

    def already_here(self, n: int) -> None:
        """``n`` bytes need not come over the network (negative: they have to come again)."""
        with self._lock:
            self._done += n

    def file_done(self) -> None:
        with self._lock:
            self._files += 1

    def event(self, phase: Phase = "downloading", message: str = "") -> ProgressEvent:
        now = time.monotonic()
        with self._lock:
            samples = self._samples
            samples.append((now, self.received))
            while len(samples) > 2 and now - samples[1][0] > _WINDOW:
                samples.popleft()
            elapsed = now - samples[0][0]
            rate = (self.received - samples[0][1]) / elapsed if elapsed > 0 else 0.0
            left = self.bytes_total - self._done
            eta = left / rate if rate > 0 else (0.0 if left <= 0 else None)
            return ProgressEvent(
                phase,
                self._done,
                self.bytes_total,
                self._files,
                self.files_total,
                max(rate, 0.0),
                eta,
                message,
            )


class JsonLines:
    """Events as JSON lines on a stream, one every ``interval`` seconds, at once where the phase changes."""

    def __init__(self, stream: TextIO | None = None, interval: float = 2.0) -> None:
        self._stream = stream or sys.stdout
        self._interval = interval
        self._last = (float("-inf"), "")

    def __call__(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        last, phase = self._last
        if event.phase == phase and now - last < self._interval:
            return
        self._last = (now, event.phase)
        self.write(event.to_dict())

    def write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._stream, flush=True)


class Bar:
    """A tqdm bar on stderr that lives while bytes are expected."""

    def __init__(self, description: str, stream: TextIO | None = None) -> None:
        self._description = description
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._said = ""

    def __call__(self, event: ProgressEvent) -> None:
        if event.message and event.message != self._said:
            self._said = event.message
            print(event.message, file=self._stream, flush=True)
        if event.phase != "downloading" or not event.bytes_total:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self._description,
                total=event.bytes_total,
                initial=event.bytes_done,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                file=self._stream,
                dynamic_ncols=True,
            )
        self._bar.n = event.bytes_done
        self._bar.set_postfix_str(f"{event.files_done}/{event.files_total} files", refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
