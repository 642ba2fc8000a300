"""Several files at once: threads that fetch, and one that reports."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from kubeinfer.weights.progress import Meter, ProgressCallback
from kubeinfer.weights.sources import RemoteFile, ResolvedModel, WeightSource
from kubeinfer.weights.transfer import Stopped, Throttle, Transfer, TransferOptions


class Workers:
    """Threads that take files off a queue; the caller's thread reports progress and hears of the first error."""

    def __init__(
        self,
        source: WeightSource,
        resolved: ResolvedModel,
        meter: Meter,
        progress: ProgressCallback,
        options: TransferOptions,
        interval: float = 0.25,
    ) -> None:
        self._options = options
        self._source = source
        self._resolved = resolved
        self._meter = meter
        self._progress = progress
        self._interval = interval
        self._stop = threading.Event()
        self._throttle = Throttle()
        self._queue: queue.SimpleQueue[tuple[RemoteFile, Path]] = queue.SimpleQueue()
        self._errors: list[BaseException] = []
        self._wake = threading.Condition()

    def run(self, wanted: Sequence[tuple[RemoteFile, Path]], hashes: dict[Path, str], count: int) -> None:
        """Fetch ``wanted`` over ``count`` connections; fills ``hashes`` with the SHA-256 of each."""
        # The largest first: the last minutes are then many small files rather than one large one.
        for item in sorted(wanted, key=lambda pair: -pair[0].size):
            self._queue.put(item)
        threads = [
            threading.Thread(target=self._work, args=(hashes,), name=f"fetch-{n}", daemon=True)
            for n in range(min(count, len(wanted)))
        ]
        self._progress(self._meter.event())
        with self._stopping(threads):
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not self._errors:
                with self._wake:
                    self._wake.wait(self._interval)
                self._progress(self._meter.event())
        if self._errors:
            raise self._errors[0]
        self._progress(self._meter.event())

    @contextmanager
    def _stopping(self, threads: Sequence[threading.Thread]) -> Iterator[None]:
        """Whatever ends the wait (an error, Ctrl-C), no thread writes after it."""
        try:
            yield
        finally:
            self._stop.set()
            deadline = time.monotonic() + 2.0
            for thread in threads:
                if thread.is_alive():
                    thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self, hashes: dict[Path, str]) -> None:
        host = urlsplit(self._resolved.endpoint).netloc or self._resolved.endpoint
        transfer = Transfer(host, self._options, self._meter, self._stop, self._throttle)
        try:
            while not self._stop.is_set():
                file, target = self._queue.get_nowait()
                request = lambda f=file: self._source.request_for(self._resolved, f)  # noqa: E731
                hashes[target] = transfer.fetch(file, request, target)
        except (queue.Empty, Stopped):
            pass
        except BaseException as error:
            self._errors.append(error)
        finally:
            transfer.close()
            with self._wake:
                self._wake.notify()
