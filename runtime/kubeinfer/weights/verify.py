"""Published files read again and compared with what they were when they came."""

from __future__ import annotations

from pathlib import Path

from kubeinfer.weights.errors import StorageError
from kubeinfer.weights.layout import FolderLayout, HubCacheLayout
from kubeinfer.weights.progress import Meter, ProgressCallback, ignore_progress
from kubeinfer.weights.transfer import Digest


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
