"""One worker process a device. Rank 0 is the engine core's own; the others follow it plan by plan."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from kubeinfer.distributed.executor import CacheSpec, Executor
from kubeinfer.errors import EngineDeadError, OptionError
from kubeinfer.layers.linear import check_divisible

if TYPE_CHECKING:
    from kubeinfer.engine.plan import StepPlan, StepResult
    from kubeinfer.model_config import ModelConfig
    from kubeinfer.options import EngineOptions


class MultiProcessExecutor(Executor):
    """Sends every plan to all ranks; results are rank 0's. A rank that dies ends the engine with its reason."""

    def __init__(
        self,
        worker_class: type[Any],
        options: EngineOptions,
        model_config: ModelConfig,
        limits: tuple[int, int],
    ):
        if options.pipeline_parallel_size > 1:
            raise OptionError(
                "pipeline_parallel_size is not supported yet; use --tensor-parallel-size.",
                "pipeline_parallel_size",
            )
        self.size = options.tensor_parallel_size
        _check_devices(options, self.size)
        check_divisible(model_config.num_heads, self.size, "attention heads")
        self._worker_class, self._options, self._model_config, self._limits = (
            worker_class,
            options,
            model_config,
            limits,
        )
        overlap = options.async_scheduling
        self.depth = 2 if ((options.device == "cuda") if overlap is None else overlap) else 1
        self._folder = tempfile.mkdtemp(prefix="kubeinfer-ranks-")
        self._context = zmq.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[zmq.Socket[bytes]] = []
        self._worker: Any = None
        self._pending: deque[Any] = deque()
        self._closing = False

    def start(self) -> CacheSpec:
        import torch

        from kubeinfer.distributed.collectives import TorchGroup

        init_method = f"file://{self._folder}/rendezvous"
        for rank in range(1, self.size):
            self._start_rank(rank, init_method)
        threading.Thread(target=self._watch, name="kubeinfer-ranks", daemon=True).start()
        device = torch.device("cuda", 0) if self._options.device == "cuda" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        group = TorchGroup(0, self.size, init_method, device, not self._options.disable_custom_all_reduce)
        self._worker = self._worker_class(self._options, self._model_config, *self._limits, group)
        spec: CacheSpec = self._worker.start()
        return spec

    def _start_rank(self, rank: int, init_method: str) -> None:
        address = f"ipc://{self._folder}/rank{rank}"
        socket: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        socket.set_hwm(0)
        socket.linger = 0
        socket.bind(address)
        self._sockets.append(socket)
        process = subprocess.Popen(
            [sys.executable, "-m", "kubeinfer.distributed.worker_process"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        if process.stdin is None:
            raise RuntimeError("a worker process has no standard input")
        config = {
            "rank": rank,
            "size": self.size,
            "init_method": init_method,
            "plans": address,
            "worker": f"{self._worker_class.__module__}:{self._worker_class.__qualname__}",
            "options": {**self._options.model_dump(exclude_unset=True), "dtype": self._model_config.dtype},
            "limits": self._limits,
            "last_words": f"{self._folder}/rank{rank}.reason",
        }
        process.stdin.write(json.dumps(config).encode() + b"\n")
        process.stdin.close()
        self._processes.append(process)

    def _watch(self) -> None:
        """End this process when a rank dies: its peers wait for it in a collective and would wait for ever."""
        while not self._closing:
            for rank, process in enumerate(self._processes, start=1):
                code = process.poll()
                if code is not None and not self._closing:
                    reason = self._reason(rank, code)
                    _die(reason)
            time.sleep(0.2)

    def _reason(self, rank: int, code: int) -> str:
        try:
            with open(f"{self._folder}/rank{rank}.reason", encoding="utf-8") as file:
                text = file.read().strip()
        except OSError:
            text = ""
        return f"the worker of rank {rank} died: {text or f'exit status {code}'}"

    def submit(self, plan: StepPlan) -> None:
        frame = self._encoder.encode(plan)
        for socket in self._sockets:
            socket.send(frame)
        try:
            self._pending.append(self._worker.execute(plan))
        except RuntimeError as exc:
            self._raise_rank_death(exc)
            raise

    def collect(self) -> StepResult:
        try:
            result: StepResult = self._pending.popleft().wait()
        except RuntimeError as exc:
            self._raise_rank_death(exc)
            raise
        return result

    def _raise_rank_death(self, cause: RuntimeError) -> None:
        """A collective fails when a peer is gone: say which and why, if one is."""
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            for rank, process in enumerate(self._processes, start=1):
                code = process.poll()
                if code is not None:
                    reason = self._reason(rank, code)
                    self._closing = True  # the watching thread need not say it again
                    raise EngineDeadError(reason) from cause
            time.sleep(0.05)

    def shutdown(self) -> None:
        self._closing = True
        if self._context.closed:
            return
        for socket in self._sockets:
            socket.send(b"")  # an empty frame ends a worker
        for process in self._processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker.group.close()
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)


_on_rank_death: list[Any] = []


def on_rank_death(callback: Any) -> None:
    """Call ``callback(reason)`` before this process ends because a rank died (the core tells its client)."""
    _on_rank_death.append(callback)


def _die(reason: str) -> None:
    for callback in _on_rank_death:
        callback(reason)
    print(f"kubeinfer: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _check_devices(options: EngineOptions, size: int) -> None:
    if options.device == "cuda":
        import torch

        count = torch.cuda.device_count()
        if size > count:
            raise OptionError(
                f"tensor_parallel_size {size} needs {size} GPUs, but this machine has {count}; lower "
                "--tensor-parallel-size or give the pod more GPUs.",
                "tensor_parallel_size",
            )
