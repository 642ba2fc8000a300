"""kubeinfer: LLM serving for Kubernetes with an inference engine of its own.

The names below load on first use, so that the weights puller and the operator can import this package
without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kubeinfer.llm import LLM
    from kubeinfer.outputs import CompletionOutput, RequestOutput
    from kubeinfer.sampling_params import SamplingParams

_LAZY = {
    "LLM": "kubeinfer.llm",
    "SamplingParams": "kubeinfer.sampling_params",
    "RequestOutput": "kubeinfer.outputs",
    "CompletionOutput": "kubeinfer.outputs",
}

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kubeinfer' has no attribute {name!r}")
