"""Compiles Triton kernels on all cores before a step launches them.

A kernel is compiled when it is first launched, one after the other, which takes half a second each: an empty cache would
make the first start of a model wait for most of a minute. Here the steps are gone through once with every launch noted in
place of being made; then forked processes compile what was noted, into Triton's cache on disk, where the first real launch
finds it. Nothing here is needed for a right result: what is not compiled ahead is compiled at its launch.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import signal
import sys
import time
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)
_MOST_SECONDS = 60.0  # after which compiling ahead is given up


class Launch(NamedTuple):
    """A kernel with arguments of the types it is to be compiled for."""

    function: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    """Within, Triton kernels are noted, each variant once, and not launched: what they would write stays as it is."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: dict[Any, Launch] = {}

    def note(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        # Triton's own idea of what makes a variant: numbers that it does not specialize on make none.
        bind = function.device_caches[driver.active.get_current_device()][-1]
        _, variant, _ = bind(*args, **options)
        key = (function, repr(variant), repr(options))
        if key not in launches:
            launches[key] = Launch(function, tuple(_type_of(arg) for arg in args), options)

    run = JITFunction.run
    JITFunction.run = note
    found: list[Launch] = []
    try:
        yield found
    finally:
        JITFunction.run = run
        found.extend(launches.values())


def _type_of(arg: Any) -> Any:
    """What stands for ``arg`` when compiling: a tensor's dtype; a number or None as it is."""
    import torch
    from triton.runtime.jit import MockTensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(arg, torch.Tensor):
        return arg.dtype
    if isinstance(arg, TensorDescriptor):
        return TensorDescriptor(MockTensor(arg.base.dtype), arg.shape, arg.strides, arg.block_shape)
    if hasattr(arg, "block_shape"):  # Gluon's descriptor, of a class that not every release of Triton has
        return type(arg)(MockTensor(arg.base.dtype), arg.shape, arg.strides, arg.block_shape, arg.layout)
    return arg


class _Target:
    """In the place of Triton's driver: compiling asks it for the kind of GPU, and a forked process must not ask the GPU."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(launches: list[Launch], processes: int, capability: int) -> int:
    """Compile ``launches`` for compute ``capability`` (90: Hopper) in forked processes; how many processes failed."""

    def compile_these(numbers: Iterator[int]) -> None:
        from triton.runtime.driver import driver

        driver.set_active(_Target(capability))
        for number in numbers:
            function, args, options = ordered[number]
            function.warmup(*args, grid=(1, 1, 1), **options)

    # Gluon kernels take seconds: not one of them last.
    ordered = sorted(launches, key=lambda launch: "gluon" not in type(launch.function).__module__)
    return in_processes(compile_these, len(ordered), processes)


def in_processes(work: Callable[[Iterator[int]], None], count: int, processes: int) -> int:
    """Have ``work`` done on the numbers below ``count`` (at most 32,768), in order, by forked processes of which each takes the next
    when it is done with one; how many processes failed. What one failed at is not done again."""
    todo, numbers = os.pipe()
    os.write(numbers, array("H", range(count)).tobytes())
    os.close(numbers)

    def take() -> Iterator[int]:
        while number := os.read(todo, 2):
            yield int.from_bytes(number, sys.byteorder)

    children = []
    for _ in range(min(processes, count)):
        with warnings.catch_warnings():
            # Other threads' locks are no matter: a child does its work and exits, and one that hangs is ended below.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            status = 1
            try:
                work(take())
                status = 0
            finally:
                os._exit(status)  # no exit handlers: the GPU is the parent's
        children.append(child)
    os.close(todo)
    deadline = time.monotonic() + _MOST_SECONDS
    failed = 0
    for child in children:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                failed += status != 0
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
    return failed


def compile_ahead(
    steps: Callable[[], object], key: str, processes: int, agree: Callable[[int], int] = int
) -> int:
    """Compile every kernel that ``steps`` launches, unless a start with the same ``key`` has done so.

    ``steps`` runs without its kernels: it must not depend on what they compute. ``agree`` gives the smallest of all ranks'
    values: ``steps`` may hold collective calls, so all ranks run it or none. Returns the number of kernels compiled.
    """
    import torch
    import triton

    major, minor = torch.cuda.get_device_capability()
    digest = hashlib.sha256(f"{key} {triton.__version__} {major}.{minor} {_sources()}".encode()).hexdigest()[
        :24
    ]
    done = Path(triton.knobs.cache.dir) / f"kubeinfer-{digest}"
    if agree(int(done.exists() or processes < 2)):
        return 0
    with noted_launches() as launches:
        steps()
    torch.cuda.synchronize()
    failed = compile_launches(launches, processes, 10 * major + minor)
    if failed:
        logger.warning(
            "%d of the processes that compile kernels ahead failed: the first start takes longer", failed
        )
    else:
        with suppress(OSError):  # a cache that cannot be written to serves nobody later either
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()
    # Meet the other ranks here, where waiting costs nothing: not in a kernel that gives up after a while.
    agree(1)
    return len(launches)


@functools.cache
def _sources() -> str:
    """A digest of this package: its kernels and their tuned configurations."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
