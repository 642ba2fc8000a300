"""The seam between a hub and the downloader: what a model consists of and how its files are requested."""

from __future__ import annotations

import abc
import email.utils
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubeinfer.weights.uri import ModelSource


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a model: POSIX ``path`` in it, ``size`` in bytes and the hash that the hub lists, if any.

    ``git_sha1`` is git's blob id, SHA-1 over ``b"blob SIZE\\0"`` and the content.
    """

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def key(self) -> str | None:
        """The strongest hash listed; equal keys are equal bytes."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model at one commit: what was asked for, the commit and all of its files."""

    source: ModelSource
    revision: str
    files: tuple[RemoteFile, ...]
    endpoint: str = ""

    def __str__(self) -> str:
        return f"{self.source.repo_uri}@{self.revision}"


@dataclass(frozen=True, slots=True)
class FileRequest:
    """How one file is asked for over HTTP."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)


class WeightSource(abc.ABC):
    """A place that holds models. One object serves one ``ModelSource``; methods block and may be called by
    several threads after ``resolve``.

    ``token`` and ``endpoint`` given here win over the environment, which is read when the object is made.
    """

    def __init__(self, model: ModelSource, *, token: str | None = None, endpoint: str | None = None) -> None:
        self.model = model
        self.token = token
        self.endpoint = endpoint or ""

    @abc.abstractmethod
    def resolve(self) -> ResolvedModel:
        """Turn branch or tag into a commit and list the files. Raises a ``WeightsError``."""

    @abc.abstractmethod
    def request_for(self, resolved: ResolvedModel, file: RemoteFile) -> FileRequest:
        """URL and headers of one file."""

    @abc.abstractmethod
    def cache_dir(self) -> Path:
        """The folder of the SDK's own cache, as the environment says now."""

    @abc.abstractmethod
    def cached_snapshots(self, cache_dir: Path) -> list[Path]:
        """Snapshots of this model (at its revision, if it names one) in the cache, the best first."""


def retry_after(value: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header, which has seconds or a date."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, when.timestamp() - time.time())


def home() -> Path:
    """The home folder; a container's user without one gets the folder for temporary files."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())


def root_cause(error: BaseException) -> str:
    """The reason at the bottom of a chain of exceptions, in a few words and without URLs (which may be signed)."""
    seen: set[int] = set()
    current: BaseException | None = error
    innermost = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        innermost = current
        inner = next(
            (a for a in (getattr(current, "reason", None), *current.args) if isinstance(a, Exception)), None
        )
        current = inner or current.__cause__ or current.__context__
    text = innermost.strerror if isinstance(innermost, OSError) else None
    first = (str(text or innermost).splitlines() or [""])[0]
    return first[:160] or type(innermost).__name__


def checkpoint_gaps(names: Iterable[str], read_json: Any) -> list[str]:
    """Shards that an index file of ``names`` promises and ``names`` lacks.

    ``read_json(name)`` gives the parsed index.
    """
    present = set(names)
    gaps: list[str] = []
    for name in sorted(present):
        if name.endswith((".safetensors.index.json", ".bin.index.json")):
            try:
                shards = set(read_json(name)["weight_map"].values())
            except (OSError, json.JSONDecodeError, KeyError, AttributeError, TypeError):
                gaps.append(name)
                continue
            folder = name.rpartition("/")[0]
            wanted = {f"{folder}/{shard}" if folder else shard for shard in shards}
            if wanted - present and _other_format_complete(name, present):
                continue
            gaps += sorted(wanted - present)
    return gaps


def _other_format_complete(index: str, present: set[str]) -> bool:
    """A ``.bin`` index without its shards is no gap where safetensors are there instead."""
    return index.endswith(".bin.index.json") and any(n.endswith(".safetensors") for n in present)
