"""Our CPU kernels in C, if they were built and this processor has the instructions they need.

The C files here are compiled when the package is installed, once for AVX512-BF16 and once for AVX2; the processor's flags choose
between the two. They share torch's thread pool: their OpenMP symbols bind to the runtime that torch has loaded. Without a library,
or on a processor with neither, every operation is torch's.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ki_pack_linear": (None, [_P, _I, _I, _P]),
    "ki_linear": (None, [_P, _I, _P, _P, _P, _I, _I, _I, _I]),
    "ki_logits": (None, [_P, _P, _P, _I, _I, _I]),
    "ki_rms_norm": (None, [_P, _I, _P, _P, _P, _I, _I, _F]),
    "ki_silu_and_mul": (None, [_P, _P, _I, _I]),
    "ki_rope_and_cache": (None, [_P, _P, _P, _I, _P, _P, _I, _P, _P, _I, _I, _P, _P, _F, _I, _I, _I, _I]),
    "ki_attention": (ctypes.c_int, [_P, _I, _P, _I, _I, _P, _P, _P, _I, _P, _I, _I, _I, _I, _F, _I]),
    "ki_argmax": (None, [_P, _I, _I, _I, _P]),
    "ki_decoder_scratch": (_I, [_P, _I]),
    "ki_decoder": (ctypes.c_int, [_P, _P, _P, _P, _P, _P]),
}
# The variants, best first: the library's name and the processor flags it needs.
_VARIANTS = {
    "avx512": ("_kernels", {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma"}),
    "avx2": ("_kernels_avx2", {"avx2", "fma"}),
}
PANEL = 32  # outputs of a packed panel
MAX_HEAD_DIM = 256


def _processor_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def variants() -> list[str]:
    """The variants that this processor can run, best first, of those that ``KUBEINFER_CPU_KERNELS`` leaves."""
    wanted = os.environ.get("KUBEINFER_CPU_KERNELS", "1")
    if wanted == "0":
        return []
    flags = _processor_flags()
    able = [variant for variant, (_, needed) in _VARIANTS.items() if flags >= needed]
    return [variant for variant in able if variant == wanted] if wanted in _VARIANTS else able


@cache
def load(variant: str) -> Any:
    """A variant's library, or None with a warning that says why."""
    paths = sorted(Path(__file__).parent.glob(f"{_VARIANTS[variant][0]}.*so"))
    if not paths:
        logger.warning(
            "the CPU kernels for %s were not built (no C compiler at install time?): slower ones are used",
            variant,
        )
        return None
    try:
        loaded = ctypes.CDLL(str(paths[0]))
    except OSError as exc:
        logger.warning("the CPU kernels for %s cannot be loaded (%s): slower ones are used", variant, exc)
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


@cache
def library() -> Any:
    """The best variant's library, or None. ``KUBEINFER_CPU_KERNELS=0`` keeps to torch, ``avx2`` to that variant."""
    return next((loaded for loaded in map(load, variants()) if loaded is not None), None)


