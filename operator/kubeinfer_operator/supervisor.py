"""Runs a few processes as one: prefixed logs, one end for all, and the reason of the one that failed as the last line."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable
from typing import IO

from kubeinfer_operator.local import Process


class ChildFailed(Exception):
    """A process ended by itself; the message is its last line."""


class _Child:
    def __init__(self, process: Process, out: IO[str], width: int) -> None:
        self.process = process
        self.lines: deque[str] = deque(maxlen=20)
        # A session of its own: Ctrl-C reaches this process alone, which ends the others in order.
        self.popen = subprocess.Popen(
            process.command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **process.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(out, width), daemon=True)
        self._reader.start()

    def _read(self, out: IO[str], width: int) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if line.strip():
                self.lines.append(line.strip())
            print(f"{self.process.label:<{width}} | {line.rstrip()}", file=out, flush=True)

    def last_line(self) -> str:
        self._reader.join(timeout=2)
        return self.lines[-1] if self.lines else "it printed nothing"

    def close(self) -> None:
        """Let go of what is left once the process has ended."""
        self.popen.wait()
        self._reader.join(timeout=2)
        if self.popen.stdout is not None and not self._reader.is_alive():
            self.popen.stdout.close()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)


class Supervisor:
    """Use as a context manager: whatever happens inside, no process is left behind."""

    def __init__(self, out: IO[str] | None = None, width: int = 10) -> None:
        self._out = out or sys.stdout
        self._width = width
        self._children: list[_Child] = []
        self._stop = threading.Event()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, processes: Iterable[Process]) -> None:
        """Start processes; those started last are ended first."""
        for process in processes:
            self._children.append(_Child(process, self._out, self._width))

    def request_stop(self, *_: object) -> None:
        """Fit as a signal handler. The second time nothing is waited for."""
        if self._stop.is_set():
            for child in self._children:
                child.kill()
        self._stop.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def check(self) -> None:
        """Raise :class:`ChildFailed` if a process has ended."""
        for child in self._children:
            code = child.popen.poll()
            if code is not None and not self._stop.is_set():
                raise ChildFailed(f"{child.process.label} ended with exit code {code}: {child.last_line()}")

    def wait_healthy(self, said: Callable[[Process], None]) -> bool:
        """Until every process with a health address answers; False when it is to stop before."""
        waiting = [child.process for child in self._children if child.process.health]
        while waiting and not self._stop.is_set():
            self.check()
            for process in list(waiting):
                if _answers(str(process.health)):
                    waiting.remove(process)
                    said(process)
            if waiting:
                self._stop.wait(0.2)
        return not waiting

    def run(self) -> None:
        """Until a signal asks for the end, or a process has ended by itself."""
        while not self._stop.wait(0.5):
            self.check()

    def stop(self) -> None:
        """End all, the last started first, each with the time it needs for its streams."""
        self._stop.set()
        for child in reversed(self._children):
            if child.popen.poll() is None:
                child.popen.terminate()
                deadline = time.monotonic() + child.process.grace
                while child.popen.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.05)
            child.kill()
            child.close()
        self._children.clear()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
