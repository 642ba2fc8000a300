"""The engine core as a process of its own: ``python -m kubeinfer.engine.core_process``, options on standard input.

It speaks msgpack over two ZMQ sockets and ends when its parent does. If it dies, it first says why.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import time
import traceback

import msgspec
import zmq

from kubeinfer.engine.core import EngineCore, make_core
from kubeinfer.engine.messages import (
    AbortRequests,
    AddRequests,
    CheckIntegrity,
    ClientMessage,
    CoreDead,
    CoreMessage,
    CoreReady,
    CoreStep,
    ResetPrefixCache,
    Shutdown,
)
from kubeinfer.errors import KubeinferError
from kubeinfer.options import EngineOptions

logger = logging.getLogger(__name__)
_SIGN_OF_LIFE_S = 2.0  # a long prompt's steps bring no token, yet the client must see that they go on
_POLL_UNIT_S = 1e-3  # of ZMQ's time limits
_IDLE_POLL_MS = 1000  # how soon a core without work sees that its parent is gone


class CoreProcess:
    """The loop between the sockets and the core."""

    def __init__(self, core: EngineCore, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]):
        self.core = core
        self.inbox = inbox
        self.outbox = outbox
        self._decoder = msgspec.msgpack.Decoder(ClientMessage)
        self._encoder = msgspec.msgpack.Encoder()
        self._parent = os.getppid()
        self._stopped = False

    def run(self) -> None:
        self.send(CoreReady(self.core.info))
        steps, last_sent = 0, time.monotonic()
        while not self._stopped:
            if self.core.has_work():
                self._listen(self.core.spare_seconds())
                outputs = self.core.step()
                now = time.monotonic()
                if outputs.outputs or now - last_sent > _SIGN_OF_LIFE_S:
                    self.send(CoreStep(outputs))
                    last_sent = now
                steps += 1
                if steps % 256 == 0:
                    self._check_parent()
            else:
                if self.inbox.poll(_IDLE_POLL_MS):
                    self._take_messages()
                self._check_parent()

    def send(self, message: CoreMessage) -> None:
        self.outbox.send(self._encoder.encode(message), copy=True)

    def _check_parent(self) -> None:
        if os.getppid() != self._parent:
            self._stopped = True

    def _listen(self, seconds: float) -> None:
        """Take messages as they come for ``seconds``, or those that are there."""
        deadline = time.perf_counter() + seconds
        self._take_messages()
        while (left := deadline - time.perf_counter()) > 0:
            if left > _POLL_UNIT_S:
                self.inbox.poll(int(left / _POLL_UNIT_S))
            else:
                time.sleep(left)
            self._take_messages()

    def _take_messages(self) -> None:
        while True:
            try:
                frame = self.inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(self._decoder.decode(frame))

    def _handle(self, message: ClientMessage) -> None:
        match message:
            case AddRequests(requests):
                self.core.add_requests(requests)
            case AbortRequests(request_ids):
                self.core.abort_requests(request_ids)
            case ResetPrefixCache():
                self.core.reset_prefix_cache()
            case CheckIntegrity():
                self.core.check_integrity()
            case Shutdown():
                self._stopped = True


def reason_of(exc: BaseException) -> str:
    """One line that says why the core cannot go on."""
    text = " ".join(str(exc).split())
    if isinstance(exc, KubeinferError):
        return text
    if isinstance(exc, MemoryError) or "out of memory" in text.lower():
        return (
            f"out of memory: {text or 'host memory is exhausted'}. Lower --gpu-memory-utilization (GPU) or "
            "--cpu-kvcache-space (CPU), --max-num-batched-tokens or --max-num-seqs."
        )
    return f"{type(exc).__name__}: {text}"


def _last_words(address: str, reason: str) -> None:
    """Tell the client why this process ends, from a thread of its own (sockets are not shared between threads)."""
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    socket.connect(address)
    socket.send(msgspec.msgpack.encode(CoreDead(reason)))
    context.destroy(linger=1000)


def main() -> int:
    # Ctrl-C reaches the whole terminal group; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = sys.stdin.readline()
    if not line:
        return 0  # the parent was stopped before it could say what to run
    config = json.loads(line)
    from kubeinfer.logs import configure_logging

    configure_logging(config["log_format"])
    context = zmq.Context()
    inbox: zmq.Socket[bytes] = context.socket(zmq.PULL)
    outbox: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    for socket in (inbox, outbox):
        socket.set_hwm(0)
        socket.linger = 2000
    inbox.connect(config["requests_address"])
    outbox.connect(config["outputs_address"])
    from kubeinfer.distributed.multi_process import on_rank_death

    on_rank_death(lambda reason: _last_words(config["outputs_address"], reason))
    core: EngineCore | None = None
    try:
        core = make_core(EngineOptions(**config["options"]), serving=True)
        gc.collect()
        gc.freeze()  # what start-up made lives as long as the process: later collections need not look at it
        CoreProcess(core, inbox, outbox).run()
    except BaseException as exc:
        if not isinstance(exc, KubeinferError):
            traceback.print_exc()
        outbox.send(msgspec.msgpack.encode(CoreDead(reason_of(exc))))
        return 1
    finally:
        if core is not None:
            core.shutdown()
        context.destroy(linger=2000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
