# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What the current GPU allows in the launch of a kernel."""

from __future__ import annotations

import functools
import os

import torch


@functools.cache
def _hopper() -> bool:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def overlaps_launches() -> bool:
    """Programmatic dependent launch: a kernel's programs get in place while the one before it finishes.

    Each kernel launched so calls ``gdc_wait`` before it touches memory, in every program: what follows it may rely on
    all that came before.
    """
    return _hopper()


def has_tensor_memory_accelerator() -> bool:
    """Tensor descriptors are fetched by the copy engine."""
    return _hopper()