def usable(*tensors: Tensor | None) -> bool:
    """Whether the library serves these tensors: all bfloat16 on the CPU."""
    return library() is not None and all(t is None or t.dtype == torch.bfloat16 for t in tensors)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _HugePages:
    """Memory for packed weights in pages of 2 MiB where the system grants them: a step reads every weight once, and with
    small pages it would spend a tenth of its time on finding them."""

    _CHUNK = 32 * 2**20
    _PAGE = 2 * 2**20
    _MADV_HUGEPAGE = 14

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.bfloat16)

    def empty(self, count: int) -> Tensor:
        """An uninitialised bfloat16 tensor of ``count`` elements, aligned to a cache line."""
        count_aligned = -(-count // 32) * 32
        if self._left.numel() < count_aligned:
            size = max(self._CHUNK, -(-count_aligned * 2 // self._PAGE) * self._PAGE)
            buffer = torch.empty((size + self._PAGE) // 2, dtype=torch.bfloat16)
            skip = -buffer.data_ptr() % self._PAGE
            self._left = buffer[skip // 2 : (skip + size) // 2]
            # Refused where the kernel has no huge pages: small ones do as well, only slower.
            ctypes.CDLL(None).madvise(_P(self._left.data_ptr()), ctypes.c_size_t(size), self._MADV_HUGEPAGE)
        taken, self._left = self._left[:count], self._left[count_aligned:]
        return taken


_weights_memory = _HugePages()


def pack_linear(weight: Tensor) -> Tensor | None:
    """``weight [N, K]`` in panels of 32 outputs, or None where the kernel does not serve it."""
    if not usable(weight) or weight.shape[1] % 2 or not weight.is_contiguous():
        return None
    out_features, in_features = weight.shape
    panels = -(-out_features // PANEL)
    packed = _weights_memory.empty(panels * PANEL * in_features)
    library().ki_pack_linear(weight.data_ptr(), out_features, in_features, packed.data_ptr())
    return packed


def linear(x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
    """``x [T, K]`` (rows contiguous) times a packed weight, plus ``bias``: bfloat16 ``[T, N]``."""
    rows, in_features = x.shape
    out = torch.empty(rows, out_features, dtype=torch.bfloat16)
    library().ki_linear(
        x.data_ptr(), x.stride(0), packed.data_ptr(), _address(bias), out.data_ptr(), out_features, rows,
        out_features, in_features,
    )  # fmt: skip
    return out


def logits(hidden: Tensor, packed: Tensor, vocab_size: int) -> Tensor:
    """``hidden [N, H]`` (contiguous) times a packed weight: fp32 ``[N, vocab_size]``."""
    rows, in_features = hidden.shape
    out = torch.empty(rows, vocab_size, dtype=torch.float32)
    library().ki_logits(hidden.data_ptr(), packed.data_ptr(), out.data_ptr(), rows, vocab_size, in_features)
    return out


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """``norm(x + residual) * weight``; ``residual`` becomes the sum. ``x [T, H]``."""
    rows, size = x.shape
    out = torch.empty(rows, size, dtype=torch.bfloat16)
    library().ki_rms_norm(
        x.data_ptr(), x.stride(0), _address(residual), weight.data_ptr(), out.data_ptr(), rows, size, eps
    )
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    """``x [T, 2I]`` -> ``[T, I]``."""
    rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, size, dtype=torch.bfloat16)
    library().ki_silu_and_mul(x.data_ptr(), out.data_ptr(), rows, size)
    return out


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> bool:
    """As `kubeinfer.kernels.rope.rope_and_cache`, but ``k`` is rotated in place too; False where it does not serve."""
    if not usable(q, k, v, kv_cache) or positions.dtype != torch.int32 or slot_mapping.dtype != torch.int32:
        return False
    if not q.stride(0) == k.stride(0) == v.stride(0) or q.stride(1) != q.shape[2]:
        return False
    tokens, num_heads, head_dim = q.shape
    rotary_dim = 0 if cos_sin is None else cos_sin.shape[1]
    library().ki_rope_and_cache(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), positions.data_ptr(), _address(cos_sin), rotary_dim,
        slot_mapping.data_ptr(), kv_cache.data_ptr(), kv_cache.shape[1], kv_cache.shape[3],
        _address(q_norm_weight), _address(k_norm_weight), eps, tokens, num_heads, k.shape[1], head_dim,
    )  # fmt: skip
    return True


def attention(
    q: Tensor,
    kv_cache: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    scale: float,
    sliding_window: int,
) -> bool:
    """As `kubeinfer.kernels.attention.paged_attention`; False where it does not serve."""
    head_dim = q.shape[2]
    if not usable(q, kv_cache, out) or head_dim % 2 or head_dim > MAX_HEAD_DIM:
        return False
    num_heads, num_kv_heads = q.shape[1], kv_cache.shape[2]
    failed = library().ki_attention(
        q.data_ptr(), q.stride(0), kv_cache.data_ptr(), kv_cache.shape[1], kv_cache.shape[3], query_start.data_ptr(),
        seq_lens.data_ptr(), block_table.data_ptr(), block_table.stride(0), out.data_ptr(), seq_lens.shape[0],
        num_heads, num_kv_heads, head_dim, scale, sliding_window,
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the attention kernel's scratch space")
    return True


def argmax(logits: Tensor) -> Tensor:
    """Index of the first largest entry of each row of fp32 ``logits [B, V]``: int64 ``[B]``."""
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    library().ki_argmax(logits.data_ptr(), logits.stride(0), logits.shape[0], logits.shape[1], out.data_ptr())
    return out
