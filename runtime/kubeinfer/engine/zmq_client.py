"""An engine core in a process of its own, reached over ZMQ."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import msgspec
import zmq
import zmq.asyncio

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

_POLL_MS = 500  # how soon a silent death (kill -9) is seen


class ProcessClient(AsyncEngineClient):
    """Starts the core process and talks to it. The constructor returns once the core is ready."""

    def __init__(self, options: EngineOptions, log_format: str = "text"):
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(CoreMessage)
        self._death_reason: str | None = None
        self._folder = tempfile.mkdtemp(prefix="kubeinfer-")
        self._context = zmq.Context()
        self._requests = self._bind("requests")
        self._outputs = self._bind("outputs")
        self._process = self._start(options, log_format)
        try:
            self.info = self._wait_ready()
        except BaseException:
            self.shutdown()
            raise
        self._async_requests = zmq.asyncio.Socket.shadow(self._requests)
        self._async_outputs = zmq.asyncio.Socket.shadow(self._outputs)

    def _bind(self, name: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.PUSH if name == "requests" else zmq.PULL)
        socket.set_hwm(0)
        socket.linger = 0
        socket.bind(self._address(name))
        return socket

    def _address(self, name: str) -> str:
        return f"ipc://{self._folder}/{name}"

    def _start(self, options: EngineOptions, log_format: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "kubeinfer.engine.core_process"],
            stdin=subprocess.PIPE,
            env=_child_environment(),
        )
        if process.stdin is None:
            raise RuntimeError("the engine core has no standard input")
        config = {
            "options": options.model_dump(exclude_unset=True),
            "requests_address": self._address("requests"),
            "outputs_address": self._address("outputs"),
            "log_format": log_format,
        }
        try:
            process.stdin.write(json.dumps(config).encode() + b"\n")
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; the wait that follows says why
        return process

    def _wait_ready(self) -> EngineInfo:
        while True:
            if self._outputs.poll(100):
                message = self._decoder.decode(self._outputs.recv())
                if isinstance(message, CoreReady):
                    return message.info
                if isinstance(message, CoreDead):
                    self._process.wait()
                    self._death_reason = message.reason
                    raise EngineDeadError(message.reason)
            elif self._process.poll() is not None:
                self._death_reason = exit_reason(self._process.returncode)
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
        await self._async_requests.send(self._encoder.encode(message))

    async def next_outputs(self) -> EngineOutputs:
        while self._death_reason is None:
            if not await self._async_outputs.poll(_POLL_MS):
                if self._process.poll() is not None and not await self._async_outputs.poll(0):
                    self._death_reason = exit_reason(self._process.returncode)
                continue
            message = self._decoder.decode(await self._async_outputs.recv())
            if isinstance(message, CoreStep):
                return message.outputs
            if isinstance(message, CoreDead):
                self._death_reason = message.reason
        raise EngineDeadError(self._death_reason)

    def shutdown(self) -> None:
        """Stop the core: politely, then for good. Safe to call twice."""
        if self._process.poll() is None:
            try:
                self._requests.send(self._encoder.encode(Shutdown()), zmq.NOBLOCK)
            except zmq.ZMQError:
                pass
            deadline = time.monotonic() + 3
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        if self._death_reason is None:
            self._death_reason = "the engine was shut down"
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)


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
