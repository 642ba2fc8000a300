"""A further rank: ``python -m kubeinfer.distributed.worker_process``, its configuration on standard input."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from importlib import import_module
from typing import Any

import msgspec
import zmq

from kubeinfer.distributed.multi_process import uses_peer_memory
from kubeinfer.engine.plan import StepPlan
from kubeinfer.options import EngineOptions

_PARENT_SECONDS = 0.2


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in `kubeinfer.engine.core_process`
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = json.loads(sys.stdin.readline())
    try:
        _run(config)
    except BaseException as exc:
        _say_why(config, exc)
        raise
    return 0


def _say_why(config: dict[str, Any], exc: BaseException) -> None:
    with open(config["last_words"], "w", encoding="utf-8") as file:
        file.write(f"{type(exc).__name__}: {' '.join(str(exc).split())}")


class _Reporter:
    """Sends results to the engine core in their order, from a thread that waits for the device."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], config: dict[str, Any]):
        self._context = context
        self._config = config
        self._pending: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="kubeinfer-results", daemon=True).start()

    def put(self, pending: Any) -> None:
        self._pending.put(pending)

    def _run(self) -> None:
        try:
            socket: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
            socket.set_hwm(0)
            socket.linger = 0
            socket.connect(self._config["results"])
            encoder = msgspec.msgpack.Encoder()
            while True:
                socket.send(encoder.encode(self._pending.get().wait()))
        except BaseException as exc:
            _say_why(self._config, exc)
            traceback.print_exc()
            os._exit(1)


def _end_with_parent(parent: int) -> None:
    """End this process when the engine core is gone, which may leave it in a collective for minutes."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _run(config: dict[str, Any]) -> None:
    import torch

    from kubeinfer.distributed.collectives import TorchGroup
    from kubeinfer.distributed.pipeline import Pipeline
    from kubeinfer.model_config import load_model_config

    threading.Thread(
        target=_end_with_parent, args=(os.getppid(),), name="kubeinfer-parent", daemon=True
    ).start()
    options = EngineOptions(**config["options"])
    rank = int(config["rank"])
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    context = zmq.Context()
    plans: zmq.Socket[bytes] = context.socket(zmq.PULL)
    plans.set_hwm(0)
    plans.connect(config["plans"])
    model_config = load_model_config(options)
    size, num_stages = options.tensor_parallel_size, options.pipeline_parallel_size
    group = TorchGroup(rank, size, config["init_method"], device, uses_peer_memory(options), num_stages)
    pipeline = Pipeline(rank, size, num_stages, device) if num_stages > 1 else None
    module, name = config["worker"].split(":")
    worker = getattr(import_module(module), name)(options, model_config, *config["limits"], group, pipeline)
    worker.start()
    reporter = _Reporter(context, config) if config["results"] is not None else None
    decoder = msgspec.msgpack.Decoder(StepPlan)
    while True:
        frame = plans.recv()
        if not frame:
            break
        pending = worker.execute(decoder.decode(frame))
        # All ranks of a stage sample the same tokens from the same gathered logits: one of them reports.
        if reporter is not None:
            reporter.put(pending)
    with suppress(RuntimeError):  # peers may be gone before the last message to them was
        worker.shutdown()
    os._exit(0)  # a collective that a dead peer left open must not keep this process


if __name__ == "__main__":
    sys.exit(main())
