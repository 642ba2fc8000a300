"""Fetch a model's files: one verified, resumable download, published atomically, shared by all who ask."""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from kubeinfer.weights.delivery import Delivery
from kubeinfer.weights.errors import (
    HubUnavailable,
    InvalidModelId,
    NetworkUnreachable,
    StorageError,
    TooManyRequests,
    WeightsError,
)
from kubeinfer.weights.layout import FolderLayout, HubCacheLayout, Layout, Manifest, file_matches
from kubeinfer.weights.locate import local_path, manifest_of, offline_folder
from kubeinfer.weights.progress import ProgressCallback, ProgressEvent, ignore_progress
from kubeinfer.weights.request import FetchRequest, FetchResult, engine_path, make_request
from kubeinfer.weights.sources import RemoteFile, ResolvedModel, WeightSource, open_source
from kubeinfer.weights.sources.huggingface import repo_folder
from kubeinfer.weights.uri import ModelSource

T = TypeVar("T")

logger = logging.getLogger(__name__)

_OFFLINE_HELPS = (NetworkUnreachable, HubUnavailable, TooManyRequests)
# Seconds that a hub has to answer when a copy is here.
PATIENCE = 6.0
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_SMALL = 8 << 20  # bytes


def fetch(
    model: str | ModelSource,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    local_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    mirrors: Sequence[str] = (),
    token: str | None = None,
    progress: ProgressCallback = ignore_progress,
    max_workers: int = 4,
    stall_timeout: float | None = None,
) -> Path:
    """Fetch ``model`` (else the first of ``mirrors`` that works) and return the path the engine loads.

    Blocks; a second call, in this process or another, waits for the first and then finds the files. Raises a
    ``WeightsError`` whose ``reason`` says what a person must change. What has arrived before an error, Ctrl-C or
    kill stays and is not fetched again.
    """
    request = make_request(
        model,
        revision=revision,
        include=include,
        exclude=exclude,
        local_dir=local_dir,
        cache_dir=cache_dir,
        mirrors=mirrors,
        token=token,
        max_workers=max_workers,
        stall_timeout=stall_timeout,
    )
    return fetch_result(request, progress).path


def fetch_result(request: FetchRequest, progress: ProgressCallback = ignore_progress) -> FetchResult:
    """``fetch`` with all that is known about the outcome."""
    try:
        return _first_that_works(request, lambda source: _Fetch(request, source, progress).run())
    except PermissionError as error:
        where = error.filename or request.local_dir or request.cache_dir
        raise StorageError(
            f"cannot write {where}: {error.strerror}; give a folder that user {os.getuid()} may write"
        ) from error


def resolve_any(request: FetchRequest) -> tuple[WeightSource, ResolvedModel, list[RemoteFile]]:
    """Resolve the first model of ``request`` that can be, and the files that would be fetched."""

    def attempt(source: WeightSource) -> tuple[WeightSource, ResolvedModel, list[RemoteFile]]:
        resolved = source.resolve()
        return source, resolved, request.files_of(resolved)

    return _first_that_works(request, attempt)


def _first_that_works(request: FetchRequest, attempt: Callable[[WeightSource], T]) -> T:
    failures: list[tuple[ModelSource, WeightsError]] = []
    for model in request.models:
        try:
            return attempt(open_source(model, token=request.token))
        except WeightsError as error:
            if not error.try_mirror:
                raise
            if len(request.models) > 1:
                logger.warning("%s: %s: %s", model, error.reason, error.message)
            failures.append((model, error))
    first = failures[0][1]
    if len(failures) == 1:
        raise first
    others = "; ".join(f"{model}: {error.reason}: {error.message}" for model, error in failures[1:])
    raise type(first)(f"{first.message}. The mirrors failed too: {others}", **first.details) from first


