"""The engine core as a process of its own: ``python -m kubeinfer.engine.core_process``, options on standard input.

It speaks msgpack over a socket (:mod:`kubeinfer.engine.channel`) and ends when its parent does. If it dies, it first says why.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback

import msgspec

from kubeinfer.engine.channel import Channel
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
_POLL_UNIT_S = 1e-3  # of poll's time limits
_IDLE_POLL_S = 1.0  # how soon a core without work sees that its parent is gone


class CoreProcess:
    """The loop between the client's messages and the core."""

    def __init__(self, core: EngineCore, channel: Channel):
        self.core = core
        self.channel = channel
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
                self.channel.wait(_IDLE_POLL_S)
                self._take_messages()
                self._check_parent()

    def send(self, message: CoreMessage) -> None:
        self.channel.send(self._encoder.encode(message))

    def _check_parent(self) -> None:
        if os.getppid() != self._parent:
            self._stopped = True

    def _listen(self, seconds: float) -> None:
        """Take messages as they come for ``seconds``, or those that are there."""
        deadline = time.perf_counter() + seconds
        self._take_messages()
        while (left := deadline - time.perf_counter()) > 0:
            if left > _POLL_UNIT_S:
                self.channel.wait(left)
            else:
                time.sleep(left)
            self._take_messages()

    def _take_messages(self) -> None:
        if self.channel.has_unsent:
            self.channel.flush()
        for frame in self.channel.receive():
            self._handle(self._decoder.decode(frame))
        if self.channel.closed:
            self._stopped = True  # the parent is gone

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


def _last_words(channel: Channel, reason: str) -> None:
    """Tell the client why this process ends, from a thread of its own: the loop may be waiting for what never comes."""
    channel.send(msgspec.msgpack.encode(CoreDead(reason)))
    channel.linger(1.0)


def main() -> int:
    # Ctrl-C reaches the whole terminal group; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So may SIGTERM (systemd, timeout, dumb-init): streams are to end first. Whoever stops this process kills it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = sys.stdin.readline()
    if not line:
        return 0  # the parent was stopped before it could say what to run
    config = json.loads(line)
    from kubeinfer.logs import configure_logging

    configure_logging(config["log_format"])
    channel = Channel(socket.socket(fileno=config["channel"]))
    from kubeinfer.distributed.multi_process import on_rank_death

    on_rank_death(lambda reason: _last_words(channel, reason))
    core: EngineCore | None = None
    try:
        core = make_core(EngineOptions(**config["options"]), serving=True)
        gc.collect()
        gc.freeze()  # what start-up made lives as long as the process: later collections need not look at it
        CoreProcess(core, channel).run()
    except BaseException as exc:
        if not isinstance(exc, KubeinferError):
            traceback.print_exc()
        channel.send(msgspec.msgpack.encode(CoreDead(reason_of(exc))))
        return 1
    finally:
        if core is not None:
            core.shutdown()
        channel.linger(2.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
