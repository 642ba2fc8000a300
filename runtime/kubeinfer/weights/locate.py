"""From MODEL to the path that the engine loads: as it is if it is here, else pulled; and folders judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kubeinfer.weights.errors import ModelNotFound, NotHere, StorageError, WeightsError, WeightsIncomplete
from kubeinfer.weights.layout import MANIFEST, FolderLayout, HubCacheLayout, Manifest
from kubeinfer.weights.progress import ProgressCallback, ignore_progress
from kubeinfer.weights.selection import select
from kubeinfer.weights.sources.base import RemoteFile, WeightSource, checkpoint_gaps
from kubeinfer.weights.sources.local import LocalSource
from kubeinfer.weights.uri import ModelSource, parse

if TYPE_CHECKING:
    from kubeinfer.weights.request import FetchRequest

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_POINTER = b"version https://git-lfs.github.com/spec/v1"


def resolve_model_path(
    model: str,
    revision: str | None = None,
    download_dir: str | None = None,
    *,
    weights: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mirrors: Sequence[str] = (),
    token: str | None = None,
    progress: ProgressCallback = ignore_progress,
) -> Path:
    """The folder or GGUF file of ``model``, fetched if it is not on this machine.

    ``download_dir`` is the cache folder to use in place of the hub SDK's own. ``weights=False`` asks for
    configuration and tokenizer only (for ``load_format="dummy"``). A hub model already in a cache costs two
    small requests, and none under ``HF_HUB_OFFLINE=1``; it is also used where the hub does not answer. Raises a
    ``WeightsError``.
    """
    source = parse(model)
    if source.scheme == "pvc":
        raise NotHere(
            f"{source} can only be mounted by the operator: use it in an InferenceModel, or give the folder where "
            "the claim is mounted"
        )
    if source.scheme == "file":
        return local_path(source, weights=weights)
    from kubeinfer.weights.download import fetch_result
    from kubeinfer.weights.request import make_request

    request = make_request(
        source,
        revision=revision,
        include=include,
        exclude=exclude,
        cache_dir=download_dir,
        mirrors=mirrors,
        token=token,
        weights=weights,
    )
    return fetch_result(request, progress).path


def local_path(source: ModelSource, *, weights: bool = True) -> Path:
    """A folder or file on this machine, checked for what commonly is wrong with it."""
    path = Path(source.path)
    if not path.exists():
        raise ModelNotFound(
            f"there is no file or folder {source.path!r} on this machine (it was taken for a path; a model of a hub "
            "is written ORG/NAME)"
        )
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFound(
                f"{source.path!r} is a file but no .gguf: give the folder that holds the model"
            )
        check_pointers(path.parent, [path.name])
        return path
    return check_folder(path, weights=weights)


def check_folder(folder: Path, *, weights: bool = True) -> Path:
    """``folder`` (or the one GGUF file in it) if it holds a model; raises ``WeightsIncomplete`` or
    ``StorageError`` otherwise."""
    try:
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    except OSError as error:
        raise StorageError(f"cannot list {folder}: {error.strerror}") from error
    if not weights:
        return folder
    checkpoints = [n for n in names if n.endswith(WEIGHT_SUFFIXES) and n != "training_args.bin"]
    if (folder / ".incomplete").exists() and not (folder / MANIFEST).exists():
        raise WeightsIncomplete(f"{folder} holds an unfinished download: run the same 'kubeinfer pull' again")
    if not checkpoints:
        raise WeightsIncomplete(
            f"{folder} has no weights: no .safetensors, .bin or .gguf file; give the folder of a whole model"
        )
    check_pointers(folder, checkpoints)
    if gaps := folder_gaps(folder, names):
        raise WeightsIncomplete(
            f"{folder} lacks {len(gaps)} of the weight files that its index names: {', '.join(gaps[:5])}"
            f"{' ...' if len(gaps) > 5 else ''}; copy or download them again"
        )
    top = [n for n in checkpoints if "/" not in n]
    ggufs = sorted(n for n in top if n.endswith(".gguf"))
    if ggufs and len(ggufs) == len(top):
        entries = [RemoteFile(n, 0) for n in ggufs]
        return folder / sorted(f.path for f in select(entries, model=str(folder)))[0]
    return folder


def check_pointers(folder: Path, names: Sequence[str]) -> None:
    """Refuse git-lfs pointer files, which are what ``git clone`` leaves without git-lfs."""
    pointers = [name for name in names if is_lfs_pointer(folder / name)]
    if pointers:
        raise WeightsIncomplete(
            f"{folder} has git-lfs pointers in place of weights ({', '.join(pointers[:3])}"
            f"{' ...' if len(pointers) > 3 else ''}): run 'git lfs install && git lfs pull' in it, or fetch the model "
            "with 'kubeinfer pull'"
        )


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a git-lfs pointer."""
    try:
        if path.stat().st_size > 1024:
            return False
        with open(path, "rb") as stream:
            return stream.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def folder_gaps(folder: Path, names: Sequence[str]) -> list[str]:
    """Weight files that an index in ``folder`` names and the folder lacks."""

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    return checkpoint_gaps(names, read)


