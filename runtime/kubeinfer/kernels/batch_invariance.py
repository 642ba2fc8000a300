"""Whether a token's numbers must not depend on what is computed beside it.

Floating-point sums depend on their order, and fast kernels choose it by the batch: tiles, splits, who reduces with whom.
Under batch invariance each dispatcher of this package keeps to one order for any batch, at the price of speed (He et al.
2025, "Defeating Nondeterminism in LLM Inference"). A worker says which it wants before each of its steps.
"""

from __future__ import annotations

_enabled = False


def batch_invariant() -> bool:
    """Whether the step that runs now asks for it."""
    return _enabled


def use_batch_invariance(enabled: bool) -> None:
    """For all that this process computes from now on."""
    global _enabled
    _enabled = enabled
