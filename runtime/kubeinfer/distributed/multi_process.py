"""One worker process a device. Rank 0 is the engine core's own; the others follow it plan by plan.

Ranks count through the first stage of the pipeline, then through the next: rank = stage * tensor_parallel_size + place.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from kubeinfer.distributed.executor import CacheSpec, Executor
from kubeinfer.errors import EngineDeadError, OptionError
from kubeinfer.layers.linear import check_divisible
from kubeinfer.layers.parallel import Stage

if TYPE_CHECKING:
    from kubeinfer.engine.plan import StepPlan, StepResult
    from kubeinfer.model_config import ModelConfig
    from kubeinfer.options import EngineOptions

logger = logging.getLogger(__name__)
_RESULT_POLL_MS = 200
_PARTING_SECONDS = 5


class MultiProcessExecutor(Executor):
    """Sends every plan to all ranks; results come from the first rank of the last stage, which may be this process's.

    A rank that dies ends the engine with its reason.
    """

    def __init__(
        self,
        worker_class: type[Any],
        options: EngineOptions,
        model_config: ModelConfig,
        limits: tuple[int, int],
    ):
        self.size, self.num_stages = options.tensor_parallel_size, options.pipeline_parallel_size
        _check_devices(options, self.size, self.num_stages)
        _check_stages(model_config.num_layers, self.num_stages)
        check_divisible(model_config.num_heads, self.size, "attention heads")
        self._worker_class, self._options, self._model_config, self._limits = (
            worker_class,
            options,
            model_config,
            limits,
        )
        overlap = options.async_scheduling
        # One step for each stage, and one more planned ahead where steps overlap.
        self.depth = self.num_stages + ((options.device == "cuda") if overlap is None else overlap)
        self._folder = tempfile.mkdtemp(prefix="kubeinfer-ranks-")
        # Also at the end of a script that shuts nothing down.
        self._remove_folder = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._context = zmq.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[zmq.Socket[bytes]] = []
        self._results: zmq.Socket[bytes] | None = None  # from the last stage, where that is not this process
        self._decoder: msgspec.msgpack.Decoder[StepResult] | None = None
        self._worker: Any = None
        self._pending: deque[Any] = deque()
        self._closing = False
        self._give_up = 0.0  # when a step in flight is waited for no longer, once closing
        self._lock = threading.Lock()
        self._cause: str | None = None  # why a rank died

    def start(self) -> CacheSpec:
        import torch

        from kubeinfer.distributed.collectives import TorchGroup
        from kubeinfer.distributed.pipeline import Pipeline
        from kubeinfer.engine.plan import StepResult

        init_method = f"file://{self._folder}/rendezvous"
        if self.num_stages > 1:
            self._results = self._context.socket(zmq.PULL)
            self._results.set_hwm(0)
            self._results.bind(self._results_address)
            self._decoder = msgspec.msgpack.Decoder(StepResult)
            total = self._model_config.num_layers
            ranges = [Stage(i, self.num_stages).layers(total) for i in range(self.num_stages)]
            logger.info("pipeline: layers %s", ", ".join(f"{r.start}-{r.stop - 1}" for r in ranges))
        for rank in range(1, self.size * self.num_stages):
            self._start_rank(rank, init_method)
        threading.Thread(target=self._watch, name="kubeinfer-ranks", daemon=True).start()
        device = torch.device("cuda", 0) if self._options.device == "cuda" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        group = TorchGroup(
            0, self.size, init_method, device, uses_peer_memory(self._options), self.num_stages
        )
        pipeline = Pipeline(0, self.size, self.num_stages, device) if self.num_stages > 1 else None
        self._worker = self._worker_class(self._options, self._model_config, *self._limits, group, pipeline)
        spec: CacheSpec = self._worker.start()
        return spec

    @property
    def _results_address(self) -> str:
        return f"ipc://{self._folder}/results"

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
            "init_method": init_method,
            "plans": address,
            # of the ranks of the last stage, which all sample the same, the first reports
            "results": self._results_address if rank == (self.num_stages - 1) * self.size else None,
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
            reason = self._death()
            if reason is not None and not self._closing:
                _die(reason)
            time.sleep(0.2)

    def _death(self) -> str | None:
        """Why a rank died, if one did, and the end of all: of several dead the first, which took the others with it."""
        with self._lock:
            if self._cause is None:
                self._cause = self._find_death()
            return self._cause

    def _find_death(self) -> str | None:
        dead = [(rank, p.poll()) for rank, p in enumerate(self._processes, start=1) if p.poll() is not None]
        if not dead:
            return None

        def when(rank: int) -> float:
            try:
                return os.stat(f"{self._folder}/rank{rank}.reason").st_mtime
            except OSError:
                return 0.0  # killed before it could say why

        rank, code = min(dead, key=lambda d: when(d[0]))
        try:
            with open(f"{self._folder}/rank{rank}.reason", encoding="utf-8") as file:
                text = file.read().strip()
        except OSError:
            text = ""
        for process in self._processes:  # so that the reason is the last line that anyone prints
            process.kill()
            process.wait()
        return f"the worker of rank {rank} died: {text or f'exit status {code}'}"

    def submit(self, plan: StepPlan) -> None:
        frame = self._encoder.encode(plan)
        for socket in self._sockets:
            while not socket.poll(_RESULT_POLL_MS, zmq.POLLOUT):  # a rank that is gone never takes it
                self._raise_dead_rank(None)
            socket.send(frame)
        try:
            self._pending.append(self._worker.execute(plan))
        except RuntimeError as exc:
            self._raise_rank_death(exc)
            raise

    def collect(self) -> StepResult:
        pending = self._pending.popleft()
        if self._results is not None:
            return self._receive_result(self._results)
        try:
            result: StepResult = pending.wait()
        except RuntimeError as exc:
            self._raise_rank_death(exc)
            raise
        return result

    def _receive_result(self, socket: zmq.Socket[bytes]) -> StepResult:
        while not socket.poll(_RESULT_POLL_MS):
            self._raise_dead_rank(None)
            if self._closing and time.monotonic() > self._give_up:
                raise RuntimeError("the last stage has not answered")
        if self._decoder is None:
            raise RuntimeError("the executor was not started")
        return self._decoder.decode(socket.recv())

    def _raise_rank_death(self, cause: RuntimeError) -> None:
        """A collective fails when a peer is gone: say which and why, if one is."""
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            self._raise_dead_rank(cause)
            time.sleep(0.05)

    def _raise_dead_rank(self, cause: RuntimeError | None) -> None:
        reason = self._death()
        if reason is not None:
            self._closing = True  # the watching thread need not say it again
            raise EngineDeadError(reason) from cause

    def shutdown(self) -> None:
        self._closing = True
        self._give_up = time.monotonic() + _PARTING_SECONDS
        if self._context.closed:
            return
        try:  # ranks part with nothing on its way between them, unless one is gone already
            if self._worker is not None and self._death() is None:
                while self._pending:
                    self.collect()
                self._worker.shutdown()
        except (RuntimeError, EngineDeadError):
            logger.debug("a step in flight failed at shutdown", exc_info=True)
        for socket in self._sockets:
            with suppress(zmq.Again):  # a rank that is gone takes no message
                socket.send(b"", zmq.NOBLOCK)  # an empty frame ends a worker
        for process in self._processes:
            try:
                process.wait(timeout=_PARTING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._worker is not None:
            self._worker.group.close()
            self._worker = None
        self._context.destroy(linger=0)
        self._remove_folder()


_on_rank_death: list[Any] = []


def on_rank_death(callback: Any) -> None:
    """Call ``callback(reason)`` before this process ends because a rank died (the core tells its client)."""
    _on_rank_death.append(callback)


def uses_peer_memory(options: EngineOptions) -> bool:
    """Whether GPUs sum over peer memory. Its methods differ by size, so not under batch invariance."""
    return not (options.disable_custom_all_reduce or options.batch_invariant)


def _die(reason: str) -> None:
    for callback in _on_rank_death:
        callback(reason)
    print(f"kubeinfer: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _check_stages(num_layers: int, num_stages: int) -> None:
    if num_stages > num_layers:
        raise OptionError(
            f"pipeline_parallel_size {num_stages} is more than the model's {num_layers} layers; lower "
            "--pipeline-parallel-size.",
            "pipeline_parallel_size",
        )


def _check_devices(options: EngineOptions, size: int, num_stages: int) -> None:
    if options.device == "cuda":
        import torch

        count = torch.cuda.device_count()
        if num_stages > 1 and size * num_stages > count:
            raise OptionError(
                f"pipeline_parallel_size {num_stages} x tensor_parallel_size {size} needs {size * num_stages} GPUs, but "
                f"this machine has {count}; lower --pipeline-parallel-size or --tensor-parallel-size, or give the pod "
                "more GPUs.",
                "pipeline_parallel_size",
            )
        if size > count:
            raise OptionError(
                f"tensor_parallel_size {size} needs {size} GPUs, but this machine has {count}; lower "
                "--tensor-parallel-size or give the pod more GPUs.",
                "tensor_parallel_size",
            )
