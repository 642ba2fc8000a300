"""Device memory that the other processes of a host can read and write: CUDA's interprocess handles, through the driver.

torch's symmetric memory would do the same, but counts its exchanges a process: a second group in a process that had one before
waits for ranks that count from zero.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

HANDLE_BYTES = 64
_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("data", ctypes.c_char * HANDLE_BYTES),)


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemAlloc_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t]
    driver.cuMemFree_v2.argtypes = [ctypes.c_uint64]
    driver.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_Handle), ctypes.c_uint64]
    driver.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint]
    driver.cuIpcCloseMemHandle.argtypes = [ctypes.c_uint64]
    driver.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return driver


def _call(name: str, *args: Any) -> None:
    status = getattr(_driver(), name)(*args)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


class SharedMemory:
    """``num_bytes`` of each rank's device, zero at first, and where all ranks' parts are in this process.

    ``exchange`` gives every rank's bytes for this rank's, in the order of ranks; all ranks call it together, and no rank
    comes out of it before all have come. Raises RuntimeError or OSError where GPUs cannot reach each other's memory.

    Attributes:
        part: this rank's, uint8.
        addresses: of all ranks' parts, this rank's among them.
    """

    def __init__(
        self, num_bytes: int, rank: int, device: torch.device, exchange: Callable[[bytes], list[bytes]]
    ):
        torch.cuda.synchronize(device)  # its context is there, and current
        address = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(address), num_bytes)
        self._own: int | None = address.value
        self._opened: list[int] = []
        self.__cuda_array_interface__ = {
            "data": (self._own, False), "shape": (num_bytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip
        try:
            self.part: Tensor = torch.as_tensor(self, device=device)
            self.part.zero_()
            torch.cuda.synchronize(device)
            own = _Handle()
            _call("cuIpcGetMemHandle", ctypes.byref(own), self._own)
            handles = exchange(bytes(own))
            self.addresses = [
                address.value if peer == rank else self._open(handle) for peer, handle in enumerate(handles)
            ]
        except BaseException:
            self.close()
            raise

    def _open(self, handle: bytes) -> int:
        address = ctypes.c_uint64()
        _call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            _Handle.from_buffer_copy(handle),
            _ENABLE_PEER_ACCESS,
        )
        self._opened.append(address.value)
        return address.value

    def close(self) -> None:
        """Give it back, once no rank uses this rank's part any more."""
        with suppress(RuntimeError):  # a device in error takes nothing back before its process ends
            while self._opened:
                _call("cuIpcCloseMemHandle", self._opened.pop())
            if self._own is not None:
                _call("cuMemFree_v2", self._own)
        self._own = None
