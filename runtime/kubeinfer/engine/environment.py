"""Settings that must be in the environment before torch is loaded."""

from __future__ import annotations

import os
import sys


def thread_environment() -> dict[str, str]:
    """Settings of the OpenMP runtime.

    By default its threads spin for milliseconds at each barrier, which stops all progress where cores are shared with
    other processes or a pod has a CPU limit. A short spin still bridges the gaps between a step's kernels.
    """
    return {"GOMP_SPINCOUNT": "1000"}


def prepare_this_process() -> None:
    """Set them here, unless the user has, or torch is loaded and it is too late."""
    if "torch" not in sys.modules:
        for name, value in thread_environment().items():
            os.environ.setdefault(name, value)
