# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Launching Triton kernels with little host time, and what the current GPU allows."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The compiled kernel's own calling convention is used below; another release may have another.
_KNOWN_RELEASE = triton.__version__.startswith("3.6.")


@functools.cache
def _hopper() -> bool:
    return not _INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def overlaps_launches() -> bool:
    """Programmatic dependent launch: a kernel's programs get in place while the one before it finishes.

    The rule that keeps it right: in every kernel launched so some program calls ``gdc_wait``, and all that do any work, and these
    call ``gdc_launch_dependents`` only after it. Then all kernels but the one before are complete when a program starts, and that one too after the
    wait: weights and the step's tables may be read before, the previous kernel's output only after, and nothing may be
    written before.
    """
    return _hopper()


def has_tensor_memory_accelerator() -> bool:
    """Tensor descriptors are fetched by the copy engine."""
    return _hopper()


@functools.cache
def runs_gluon() -> bool:
    """Kernels in Gluon for Hopper may run: in the Triton release that they were checked with, as its language still changes."""
    return _hopper() and _KNOWN_RELEASE and torch.cuda.get_device_capability()[0] == 9


@functools.cache
def multiplies_thread_by_thread() -> bool:
    """The product of 16 x 8 x 16 of `kubeinfer.kernels.triton_mma`: Ampere and later. (The interpreter has no GPU to ask.)"""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared_memory() -> int:
    """Bytes that a program may have on the current GPU."""
    return int(torch.cuda.get_device_properties("cuda").shared_memory_per_block_optin)


@triton.jit
def fetch_ahead(pointers):
    """Ask the L2 cache for the lines at ``pointers``; nothing is returned."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_count(counter, count):
    """Until ``counter`` in memory has reached ``count``; what was stored before it was counted up can be read then."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred short;
        again:
        ld.acquire.gpu.global.s32 $0, [$1];
        setp.lt.s32 short, $0, $2;
        @short bra again;
        }""",
        "=&r,l,r", [counter, count], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


if _INTERPRETED:

    @triton.jit
    def all_threads():
        tl.debug_barrier()
else:

    @triton.jit
    def all_threads():
        """Wait for all threads of the program. Of the usual barrier in it a loop would not be pipelined."""
        tl.inline_asm_elementwise(
            "bar.sync 0; mov.u32 $0, $1;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )


def _run(compiled: Any, grid: tuple[int, int, int], device: int, args: Any, constants: Any) -> None:
    launch = compiled.run  # loads the kernel, if that is not done
    stream = torch._C._cuda_getCurrentRawStream(device)
    launch(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *constants)


class Kernel:
    """A Triton kernel whose repeated launches skip Triton's argument binding (10 to 20 microseconds each).

    The kernel's signature has all runtime parameters first, then the constants; its integers are in
    ``do_not_specialize``. A variant is compiled for each tuple of constants and of argument types; arguments that are
    not 16-byte aligned take Triton's own way.
    """

    def __init__(self, function: Any):
        self._function = function
        self._variants: dict[tuple[Any, ...], Any] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        args: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        num_stages: int = 3,
        pdl: bool = False,
        max_registers: int = 0,
        cluster: int = 1,
    ) -> None:
        """Launch on the current stream; ``args`` and ``constants`` in the signature's order.

        ``max_registers`` a thread, where not 0: fewer than the compiler takes let more programs share a multiprocessor.
        ``cluster``: so many neighbouring programs are one (Hopper), of which the grid counts one; the compiler does not know of it.
        """
        key: list[Any] = [constants, num_warps, num_stages, max_registers, cluster]
        aligned = 0
        for arg in args:
            if isinstance(arg, Tensor):
                aligned |= arg.data_ptr()
                key.append(arg.dtype)
            else:
                key.append(type(arg))
        device = torch.cuda.current_device() if not _INTERPRETED else 0
        key.append(device)
        variant = self._variants.get(tuple(key)) if not aligned & 15 else None
        if variant is not None:
            _run(variant, grid, device, args, constants)
            return
        options = {"num_warps": num_warps, "num_stages": num_stages}
        if pdl:
            options["launch_pdl"] = True
        if max_registers:
            options["maxnreg"] = max_registers
        if cluster > 1:
            compiled = self._function.warmup(*args, *constants, grid=grid, **options)
            if compiled is not None:
                num_warps, _, shared_bytes = compiled.packed_metadata
                compiled.packed_metadata = (num_warps, cluster, shared_bytes)
                _run(compiled, grid, device, args, constants)
        else:
            compiled = self._function[grid](*args, *constants, **options)
        if compiled is not None and _KNOWN_RELEASE and not aligned & 15:
            self._variants[tuple(key)] = compiled
