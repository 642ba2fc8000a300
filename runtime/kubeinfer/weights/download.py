"""Fetch a model's files: one verified, resumable download, published atomically, shared by all who ask."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from kubeinfer.weights.errors import (
    HubUnavailable,
    InvalidModelId,
    NetworkUnreachable,
    StorageError,
    TooManyRequests,
    WeightsError,
)
from kubeinfer.weights.layout import (
    FolderLayout,
    HubCacheLayout,
    Layout,
    Manifest,
    adopt,
    file_matches,
    same_bytes,
)
from kubeinfer.weights.progress import Meter, ProgressCallback, ProgressEvent, ignore_progress
from kubeinfer.weights.selection import select
from kubeinfer.weights.sources import RemoteFile, ResolvedModel, WeightSource, open_source
from kubeinfer.weights.sources.huggingface import repo_folder
from kubeinfer.weights.transfer import (
    Digest,
    TransferOptions,
    disk_full,
    free_bytes,
    part_of,
)
from kubeinfer.weights.uri import ModelSource, parse
from kubeinfer.weights.workers import Workers

T = TypeVar("T")

logger = logging.getLogger(__name__)

_OFFLINE_HELPS = (NetworkUnreachable, HubUnavailable, TooManyRequests)
# Seconds that a hub has to answer when a copy is here.
PATIENCE = 6.0
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_SMALL = 8 << 20
_DISK_SLACK = 1 << 20  # manifest, links, directories


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
        return source, resolved, _select(request, resolved)

    return _first_that_works(request, attempt)


def verify(folder: Path, progress: ProgressCallback = ignore_progress) -> list[str]:
    """Read every file of a published folder again and return what is wrong, one line a file (empty: nothing)."""
    manifest = FolderLayout(folder).manifest()
    if manifest is None and folder.parent.name == "snapshots":
        manifest = HubCacheLayout(folder.parent.parent, folder.name).manifest()
    if manifest is None:
        raise StorageError(f"{folder} has no manifest of kubeinfer, so there is nothing to check it against")
    wrong: list[str] = []
    meter = Meter(sum(f.size for f in manifest.files), len(manifest.files))
    for file in manifest.files:
        path, digest = folder / file.path, Digest(file)
        try:
            digest.read(path)
            problem = digest.problem()
        except OSError as error:
            problem = error.strerror or str(error)
        if problem:
            wrong.append(f"{file.path}: {problem}")
        meter.already_here(file.size)
        meter.file_done()
        progress(meter.event("checking"))
    return wrong


def engine_path(folder: Path, files: Sequence[RemoteFile], file: str | None = None) -> Path:
    """The GGUF file (its first shard) where that is what was fetched, else the folder."""
    if file is not None:
        return folder / file
    names = [f.path for f in files]
    ggufs = sorted(n for n in names if n.lower().endswith(".gguf"))
    if ggufs and not any(n.endswith((".safetensors", ".bin", ".pt", ".pth")) for n in names):
        return folder / ggufs[0]
    return folder


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


def _select(request: FetchRequest, resolved: ResolvedModel) -> list[RemoteFile]:
    return select(
        resolved.files,
        include=request.include,
        exclude=request.exclude,
        file=resolved.source.file,
        weights=request.weights,
        model=resolved.source.repo_uri,
    )


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
            if self.request.local_dir is not None:
                raise InvalidModelId(
                    f"{model} is on this machine already; a local folder is not copied to another"
                )
            return self._result(folder, resolved.revision, _select(self.request, resolved))
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
        files = _select(self.request, resolved)
        layout = self._layout(resolved)
        self.progress(ProgressEvent("checking"))
        manifest = layout.manifest()
        settled = not layout.unfinished() and not _stale(manifest, resolved)
        if settled and all(layout.present(f, manifest) for f in files):
            self._keep_manifest(layout, resolved, files, manifest)
            return self._result(layout.folder, resolved.revision, files)
        if self.request.local_dir is None and (cached := self._in_sdk_cache(files)):
            return self._result(cached, resolved.revision, files)
        with layout.lock(lambda text: self.progress(ProgressEvent("waiting", message=text))):
            manifest = layout.manifest()
            missing = [f for f in files if not layout.present(f, manifest)]
            received = 0
            if missing or layout.unfinished() or _stale(manifest, resolved):
                received = self._bring(layout, resolved, files, missing)
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

    def _keep_manifest(
        self, layout: Layout, resolved: ResolvedModel, files: Sequence[RemoteFile], old: Manifest | None
    ) -> None:
        """Note which revision a complete folder is at; one that cannot be written is as good without."""
        at = (resolved.source.repo_uri, resolved.revision)
        selection = self.request.selection(resolved.source)
        if old is not None and (old.source, old.revision) == at and selection in old.selections:
            return
        with suppress(OSError):
            self._manifest(layout, resolved, files, {}, old).write(layout.manifest_path)

    def _in_sdk_cache(self, files: Sequence[RemoteFile]) -> Path | None:
        """A snapshot that the hub's own SDK made (it has checked the hashes) and that has every file."""
        for folder in self.source.cached_snapshots(self._cache_dir()):
            if all(_as_listed(folder / f.path, f) for f in files):
                return folder
        return None

    def _here(self) -> FetchResult | None:
        """A complete copy of what is asked for on this machine, as far as can be told without the hub."""
        from kubeinfer.weights.locate import offline_folder

        found = offline_folder(self.source, self._cache_dir(), self.request)
        return self._result(found[0], found[1], found[2]) if found is not None else None

    def _is_settled(self, here: FetchResult) -> bool:
        """Whether a copy is of the very commit, and of all the files, that are asked for: neither can change."""
        from kubeinfer.weights.locate import manifest_of

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

    def _bring(
        self,
        layout: Layout,
        resolved: ResolvedModel,
        files: Sequence[RemoteFile],
        missing: Sequence[RemoteFile],
    ) -> int:
        """Download ``missing`` and publish; returns the bytes that came over the network."""
        staged = {f.path: layout.object_path(f, resolved) for f in missing}
        objects = {target: next(f for f in missing if staged[f.path] == target) for target in staged.values()}
        meter = Meter(sum(f.size for f in objects.values()), len(objects))
        hashes: dict[Path, str] = {}
        try:
            (layout.staging / "objects").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot write below {layout.staging.parent}: {error.strerror}; choose a folder that this user "
                "may write to (--local-dir, download_dir, HF_HOME or MODELSCOPE_CACHE)"
            ) from error
        wanted: list[tuple[RemoteFile, Path]] = []
        for target, file in objects.items():
            if (sha256 := self._staged(layout, file, target)) is not None:
                hashes[target] = sha256
                meter.already_here(file.size)
                meter.file_done()
            else:
                wanted.append((file, target))
        self._check_space(layout, wanted, meter)
        Workers(self.source, resolved, meter, self.progress, self.request.transfer).run(
            wanted, hashes, self.request.max_workers
        )
        self.progress(meter.event("publishing"))
        old = layout.manifest()
        manifest = self._manifest(layout, resolved, files, {p: hashes[t] for p, t in staged.items()}, old)
        layout.publish(resolved, staged, manifest)
        return meter.received

    def _staged(self, layout: Layout, file: RemoteFile, target: Path) -> str | None:
        """The SHA-256 of ``file`` if its bytes are here: staged by an earlier run, or in a donor."""
        if not target.exists() and (donor := layout.donor(file)) is not None:
            self.progress(ProgressEvent("checking", message=f"checking {donor}"))
            if file_matches(donor, file):
                adopt(donor, target)
        if not target.exists():
            return None
        digest = Digest(file)
        digest.read(target)
        if digest.problem() is None:
            return digest.sha256
        target.unlink()
        return None

    def _check_space(self, layout: Layout, wanted: Sequence[tuple[RemoteFile, Path]], meter: Meter) -> None:
        needed = 0
        for file, target in wanted:
            part = part_of(target)
            have = min(part.stat().st_size, file.size) if part.exists() else 0
            meter.already_here(have)
            needed += file.size - have
        if needed and needed + _DISK_SLACK > free_bytes(layout.staging):
            raise disk_full(layout.staging.parent, needed)

    def _manifest(
        self,
        layout: Layout,
        resolved: ResolvedModel,
        files: Sequence[RemoteFile],
        hashes: dict[str, str],
        old: Manifest | None,
    ) -> Manifest:
        listed = {f.path: f for f in resolved.files}
        before = {f.path: f for f in old.files} if old else {}
        entries: dict[str, RemoteFile] = {}
        for file in files:
            sha256 = hashes.get(file.path) or file.sha256
            known = before.get(file.path)
            if sha256 is None and known is not None and same_bytes(known, file):
                sha256 = known.sha256
            if sha256 is None:
                digest = Digest(file)
                digest.read(layout.folder / file.path)
                sha256 = digest.sha256
            entries[file.path] = replace(file, sha256=sha256)
        for path, known in before.items():
            # Fetched by an earlier pull with other patterns, and unchanged in this revision: it stays.
            if path not in entries and path in listed and same_bytes(known, listed[path]):
                entries[path] = known
        requested = resolved.source.revision
        selections = [self.request.selection(resolved.source)]
        if old is not None and (old.source, old.revision) == (resolved.source.repo_uri, resolved.revision):
            selections = [*old.selections, *(s for s in selections if s not in old.selections)]
        return Manifest(
            resolved.source.repo_uri,
            resolved.revision,
            tuple(entries.values()),
            requested,
            selections=tuple(selections),
        )


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


def _stall_timeout_from_env() -> float:
    text = os.environ.get("KUBEINFER_STALL_TIMEOUT", "30")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise InvalidModelId(f"KUBEINFER_STALL_TIMEOUT is {text!r}: give seconds above 0")
    return seconds
