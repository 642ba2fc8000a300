"""The ``device`` fixture: every test runs the references on the CPU, and the Triton kernels where there is a GPU.

With ``TRITON_INTERPRET=1`` the kernels run in Triton's interpreter on CPU tensors instead (slow, for development).

The references beside the tests are imported by name: transformers has an optional dependency called ``kernels``, which
would hide this folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kubeinfer.kernels.cpu import library as cpu

sys.path.insert(0, str(Path(__file__).parent))

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU (make test-gpu)")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """``cpu`` (references) or ``cuda`` (Triton kernels)."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        if not INTERPRET:
            pytest.skip("no CUDA GPU")
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        return "cpu"
    return name


@pytest.fixture(params=[variant for variant in cpu.variants() if cpu.load(variant) is not None])
def cpu_variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each variant of the C kernels that runs on this processor, in turn; skipped where there is none."""
    monkeypatch.setenv("KUBEINFER_CPU_KERNELS", request.param)
    cpu.library.cache_clear()
    yield request.param
    cpu.library.cache_clear()
