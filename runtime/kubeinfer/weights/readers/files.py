"""Which files of a model folder hold the weights, and whether they are all there and whole (no torch)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubeinfer.errors import ModelLoadError
from kubeinfer.weights.readers.gguf_file import split_files

_LFS_POINTER = b"version https://git-lfs"
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")
# Files with a weight's suffix that training leaves behind.
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "random_states", "scaler", "rng_state")
_LOAD_FORMATS = ("auto", "safetensors", "pt", "gguf")


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a model. ``weight_map`` (tensor name -> file) is empty where there is no index."""

    path: Path
    format: str
    """safetensors, pt or gguf"""
    files: tuple[Path, ...]
    weight_map: dict[str, Path] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def find_checkpoint(path: Path, load_format: str = "auto") -> Checkpoint:
    """The weight files under ``path``: a model folder, or one weight file.

    ``auto`` takes safetensors where there are any, then PyTorch files, then GGUF, as hubs keep several formats of one
    model side by side. Raises :class:`ModelLoadError` where files are missing, empty or git-lfs pointers, and where
    it is not clear which file is meant.
    """
    if load_format not in _LOAD_FORMATS:
        raise ModelLoadError(f"load_format {load_format!r} reads no files; {', '.join(_LOAD_FORMATS)} do.")
    if not path.exists():
        raise ModelLoadError(f"There is no model at {path}.")
    found = _single(path, load_format) if path.is_file() else _folder(path, load_format)
    for file in found.files:
        _check_file(file)
    return found


def _single(path: Path, load_format: str) -> Checkpoint:
    if path.suffix == ".gguf":
        kind, files = "gguf", tuple(split_files(path))
    elif path.suffix == ".safetensors":
        kind, files = "safetensors", (path,)
    elif path.suffix in (".bin", ".pt", ".pth"):
        kind, files = "pt", (path,)
    else:
        raise ModelLoadError(f"{path} is neither a model folder nor a .gguf, .safetensors, .bin or .pt file.")
    if load_format not in ("auto", kind):
        raise ModelLoadError(
            f"{path} is not of load_format {load_format!r}; leave load_format out, or set {kind!r}."
        )
    return Checkpoint(path, kind, files)


def _folder(path: Path, load_format: str) -> Checkpoint:
    finders = {"safetensors": _find_safetensors, "pt": _find_pt, "gguf": _find_gguf}
    for kind, find in finders.items():
        if load_format in ("auto", kind):
            found = find(path)
            if found is not None:
                return found
    others = [kind for kind, find in finders.items() if load_format not in ("auto", kind) and find(path)]
    wanted = "safetensors, .bin or .gguf" if load_format == "auto" else load_format
    hint = f"it holds {others[0]} weights: leave load_format out" if others else "download the model again"
    raise ModelLoadError(f"The folder {path} holds no {wanted} weights; {hint}.")


def _find_safetensors(path: Path) -> Checkpoint | None:
    return _indexed_or_plain(path, "safetensors", "model", ".safetensors", "consolidated")


def _find_pt(path: Path) -> Checkpoint | None:
    found = _indexed_or_plain(path, "pt", "pytorch_model", ".bin", "consolidated")
    if found is not None:
        return found
    files = sorted(
        file for suffix in (".pt", ".pth") for file in path.glob(f"*{suffix}") if _is_weights(file)
    )
    return Checkpoint(path, "pt", tuple(files)) if files else None


def _indexed_or_plain(path: Path, kind: str, stem: str, suffix: str, original: str) -> Checkpoint | None:
    single = path / f"{stem}{suffix}"
    if single.is_file():
        return Checkpoint(path, kind, (single,))
    index = path / f"{stem}{suffix}.index.json"
    if index.is_file():
        weight_map = _read_index(index)
        return Checkpoint(path, kind, tuple(sorted(set(weight_map.values()))), weight_map)
    files = sorted(file for file in path.glob(f"*{suffix}") if _is_weights(file))
    # A publisher's own layout of the same weights, beside the one that transformers reads.
    files = [file for file in files if not file.name.startswith(original)] or files
    if not files:
        return None
    _check_numbering(files)
    return Checkpoint(path, kind, tuple(files))


def _is_weights(file: Path) -> bool:
    return not file.name.startswith(_NOT_WEIGHTS)


def _read_index(index: Path) -> dict[str, Path]:
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelLoadError(f"{index} is not an index of weights ({exc!r}): download it again.") from None
    for file in sorted(set(names.values())):
        if Path(file).name != file:
            raise ModelLoadError(f"{index} names {file!r}, which is not a file beside it.")
        if not (index.parent / file).is_file():
            raise ModelLoadError(
                f"{index.parent / file} is missing: {index.name} names it. Download the model again."
            )
    return {name: index.parent / file for name, file in names.items()}


def _check_numbering(files: list[Path]) -> None:
    """Files named -0000i-of-0000n must all be there."""
    for file in files:
        match = _SHARD.match(file.name)
        if match is None:
            continue
        for number in range(1, int(match["count"]) + 1):
            shard = file.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}{match['suffix']}")
            if not shard.is_file():
                raise ModelLoadError(f"{shard} is missing, and all {int(match['count'])} parts are needed.")


def _find_gguf(path: Path) -> Checkpoint | None:
    files = sorted(path.glob("*.gguf"))
    if not files:
        return None
    first = split_files(files[0])
    others = [file.name for file in files if file not in first]
    if others:
        raise ModelLoadError(
            f"The folder {path} holds several GGUF models ({files[0].name}, {others[0]}, ...): "
            "give the path of the file to load."
        )
    return Checkpoint(path, "gguf", tuple(first))


def _check_file(file: Path) -> None:
    with file.open("rb") as handle:
        head = handle.read(64)
    if not head:
        raise ModelLoadError(f"{file} is empty: download it again.")
    if head.startswith(_LFS_POINTER):
        raise ModelLoadError(
            f"{file} is a git-lfs pointer, not the weights: run `git lfs pull` in {file.parent}, or download it again."
        )
