"""Models on disk as a hub lists them: branches, commits, files with their sizes and hashes."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".model")


@dataclass(frozen=True)
class HubFile:
    path: str
    disk: Path
    size: int
    sha256: str
    git_sha1: str

    @property
    def lfs(self) -> bool:
        return self.path.endswith(LFS_SUFFIXES)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_sha1


@dataclass(frozen=True)
class Revision:
    name: str
    commit: str
    files: dict[str, HubFile]


@dataclass
class Repo:
    name: str
    revisions: dict[str, Revision]
    settings: dict[str, Any] = field(default_factory=dict)

    def find(self, revision: str) -> Revision | None:
        """By branch (``main`` and ``master`` are the default branch) or by commit."""
        name = "" if revision in ("main", "master", "") else revision
        if name in self.revisions:
            return self.revisions[name]
        return next((r for r in self.revisions.values() if r.commit == revision), None)


class Repos:
    """All models below ``root``; hashes are kept until a file changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hashes: dict[tuple[str, int, int], tuple[str, str]] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Repo | None:
        org, _, model = name.partition("/")
        folder = self.root / org
        if not org or not model or ".." in name or not folder.is_dir():
            return None
        revisions: dict[str, Revision] = {}
        settings: dict[str, Any] = {}
        for entry in sorted(folder.iterdir()):
            base, _, revision = entry.name.partition("@")
            if base == model and entry.is_dir():
                revisions[revision] = self._revision(revision, entry)
                if (entry / ".hub.json").is_file():
                    settings = json.loads((entry / ".hub.json").read_text())
        return Repo(name, revisions, settings) if revisions else None

    def by_hash(self, sha256: str) -> HubFile | None:
        """The file behind a link to the storage; looked for among those that were listed."""
        with self._lock:
            for (disk, size, _), (known, git) in self._hashes.items():
                if known == sha256 and Path(disk).is_file():
                    return HubFile(Path(disk).name, Path(disk), size, known, git)
        return None

    def _revision(self, name: str, folder: Path) -> Revision:
        files = {}
        for disk in sorted(folder.rglob("*")):
            path = disk.relative_to(folder).as_posix()
            if disk.is_file() and path != ".hub.json":
                sha256, git_sha1 = self._hash(disk)
                files[path] = HubFile(path, disk, disk.stat().st_size, sha256, git_sha1)
        text = "\n".join(f"{f.path} {f.sha256}" for f in files.values())
        return Revision(name, hashlib.sha1(f"{name}\n{text}".encode()).hexdigest(), files)

    def _hash(self, disk: Path) -> tuple[str, str]:
        stat = disk.stat()
        key = (str(disk), stat.st_size, stat.st_mtime_ns)
        with self._lock:
            if key not in self._hashes:
                sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {stat.st_size}\0".encode())
                with open(disk, "rb") as stream:
                    while data := stream.read(1 << 20):
                        sha256.update(data)
                        git.update(data)
                self._hashes[key] = (sha256.hexdigest(), git.hexdigest())
            return self._hashes[key]
