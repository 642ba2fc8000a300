"""Several int32 arrays in one buffer, so that a step's inputs take one transfer to the device.

Each array begins at a multiple of 128 bytes: compiled kernels are specialised on the alignment of their pointers, and
fields packed tightly would have every step compile its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_ALIGN = 32  # int32 values


class Packing:
    """Where each named array of a fixed length lies in the buffer."""

    def __init__(self, lengths: Mapping[str, int]):
        self.places: dict[str, tuple[int, int]] = {}
        offset = 0
        for name, length in lengths.items():
            self.places[name] = (offset, length)
            offset += -(-length // _ALIGN) * _ALIGN
        self.size = max(offset, 1)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The arrays within ``buffer`` (int32 ``[size]``)."""
        return {name: buffer[start : start + length] for name, (start, length) in self.places.items()}

    def host_views(self, buffer: NDArray[np.int32]) -> dict[str, NDArray[np.int32]]:
        return {name: buffer[start : start + length] for name, (start, length) in self.places.items()}


def pack(arrays: Mapping[str, NDArray[np.int32]]) -> tuple[NDArray[np.int32], Packing]:
    """``arrays`` in one buffer, zeros between them."""
    packing = Packing({name: len(array) for name, array in arrays.items()})
    buffer = np.zeros(packing.size, np.int32)
    for name, view in packing.host_views(buffer).items():
        view[:] = arrays[name]
    return buffer, packing
