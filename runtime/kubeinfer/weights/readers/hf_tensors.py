"""Tensors of safetensors and PyTorch checkpoint files, one at a time, from memory maps."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kubeinfer.errors import ModelLoadError
from kubeinfer.weights.readers.files import Checkpoint

Wanted = Callable[[str], bool]


def iterate_safetensors(checkpoint: Checkpoint, wanted: Wanted | None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each tensor; tensors lie in the file's memory map."""
    from safetensors import SafetensorError, safe_open

    check = _OnceEach(checkpoint)
    for path in checkpoint.files:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                check.shard(path, names)
                for name in names:
                    if check.take(path, name) and (wanted is None or wanted(name)):
                        yield name, file.get_tensor(name)
        except SafetensorError as exc:
            raise ModelLoadError(
                f"{path} is truncated or not a safetensors file ({exc}): download it again."
            ) from None


def iterate_pt(checkpoint: Checkpoint, wanted: Wanted | None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each tensor of PyTorch files, loaded with ``weights_only`` (no code in them is run)."""
    check = _OnceEach(checkpoint)
    for path in checkpoint.files:
        state = _load_pt(path)
        check.shard(path, list(state))
        for name in list(state):
            tensor = state.pop(name)
            if (
                isinstance(tensor, torch.Tensor)
                and check.take(path, name)
                and (wanted is None or wanted(name))
            ):
                yield name, tensor


def _load_pt(path: Path) -> dict[str, Any]:
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as exc:
            if "mmap can only be used" not in str(exc):
                raise
            # the format from before PyTorch 1.6 is a stream, and cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        raise ModelLoadError(
            f"{path} cannot be read as plain weights: it is damaged, or holds Python objects that would run code on "
            f"loading. Download it again, or take a safetensors version of the model. ({_first_line(exc)})"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as exc:
        raise ModelLoadError(
            f"{path} is truncated or not a PyTorch file ({_first_line(exc)}): download it again."
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ModelLoadError(f"{path} holds a {type(state).__name__}, not a dictionary of weights.")
    return state


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


class _OnceEach:
    """Sees to it that each tensor comes once, from the file that the index names, and that none of the index is missing."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._map = checkpoint.weight_map
        self._seen: dict[str, Path] = {}
        self._expected: dict[Path, list[str]] = {}
        for name, path in self._map.items():
            self._expected.setdefault(path, []).append(name)

    def shard(self, path: Path, names: list[str]) -> None:
        """Raise where the index names a tensor of ``path`` that is not among its ``names``."""
        held = set(names)
        missing = [name for name in self._expected.get(path, ()) if name not in held]
        if missing:
            raise ModelLoadError(
                f"{path} lacks the tensor {missing[0]!r} ({len(missing)} in all) that the index says it holds: "
                "the shards and the index are not of one version. Download the model again."
            )

    def take(self, path: Path, name: str) -> bool:
        """Whether ``name`` is to be taken from ``path``."""
        if name in self._map:
            return self._map[name] == path
        if name in self._seen:
            raise ModelLoadError(
                f"Tensor {name!r} is in both {self._seen[name]} and {path}: the folder mixes two models. "
                "Keep the files of one."
            )
        self._seen[name] = path
        return True