def offline_folder(
    source: WeightSource, cache_dir: Path, request: FetchRequest
) -> tuple[Path, str, list[RemoteFile]] | None:
    """A complete copy of the source's model on this machine: (folder, revision, files), or None."""
    model = source.model
    if request.local_dir is not None:
        places = [request.local_dir]
    else:
        places = source.cached_snapshots(cache_dir)
        if model.scheme == "modelscope":
            places = [*places, *_published_for(model, cache_dir)]
    for folder in places:
        manifest = manifest_of(folder)
        if manifest is not None and not _answers(manifest, model, [m.repo_uri for m in request.models]):
            continue
        if manifest is None and request.local_dir is not None:
            continue  # a folder of unknown origin is no answer to a question about a hub's revision
        files = _offline_files(folder, manifest, request, model)
        if files:
            return folder, manifest.revision if manifest else folder.name, files
    return None


def _published_for(model: ModelSource, cache_dir: Path) -> list[Path]:
    """Snapshots that this package published under their commit, the newest first."""
    snapshots = cache_dir / "models" / model.repo.replace("/", "--") / "snapshots"
    found = [(m.published, f) for f in snapshots.glob("*") if (m := manifest_of(f)) is not None]
    return [folder for _, folder in sorted(found, reverse=True)]


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest of a folder that this package published or looked through."""
    if folder.parent.name == "snapshots" and (
        found := HubCacheLayout(folder.parent.parent, folder.name).manifest()
    ):
        return found
    return FolderLayout(folder).manifest()


def _answers(manifest: Manifest, model: ModelSource, sources: Sequence[str]) -> bool:
    if manifest.source not in sources:
        return False
    if model.repo_uri != manifest.source:
        return True  # a mirror's copy; its revisions have other names
    return model.revision in (manifest.requested, manifest.revision)


def _offline_files(
    folder: Path, manifest: Manifest | None, request: FetchRequest, model: ModelSource
) -> list[RemoteFile] | None:
    try:
        listing = (
            manifest.files if manifest else LocalSource(ModelSource("file", path=str(folder))).resolve().files
        )
        files = select(
            listing,
            include=request.include,
            exclude=request.exclude,
            file=model.file,
            weights=request.weights,
            model=str(model),
        )
        if any(not (folder / f.path).is_file() or (folder / f.path).stat().st_size != f.size for f in files):
            return None
        names = [f.path for f in listing]
        found = any(f.path.endswith(WEIGHT_SUFFIXES) for f in files)
        if request.weights and not request.include and (not found or folder_gaps(folder, names)):
            return None
    except WeightsError:
        return None
    return files
