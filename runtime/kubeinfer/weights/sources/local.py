"""Models already on this machine: a folder or a GGUF file, listed as they are."""

from __future__ import annotations

from pathlib import Path

from kubeinfer.weights.errors import ModelNotFound, StorageError
from kubeinfer.weights.sources.base import FileRequest, RemoteFile, ResolvedModel, WeightSource


class LocalSource(WeightSource):
    """A ``file`` source; its revision is ``local``."""

    @property
    def path(self) -> Path:
        return Path(self.model.path)

    def resolve(self) -> ResolvedModel:
        path = self.path
        if path.is_file():
            return ResolvedModel(self.model, "local", (RemoteFile(path.name, path.stat().st_size),))
        if not path.is_dir():
            raise ModelNotFound(f"there is no file or folder {str(path)!r} on this machine")
        try:
            files = tuple(
                RemoteFile(p.relative_to(path).as_posix(), p.stat().st_size)
                for p in sorted(path.rglob("*"))
                if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
            )
        except OSError as error:
            raise StorageError(f"cannot list {str(path)!r}: {error.strerror or error}") from error
        return ResolvedModel(self.model, "local", files)

    def request_for(self, resolved: ResolvedModel, file: RemoteFile) -> FileRequest:
        root = self.path if self.path.is_dir() else self.path.parent
        return FileRequest((root / file.path).absolute().as_uri())

    def cache_dir(self) -> Path:
        return self.path

    def cached_snapshots(self, cache_dir: Path) -> list[Path]:
        return [self.path] if self.path.is_dir() else []
