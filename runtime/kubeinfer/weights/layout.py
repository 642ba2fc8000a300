"""Where weights end up on disk: manifest, lock, staging area, and their atomic publication.

Files gather in a staging area under the name of their hash (so a restart, another revision or another hub with
the same bytes goes on where the last one stopped) and appear at their place only when all are there.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from kubeinfer.weights.errors import StorageError
from kubeinfer.weights.sources.base import RemoteFile, ResolvedModel
from kubeinfer.weights.transfer import Digest, disk_full

MANIFEST = ".kubeinfer.json"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a published folder holds; ``files`` have their SHA-256 as computed here, ``selections`` say which
    choices of files (patterns and the like) they are all of."""

    source: str
    revision: str
    files: tuple[RemoteFile, ...]
    requested: str | None = None
    published: str = ""
    selections: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        body = {"version": 1, **asdict(self), "published": self.published or _now()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with open(temporary, "w", encoding="utf-8") as out:
            json.dump(body, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """The manifest at ``path``, or None where there is none that can be read."""
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            files = tuple(RemoteFile(**f) for f in body["files"])
            return cls(
                body["source"],
                body["revision"],
                files,
                body.get("requested"),
                body.get("published", ""),
                tuple(body.get("selections", ())),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


class Layout(abc.ABC):
    """A place for one model's files. ``folder`` is what the engine is given."""

    folder: Path
    manifest_path: Path
    lock_path: Path
    staging: Path

    def manifest(self) -> Manifest | None:
        return Manifest.read(self.manifest_path)

    @abc.abstractmethod
    def present(self, file: RemoteFile, manifest: Manifest | None) -> bool:
        """Whether ``file`` is at its place already, its bytes vouched for."""

    def unfinished(self) -> bool:
        """Whether a publication was cut short and has to be done again, though every file may be there."""
        return False

    @abc.abstractmethod
    def publish(self, resolved: ResolvedModel, objects: dict[str, Path], manifest: Manifest) -> None:
        """Move ``objects`` (path in the model -> staged file) to their place, then write the manifest."""

    def object_path(self, file: RemoteFile, resolved: ResolvedModel) -> Path:
        """Where ``file`` is staged: the same for the same bytes."""
        key = file.key or hashlib.sha256(f"{resolved}/{file.path}:{file.size}".encode()).hexdigest()
        return self.staging / "objects" / key

    def donor(self, file: RemoteFile) -> Path | None:
        """A file elsewhere that has the right size and may have the right bytes."""
        return None

    @contextlib.contextmanager
    def lock(self, waiting: Callable[[str], None], poll: float = 0.2) -> Iterator[None]:
        """Exclusive among processes; the kernel drops it when its holder dies, so none is ever stale."""
        with _storage(self.lock_path):
            self.lock_path.parent.mkdir(parents=True, exist_ok=True)
            handle = open(self.lock_path, "a+")  # noqa: SIM115 - held for the whole block
        with handle:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waiting(f"waiting for another download into {self.folder}")
                    time.sleep(poll)
                except OSError as error:
                    if error.errno in _NO_LOCKS:
                        break  # some network file systems have none; staging names still do not clash by content
                    raise StorageError(f"cannot lock {self.lock_path}: {error.strerror}") from error
            yield


class FolderLayout(Layout):
    """Plain files in ``folder``; a new folder appears by one rename, an existing one is brought up to date file
    by file and has no manifest in between."""

    def __init__(self, folder: Path, donors: Sequence[Path] = ()) -> None:
        self.folder = folder.absolute()
        self.manifest_path = self.folder / MANIFEST
        self._old_manifest_path = self.folder / f"{MANIFEST}.old"
        self._donors = donors
        # A mount point has its own space and its own lock; a sibling of it may be on another disk or read-only.
        if os.path.ismount(self.folder) or not _writable_parent(self.folder):
            self.lock_path = self.folder / ".kubeinfer.lock"
            self.staging = self.folder / ".incomplete"
        else:
            self.lock_path = self.folder.with_name(f".{self.folder.name}.lock")
            self.staging = self.folder.with_name(f".{self.folder.name}.incomplete")

    def present(self, file: RemoteFile, manifest: Manifest | None) -> bool:
        path = self.folder / file.path
        if not _has_size(path, file.size):
            return False
        known = {f.path: f for f in manifest.files} if manifest else {}
        if (entry := known.get(file.path)) is not None and same_bytes(entry, file) is not None:
            return bool(same_bytes(entry, file))
        return file_matches(path, file)

    def donor(self, file: RemoteFile) -> Path | None:
        places = (folder / file.path for folder in (self.staging / "tree", *self._donors))
        return next((path for path in places if _has_size(path, file.size)), None)

    def unfinished(self) -> bool:
        return self._old_manifest_path.exists()

    def publish(self, resolved: ResolvedModel, objects: dict[str, Path], manifest: Manifest) -> None:
        with _storage(self.folder):
            if not self._publish_new(objects, manifest):
                self._publish_into(objects, manifest)
            shutil.rmtree(self.staging, ignore_errors=True)

    def _publish_new(self, objects: dict[str, Path], manifest: Manifest) -> bool:
        if self.staging.parent == self.folder or (self.folder.exists() and any(self.folder.iterdir())):
            return False
        tree = self.staging / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        _place(objects, tree)
        manifest.write(tree / MANIFEST)
        try:
            os.rename(tree, self.folder)
        except OSError as error:
            if error.errno in _CANNOT_RENAME:
                return False
            raise
        _fsync_folder(self.folder.parent)
        return True

    def _publish_into(self, objects: dict[str, Path], manifest: Manifest) -> None:
        old = self.manifest() or Manifest.read(self._old_manifest_path)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.manifest_path.exists():
            # Kept until the end: a run that takes over after a kill must know which files to remove.
            os.replace(self.manifest_path, self._old_manifest_path)
        _place(objects, self.folder)
        if old is not None:
            # A shard of the last revision left behind would be loaded with those of this one.
            for path in {f.path for f in old.files} - {f.path for f in manifest.files}:
                (self.folder / path).unlink(missing_ok=True)
        manifest.write(self.manifest_path)
        self._old_manifest_path.unlink(missing_ok=True)
        _fsync_folder(self.folder)


class HubCacheLayout(Layout):
    """The Hugging Face cache: ``blobs/HASH``, ``snapshots/COMMIT/PATH`` linked to them, ``refs/BRANCH``; shared
    with every program that uses it."""

    def __init__(self, repo_folder: Path, commit: str) -> None:
        self.repo_folder = repo_folder.absolute()
        self.folder = self.repo_folder / "snapshots" / commit
        self.manifest_path = self.repo_folder / ".kubeinfer" / f"{commit}.json"
        self.lock_path = self.repo_folder / ".kubeinfer" / "lock"
        self.staging = self.repo_folder / ".kubeinfer" / "incomplete"

    def present(self, file: RemoteFile, manifest: Manifest | None) -> bool:
        path = self.folder / file.path
        if not _has_size(path, file.size):
            return False
        # A blob gets its name, the hash, when it is complete; other kinds of entries are read and hashed.
        return path.resolve().name == file.key or file_matches(path, file)

    def donor(self, file: RemoteFile) -> Path | None:
        blob = self.repo_folder / "blobs" / (file.key or "-")
        return blob if _has_size(blob, file.size) else None

    def publish(self, resolved: ResolvedModel, objects: dict[str, Path], manifest: Manifest) -> None:
        with _storage(self.folder):
            fresh = not self.folder.exists()
            tree = self.staging / "tree" if fresh else self.folder
            if fresh:
                shutil.rmtree(tree, ignore_errors=True)
            for path, staged in objects.items():
                blob = self.repo_folder / "blobs" / staged.name
                blob.parent.mkdir(parents=True, exist_ok=True)
                if staged != blob and staged.exists():
                    os.replace(staged, blob)
                _symlink(blob, tree / path, self.folder / path)
            if fresh:
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                os.rename(tree, self.folder)
            self._write_ref(resolved)
            manifest.write(self.manifest_path)
            shutil.rmtree(self.staging, ignore_errors=True)

    def _write_ref(self, resolved: ResolvedModel) -> None:
        name = resolved.source.revision or "main"
        if name == resolved.revision:
            return
        ref = self.repo_folder / "refs" / name
        ref.parent.mkdir(parents=True, exist_ok=True)
        temporary = ref.with_name(f".{ref.name}.{os.getpid()}.tmp")
        temporary.write_text(resolved.revision)
        os.replace(temporary, ref)


def same_bytes(known: RemoteFile, listed: RemoteFile) -> bool | None:
    """Whether two entries are the same bytes by size and hash; None where they share no kind of hash."""
    if known.size != listed.size:
        return False
    if known.sha256 and listed.sha256:
        return known.sha256 == listed.sha256
    if known.git_sha1 and listed.git_sha1:
        return known.git_sha1 == listed.git_sha1
    return None


def file_matches(path: Path, file: RemoteFile, check: Callable[[], None] = lambda: None) -> bool:
    """Read ``path`` and compare it with what is listed (size alone, where the hub lists no hash)."""
    if not _has_size(path, file.size):
        return False
    if file.key is None:
        return True
    digest = Digest(file)
    try:
        digest.read(path, check)
    except OSError:
        return False
    return digest.problem() is None


def adopt(donor: Path, target: Path) -> None:
    """Stage a copy of ``donor`` without copying bytes where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _link(donor.resolve(), target)


def _link(source: Path, target: Path, *, may_move: bool = False) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        if may_move:
            shutil.move(source, temporary)
        else:
            shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _place(objects: dict[str, Path], folder: Path) -> None:
    """Put staged files at their paths: linked, so that a kill loses none; moved where links cannot be made."""
    uses = Counter(objects.values())
    for path, staged in objects.items():
        uses[staged] -= 1
        _link(staged, folder / path, may_move=not uses[staged])


def _symlink(blob: Path, place: Path, final: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.symlink(os.path.relpath(blob, final.parent), temporary)
    except OSError:
        shutil.copyfile(blob, temporary)
    os.replace(temporary, place)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:
        return False


def _writable_parent(folder: Path) -> bool:
    parent = folder.parent
    if folder.exists() and folder.stat().st_dev != parent.stat().st_dev:
        return False
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    return os.access(parent, os.W_OK | os.X_OK)


def _fsync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path) from error
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
