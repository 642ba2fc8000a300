"""The files of one revision, brought to their place: downloaded, checked, noted in the manifest and published."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kubeinfer.weights.errors import StorageError
from kubeinfer.weights.layout import Layout, Manifest, adopt, file_matches, same_bytes
from kubeinfer.weights.progress import Meter, ProgressCallback, ProgressEvent
from kubeinfer.weights.request import FetchRequest
from kubeinfer.weights.sources import RemoteFile, ResolvedModel, WeightSource
from kubeinfer.weights.transfer import Digest, disk_full, free_bytes, part_of
from kubeinfer.weights.workers import Workers

_DISK_SLACK = 1 << 20  # bytes, for the manifest, links and directories


@dataclass(frozen=True, slots=True)
class Delivery:
    """``files`` of the revision ``resolved`` belong in ``layout``; whoever brings them holds its lock."""

    request: FetchRequest
    source: WeightSource
    resolved: ResolvedModel
    files: Sequence[RemoteFile]
    layout: Layout
    progress: ProgressCallback

    def keep_manifest(self, old: Manifest | None) -> None:
        """Note which revision a complete folder is at; one that cannot be written is as good without."""
        resolved = self.resolved
        at = (resolved.source.repo_uri, resolved.revision)
        selection = self.request.selection(resolved.source)
        if old is not None and (old.source, old.revision) == at and selection in old.selections:
            return
        with suppress(OSError):
            self._manifest({}, old).write(self.layout.manifest_path)

    def bring(self, missing: Sequence[RemoteFile]) -> int:
        """Download ``missing`` and publish; returns the bytes that came over the network."""
        layout, resolved = self.layout, self.resolved
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
            if (sha256 := self._staged(file, target)) is not None:
                hashes[target] = sha256
                meter.already_here(file.size)
                meter.file_done()
            else:
                wanted.append((file, target))
        self._check_space(wanted, meter)
        Workers(self.source, resolved, meter, self.progress, self.request.transfer).run(
            wanted, hashes, self.request.max_workers
        )
        self.progress(meter.event("publishing"))
        old = layout.manifest()
        manifest = self._manifest({p: hashes[t] for p, t in staged.items()}, old)
        layout.publish(resolved, staged, manifest)
        return meter.received

    def _staged(self, file: RemoteFile, target: Path) -> str | None:
        """The SHA-256 of ``file`` if its bytes are here: staged by an earlier run, or in a donor."""
        if not target.exists() and (donor := self.layout.donor(file)) is not None:
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

    def _check_space(self, wanted: Sequence[tuple[RemoteFile, Path]], meter: Meter) -> None:
        needed = 0
        for file, target in wanted:
            part = part_of(target)
            have = min(part.stat().st_size, file.size) if part.exists() else 0
            meter.already_here(have)
            needed += file.size - have
        if needed and needed + _DISK_SLACK > free_bytes(self.layout.staging):
            raise disk_full(self.layout.staging.parent, needed)

    def _manifest(self, hashes: dict[str, str], old: Manifest | None) -> Manifest:
        layout, resolved = self.layout, self.resolved
        listed = {f.path: f for f in resolved.files}
        before = {f.path: f for f in old.files} if old else {}
        entries: dict[str, RemoteFile] = {}
        for file in self.files:
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
