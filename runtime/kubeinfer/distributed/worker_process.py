"""A further rank: ``python -m kubeinfer.distributed.worker_process``, its configuration on standard input."""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from typing import Any

import msgspec
import zmq

from kubeinfer.engine.plan import StepPlan
from kubeinfer.options import EngineOptions

_POLL_MS = 1000


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = json.loads(sys.stdin.readline())
    try:
        _run(config)
    except BaseException as exc:
        with open(config["last_words"], "w", encoding="utf-8") as file:
            file.write(f"{type(exc).__name__}: {' '.join(str(exc).split())}")
        raise
    return 0


def _run(config: dict[str, Any]) -> None:
    import torch

    from kubeinfer.distributed.collectives import TorchGroup
    from kubeinfer.model_config import load_model_config

    parent = os.getppid()
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
    group = TorchGroup(
        rank, int(config["size"]), config["init_method"], device, not options.disable_custom_all_reduce
    )
    module, name = config["worker"].split(":")
    worker = getattr(import_module(module), name)(options, model_config, *config["limits"], group)
    worker.start()
    decoder = msgspec.msgpack.Decoder(StepPlan)
    while os.getppid() == parent:
        if not plans.poll(_POLL_MS):
            continue
        frame = plans.recv()
        if not frame:
            break
        # The result is rank 0's to take; this rank samples the same tokens from the same gathered logits.
        worker.execute(decoder.decode(frame))
    worker.shutdown()
    os._exit(0)  # a collective that a dead peer left open must not keep this process


if __name__ == "__main__":
    sys.exit(main())
