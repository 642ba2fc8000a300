"""An engine core in a process of its own, reached over a socket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable

import msgspec

from kubeinfer.engine.channel import Channel
from kubeinfer.engine.client import AsyncEngineClient
from kubeinfer.engine.environment import thread_environment
from kubeinfer.engine.messages import (
    AbortRequests,
    AddRequests,
    CheckIntegrity,
    ClientMessage,
    CoreDead,
    CoreMessage,
    CoreReady,
    CoreStep,
    EngineInfo,
    EngineOutputs,
    EngineRequest,
    ResetPrefixCache,
    Shutdown,
)
from kubeinfer.errors import EngineDeadError
from kubeinfer.options import EngineOptions

_POLL_S = 0.5  # how soon a silent death is seen where the socket outlives the process
_EXIT_POLL_S = 0.01  # the same where the socket is closed: it is about to exit


class ProcessClient(AsyncEngineClient):
    """Starts the core process and talks to it. The constructor returns once the core is ready, or ``check`` raises."""

    def __init__(
        self, options: EngineOptions, log_format: str = "text", check: Callable[[], object] | None = None
    ):
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(CoreMessage)
        self._death_reason: str | None = None
        self._frames: deque[bytes] = deque()  # received and not yet asked for
        self._loop: asyncio.AbstractEventLoop | None = None  # that watches the channel
        self._waiter: asyncio.Future[bool] | None = None
        ours, core = socket.socketpair()
        self._channel = Channel(ours)
        with core:
            self._process = self._start(options, log_format, core.fileno())
        try:
            self.info = self._wait_ready(check)
        except BaseException:
            self.shutdown()
            raise

    def _start(self, options: EngineOptions, log_format: str, channel: int) -> subprocess.Popen[bytes]:
        # The core ignores SIGINT, which a terminal sends it too; until it does, it inherits that the signal waits.
        waiting = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "kubeinfer.engine.core_process"],
                stdin=subprocess.PIPE,
                env=_child_environment(),
                pass_fds=(channel,),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
        if process.stdin is None:
            raise RuntimeError("the engine core has no standard input")
        config = {
            "options": options.model_dump(exclude_unset=True),
            "channel": channel,
            "log_format": log_format,
        }
        try:
            process.stdin.write(json.dumps(config).encode() + b"\n")
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; the wait that follows says why
        return process

    def _wait_ready(self, check: Callable[[], object] | None) -> EngineInfo:
        while True:
            self._channel.wait(0.1)
            if check is not None:
                check()
            exited = self._process.poll() is not None
            for frame in self._channel.receive():
                message = self._decoder.decode(frame)
                if isinstance(message, CoreReady):
                    return message.info
                if isinstance(message, CoreDead):
                    self._process.wait()
                    self._death_reason = message.reason
                    raise EngineDeadError(message.reason)
            if exited or self._channel.closed:
                self._death_reason = exit_reason(self._process.wait())
                raise EngineDeadError(self._death_reason)

    @property
    def death_reason(self) -> str | None:
        return self._death_reason

    @property
    def pid(self) -> int:
        return self._process.pid

    async def add_requests(self, requests: list[EngineRequest]) -> None:
        await self._send(AddRequests(requests))

    async def abort_requests(self, request_ids: list[str]) -> None:
        await self._send(AbortRequests(request_ids))

    async def reset_prefix_cache(self) -> None:
        await self._send(ResetPrefixCache())

    async def check_integrity(self) -> None:
        """The core checks its invariants; it dies with the reason if one is broken."""
        await self._send(CheckIntegrity())

    async def _send(self, message: ClientMessage) -> None:
        if self._death_reason is not None:
            raise EngineDeadError(self._death_reason)
        self._channel.send(self._encoder.encode(message))
        if self._channel.has_unsent:
            asyncio.get_running_loop().add_writer(self._channel.fileno(), self._send_rest)

    def _send_rest(self) -> None:
        self._channel.flush()
        if not self._channel.has_unsent:
            asyncio.get_running_loop().remove_writer(self._channel.fileno())

    async def next_outputs(self) -> EngineOutputs:
        self._watch(asyncio.get_running_loop())
        while self._death_reason is None:
            if not self._frames:
                if not await self._have_frames():
                    self._check_process()
                continue
            message = self._decoder.decode(self._frames.popleft())
            if isinstance(message, CoreStep):
                return message.outputs
            if isinstance(message, CoreDead):
                self._death_reason = message.reason
        raise EngineDeadError(self._death_reason)

    def _check_process(self) -> None:
        if self._process.poll() is not None:
            self._receive()  # its last words may have come since
            if not self._frames:
                self._death_reason = exit_reason(self._process.returncode)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not loop and not self._channel.closed:
            self._loop = loop
            loop.add_reader(self._channel.fileno(), self._receive)

    def _unwatch(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._channel.fileno())
            loop.remove_writer(self._channel.fileno())

    def _receive(self) -> None:
        self._frames += self._channel.receive()
        if self._channel.closed:
            self._unwatch()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(bool(self._frames))

    async def _have_frames(self) -> bool:
        """Return True when something has come, False when it is time to look whether the process lives."""
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = loop.call_later(
            _EXIT_POLL_S if self._channel.closed else _POLL_S,
            lambda: None if waiter.done() else waiter.set_result(False),
        )
        try:
            return await waiter
        finally:
            timer.cancel()
            self._waiter = None

    def shutdown(self) -> None:
        """Stop the core: politely, then for good. Safe to call twice."""
        if self._process.poll() is None:
            self._channel.send(self._encoder.encode(Shutdown()))
            deadline = time.monotonic() + 3
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        if self._death_reason is None:
            self._death_reason = "the engine was shut down"
        self._unwatch()
        self._channel.close()


def _child_environment() -> dict[str, str]:
    """The parent's environment, with this package importable even where it is not installed."""
    from pathlib import Path

    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**thread_environment(), **os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def exit_reason(code: int) -> str:
    """Why a process that said nothing is gone."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory? see the pod's memory limit or the kernel log)" if name == "SIGKILL" else ""
        return f"the engine core process was killed by {name}{hint}"
    return f"the engine core process exited with status {code}; its reason stands above"
