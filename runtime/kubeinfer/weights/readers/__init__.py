"""Reads checkpoints: safetensors, PyTorch and GGUF files, as a stream of (Hugging Face name, CPU tensor).

Importing this package loads no torch; iterating does. :func:`gguf_config` and :func:`checkpoint_size` never do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kubeinfer.weights.readers.files import Checkpoint, find_checkpoint
from kubeinfer.weights.readers.gguf_file import GGUFFile, read_gguf

if TYPE_CHECKING:
    import torch

    from kubeinfer.weights.readers.gguf_tensors import RawTensor

__all__ = [
    "Checkpoint",
    "GGUFFile",
    "checkpoint_size",
    "find_checkpoint",
    "gguf_config",
    "iterate_gguf_raw",
    "iterate_tensors",
    "read_gguf",
]


def iterate_tensors(
    path: Path,
    load_format: str = "auto",
    wanted: Callable[[str], bool] | None = None,
    dtype: torch.dtype | None = None,
    as_stored: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream (Hugging Face name, CPU tensor) from the model folder or weight file ``path``.

    Tensors come one at a time and usually lie in a memory map of the file, so that peak memory stays at about one
    tensor: copy what you keep, and do not write into them. ``wanted`` is asked with each name first; what it turns
    down is not read. ``dtype`` converts floating-point tensors on the way (GGUF's quantized ones straight to it);
    None leaves them as stored, and gives quantized ones as float32. GGUF's of which ``as_stored`` is true come as blocks
    instead, uint8 [rows, bytes of a row].

    Raises :class:`~kubeinfer.errors.ModelLoadError` naming the file that is missing, truncated or not readable.
    """
    checkpoint = find_checkpoint(Path(path), load_format)
    if checkpoint.format == "gguf":
        from kubeinfer.weights.readers.gguf_tensors import iterate_gguf

        yield from iterate_gguf(checkpoint.files[0], wanted, dtype, as_stored)
        return
    from kubeinfer.weights.readers.hf_tensors import iterate_pt, iterate_safetensors

    read = iterate_safetensors if checkpoint.format == "safetensors" else iterate_pt
    for name, tensor in read(checkpoint, wanted):
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def checkpoint_size(path: Path, load_format: str = "auto") -> int:
    """Bytes of the weight files of the model folder or weight file ``path``."""
    return find_checkpoint(Path(path), load_format).nbytes


def gguf_config(path: Path) -> dict[str, Any]:
    """config.json, in Hugging Face's names, of the GGUF file (or of the folder with one) ``path``."""
    from kubeinfer.weights.readers import gguf_hf

    return gguf_hf.gguf_config(find_checkpoint(Path(path), "gguf").files[0])


def iterate_gguf_raw(path: Path, wanted: Callable[[str], bool] | None = None) -> Iterator[RawTensor]:
    """Each tensor of the GGUF file ``path`` as it is stored, for kernels that compute on quantized blocks."""
    from kubeinfer.weights.readers import gguf_tensors

    yield from gguf_tensors.iterate_gguf_raw(find_checkpoint(Path(path), "gguf").files[0], wanted)
