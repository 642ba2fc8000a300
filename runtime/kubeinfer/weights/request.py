"""What to fetch, and what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kubeinfer.weights.errors import InvalidModelId
from kubeinfer.weights.selection import select
from kubeinfer.weights.sources import RemoteFile, ResolvedModel
from kubeinfer.weights.transfer import TransferOptions
from kubeinfer.weights.uri import ModelSource, parse


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """What to fetch, and to where. ``local_dir`` is filled as a plain folder; without it the files go to the
    cache of the hub's SDK (``cache_dir``, or where the environment has it)."""

    models: tuple[ModelSource, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    local_dir: Path | None = None
    cache_dir: Path | None = None
    token: str | None = None
    weights: bool = True
    max_workers: int = 4
    transfer: TransferOptions = field(default_factory=TransferOptions)

    def selection(self, model: ModelSource) -> str:
        """A name for the choice of files: equal for equal choices from one listing."""
        return json.dumps([self.include, self.exclude, model.file, self.weights])

    def files_of(self, resolved: ResolvedModel) -> list[RemoteFile]:
        """The files of a listing that are asked for."""
        return select(
            resolved.files,
            include=self.include,
            exclude=self.exclude,
            file=resolved.source.file,
            weights=self.weights,
            model=resolved.source.repo_uri,
        )


@dataclass(frozen=True, slots=True)
class FetchResult:
    """``path`` is what the engine loads (the folder, or the GGUF file in it)."""

    path: Path
    folder: Path
    source: str
    revision: str
    files: tuple[RemoteFile, ...]
    bytes_total: int
    bytes_received: int = 0
    seconds: float = 0.0
    offline: bool = False


def make_request(
    model: str | ModelSource,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    local_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    mirrors: Sequence[str] = (),
    token: str | None = None,
    weights: bool = True,
    max_workers: int = 4,
    stall_timeout: float | None = None,
) -> FetchRequest:
    """Check and gather the arguments of ``fetch``. Raises ``InvalidModelId``."""
    first = parse(model) if isinstance(model, str) else model
    models = (first.with_revision(revision), *(parse(m) for m in mirrors))
    if max_workers < 1:
        raise ValueError(f"max_workers is {max_workers}; at least 1 is needed")
    if stall_timeout is None:
        stall_timeout = _stall_timeout_from_env()
    return FetchRequest(
        models=models,
        include=tuple(include),
        exclude=tuple(exclude),
        local_dir=Path(local_dir).expanduser() if local_dir is not None else None,
        cache_dir=Path(cache_dir).expanduser() if cache_dir is not None else None,
        token=token,
        weights=weights,
        max_workers=max_workers,
        transfer=TransferOptions(stall_timeout=stall_timeout),
    )


def engine_path(folder: Path, files: Sequence[RemoteFile], file: str | None = None) -> Path:
    """The GGUF file (its first shard) where that is what was fetched, else the folder."""
    if file is not None:
        return folder / file
    names = [f.path for f in files]
    ggufs = sorted(n for n in names if n.lower().endswith(".gguf"))
    if ggufs and not any(n.endswith((".safetensors", ".bin", ".pt", ".pth")) for n in names):
        return folder / ggufs[0]
    return folder


def _stall_timeout_from_env() -> float:
    text = os.environ.get("KUBEINFER_STALL_TIMEOUT", "30")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise InvalidModelId(f"KUBEINFER_STALL_TIMEOUT is {text!r}: give seconds above 0")
    return seconds