class _Fetch:
    """One attempt to have the files of one source at their place."""

    def __init__(self, request: FetchRequest, source: WeightSource, progress: ProgressCallback) -> None:
        self.request = request
        self.source = source
        self.progress = progress
        self.started = time.monotonic()

    def run(self) -> FetchResult:
        model = self.source.model
        if not model.is_hub:
            resolved = self.source.resolve()
            folder = Path(model.path)
            if model.scheme == "file":
                local_path(model, weights=self.request.weights)
            if self.request.local_dir is not None:
                raise InvalidModelId(
                    f"{model} is on this machine already; a local folder is not copied to another"
                )
            return self._result(folder, resolved.revision, self.request.files_of(resolved))
        self.progress(ProgressEvent("resolving", message=f"resolving {model}"))
        if offline():
            error = NetworkUnreachable(
                f"{model}: HF_HUB_OFFLINE or KUBEINFER_OFFLINE is set, so no hub was asked, and there is no complete "
                "copy of it on this machine; unset the variable or name a local folder"
            )
            return self._from_cache(error, self._here())
        here = self._here()
        if here is not None and self._is_settled(here):
            return here
        try:
            resolved = self.source.resolve() if here is None else self._resolve_soon()
        except _OFFLINE_HELPS as error:
            return self._from_cache(error, here)
        files = self.request.files_of(resolved)
        layout = self._layout(resolved)
        delivery = Delivery(self.request, self.source, resolved, files, layout, self.progress)
        self.progress(ProgressEvent("checking"))
        manifest = layout.manifest()
        settled = not layout.unfinished() and not _stale(manifest, resolved)
        if settled and all(layout.present(f, manifest) for f in files):
            delivery.keep_manifest(manifest)
            return self._result(layout.folder, resolved.revision, files)
        if self.request.local_dir is None and (cached := self._in_sdk_cache(files)):
            return self._result(cached, resolved.revision, files)
        with layout.lock(lambda text: self.progress(ProgressEvent("waiting", message=text))):
            manifest = layout.manifest()
            missing = [f for f in files if not layout.present(f, manifest)]
            received = 0
            if missing or layout.unfinished() or _stale(manifest, resolved):
                received = delivery.bring(missing)
        return self._result(layout.folder, resolved.revision, files, received)

    def _result(
        self,
        folder: Path,
        revision: str,
        files: Sequence[RemoteFile],
        received: int = 0,
    ) -> FetchResult:
        return FetchResult(
            path=folder if folder.is_file() else engine_path(folder, files, self.source.model.file),
            folder=folder,
            source=self.source.model.repo_uri,
            revision=revision,
            files=tuple(files),
            bytes_total=sum(f.size for f in files),
            bytes_received=received,
            seconds=time.monotonic() - self.started,
        )

    def _cache_dir(self) -> Path:
        return self.request.cache_dir or self.source.cache_dir()

    def _layout(self, resolved: ResolvedModel) -> Layout:
        if self.request.local_dir is not None:
            return FolderLayout(self.request.local_dir)
        cache, repo = self._cache_dir(), resolved.source.repo
        if resolved.source.scheme == "hf":
            return HubCacheLayout(cache / repo_folder(repo), resolved.revision)
        snapshots = cache / "models" / repo.replace("/", "--") / "snapshots"
        return FolderLayout(snapshots / resolved.revision, self.source.cached_snapshots(cache))

    def _in_sdk_cache(self, files: Sequence[RemoteFile]) -> Path | None:
        """A snapshot that the hub's own SDK made (it has checked the hashes) and that has every file."""
        for folder in self.source.cached_snapshots(self._cache_dir()):
            if all(_as_listed(folder / f.path, f) for f in files):
                return folder
        return None

    def _here(self) -> FetchResult | None:
        """A complete copy of what is asked for on this machine, as far as can be told without the hub."""
        found = offline_folder(self.source, self._cache_dir(), self.request)
        return self._result(found[0], found[1], found[2]) if found is not None else None

    def _is_settled(self, here: FetchResult) -> bool:
        """Whether a copy is of the very commit, and of all the files, that are asked for: neither can change."""
        model, manifest = self.source.model, manifest_of(here.folder)
        return (
            manifest is not None
            and _COMMIT.match(model.revision or "") is not None
            and (manifest.source, manifest.revision) == (model.repo_uri, model.revision)
            and self.request.selection(model) in manifest.selections
        )

    def _from_cache(self, error: WeightsError, here: FetchResult | None) -> FetchResult:
        if here is None:
            raise error
        if not offline():
            logger.warning("%s: using the copy in %s", error.message, here.folder)
        return replace(here, offline=True, seconds=time.monotonic() - self.started)

    def _resolve_soon(self) -> ResolvedModel:
        """Resolve, but not for long: a network that swallows packets must not hold up what is here already."""
        answers: queue.SimpleQueue[ResolvedModel | Exception] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(self.source.resolve())
            except Exception as error:
                answers.put(error)

        threading.Thread(target=ask, name="resolve", daemon=True).start()
        try:
            answer = answers.get(timeout=PATIENCE)
        except queue.Empty:
            raise NetworkUnreachable(f"no answer about {self.source.model} within {PATIENCE:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _stale(manifest: Manifest | None, resolved: ResolvedModel) -> bool:
    """Whether a folder has files that this revision has no more: old shards would be loaded with the new."""
    return manifest is not None and not {f.path for f in manifest.files} <= {f.path for f in resolved.files}


def _as_listed(path: Path, file: RemoteFile) -> bool:
    """Size, and for small files (the only ones that change without changing it) the hash too."""
    if file.size <= _SMALL:
        return file_matches(path, file)
    return path.is_file() and path.stat().st_size == file.size


def offline() -> bool:
    """Whether the environment forbids asking a hub."""
    names = ("KUBEINFER_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on") for name in names)
