"""Host memory that a GPU copies from and to at full speed: page-locked in the background, chunk by chunk."""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_CHUNK_BYTES = 256 * 2**20  # page-locked at once: some 50 to 100 ms


def host_memory(num_bytes: int) -> Tensor:
    """uint8 ``[num_bytes]`` of the host, page-aligned, untouched, in huge pages where the system has them."""
    memory = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without transparent huge pages: page-locking takes longer, nothing else
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes)


def page_lock(memory: Tensor) -> bool:
    """Lock ``memory``'s pages for copies to and from a GPU. False where the driver refuses (a limit on locked memory)."""
    # Not torch's own pinned memory: its allocator rounds up to a power of two, tens of GiB at these sizes.
    num_bytes = memory.numel() * memory.element_size()
    try:
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0)
    except RuntimeError:
        return False
    return int(error) == 0


def page_unlock(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def copy_async(into: Tensor, source: Tensor) -> None:
    """Copy between page-locked host memory and the device on the current stream; the host does not wait."""
    into.copy_(source, non_blocking=True)


class HostPool:
    """``num_blocks`` rows of ``block_bytes`` each, in chunks.

    Locking pages takes about a second for a few GiB, so a thread does it while the engine already serves. Blocks are
    first used in their order, so it stays ahead; a copy that overtakes it waits for its chunk.
    """

    def __init__(self, num_blocks: int, block_bytes: int, device: torch.device):
        self.num_blocks = num_blocks
        self._device = device
        self._per_chunk = max(1, min(num_blocks, _CHUNK_BYTES // block_bytes))
        self._chunks = [
            host_memory(min(self._per_chunk, num_blocks - first) * block_bytes).view(-1, block_bytes)
            for first in range(0, num_blocks, self._per_chunk)
        ]
        self._ready = [threading.Event() for _ in self._chunks]
        self._locked: list[Tensor] = []
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to lock pages. Not while CUDA graphs are captured: the driver forbids it then."""
        if self._device.type != "cuda":
            for ready in self._ready:
                ready.set()
            return
        self._thread = threading.Thread(target=self._lock_all, name="kubeinfer-host-pool", daemon=True)
        self._thread.start()

    def _lock_all(self) -> None:
        torch.cuda.set_device(self._device)
        warned = False
        for chunk, ready in zip(self._chunks, self._ready):
            if self._closing:
                return
            if page_lock(chunk):
                self._locked.append(chunk)
            elif not warned:
                warned = True
                logger.warning(
                    "host memory for swap_space could not be page-locked (see ulimit -l): copies to and from it are slow"
                )
            ready.set()

    def runs(self, blocks: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """``blocks`` (ascending) as slices of memory: index of the first of them, and its rows ``[n, block_bytes]``."""
        first = 0
        while first < len(blocks):
            chunk, row = divmod(blocks[first], self._per_chunk)
            end = first + 1
            while (
                end < len(blocks)
                and blocks[end] == blocks[end - 1] + 1
                and row + end - first < len(self._chunks[chunk])
            ):
                end += 1
            self._ready[chunk].wait()
            yield first, self._chunks[chunk][row : row + end - first]
            first = end

    def close(self) -> None:
        """Unlock and let go. No copy may be under way."""
        self._closing = True
        if self._thread is not None:
            self._thread.join()
            for chunk in self._locked:
                page_unlock(chunk)
        self._chunks.clear()
