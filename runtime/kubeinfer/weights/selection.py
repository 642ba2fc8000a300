"""Which files of a model are fetched: the user's patterns, else one format of the weights and what goes with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from kubeinfer.weights.errors import FileNotFound, HubUnavailable
from kubeinfer.weights.sources.base import RemoteFile

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.[A-Za-z0-9]+\Z)")
# Weights of other frameworks and training leftovers: never read by the engine, and as large as the weights.
_OTHER_WEIGHTS = (
    "*.onnx",
    "*.onnx_data*",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.tflite",
    "*.mlmodel",
    "*.mlpackage/*",
    "*.engine",
    "*.ckpt",
    "*.pkl",
    "*.npz",
    "*.tar*",
    "*.zip",
    "onnx/*",
    "openvino/*",
    "coreml/*",
    "original/*",
    "metal/*",
    "runs/*",
    "checkpoint-*/*",
    "optimizer.*",
    "scheduler.*",
    "rng_state*",
    "training_args.bin",
    "*tfevents*",
)
_MEDIA = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".wav", ".mp3", ".pdf", ".ipynb")


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a glob of ``patterns`` takes ``path``; ``FOLDER/`` means all below it; ``*`` crosses ``/``."""
    for pattern in patterns:
        glob = pattern + "*" if pattern.endswith("/") else pattern
        if fnmatchcase(path, glob) or ("/" not in glob and fnmatchcase(PurePosixPath(path).name, glob)):
            return True
    return False


def select(
    files: Sequence[RemoteFile],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    file: str | None = None,
    weights: bool = True,
    model: str = "the model",
) -> list[RemoteFile]:
    """The files to fetch, in the order of the listing.

    ``include``/``exclude`` are globs and replace the default choice (``exclude`` alone narrows it); ``file`` is
    one file named in the URI, which brings its sibling shards and nothing but small files with it;
    ``weights=False`` leaves all weights out. Raises ``FileNotFound`` when nothing is left, or when the choice between several GGUF files is the user's to make.
    """
    if bad := [f.path for f in files if not _is_safe(f.path)]:
        raise HubUnavailable(f"{model} lists files with paths that lead out of its folder: {_some(bad)}")
    files = [f for f in files if PurePosixPath(f.path).name != ".gitattributes"]
    if not weights:
        chosen = [f for f in files if _is_side_file(f.path) and not matches(f.path, exclude)]
    elif include:
        chosen = [f for f in files if matches(f.path, include) and not matches(f.path, exclude)]
    elif file is not None:
        chosen = _with_shards(files, file, model) + [f for f in files if _is_side_file(f.path)]
    else:
        chosen = [f for f in _default(files, exclude, model) if not matches(f.path, exclude)]
    if not chosen:
        raise FileNotFound(
            f"no file of {model} matches include={list(include)} exclude={list(exclude)}; "
            f"it has: {_some(f.path for f in files)}"
        )
    return list({f.path: f for f in chosen}.values())


def _is_safe(path: str) -> bool:
    """Whether a path from a hub stays inside the model's folder, and clear of this package's own files there."""
    parts = path.split("/")
    return not any(p in ("", ".", "..") or "\\" in p or "\0" in p for p in parts) and not parts[0].startswith(
        (".kubeinfer", ".incomplete")
    )


def shard_group(path: str) -> str:
    """The name that all shards of one checkpoint share: ``m-00001-of-00002.gguf`` gives ``m.gguf``."""
    return _SHARD.sub("", path)


def _with_shards(files: Sequence[RemoteFile], file: str, model: str) -> list[RemoteFile]:
    if not any(f.path == file for f in files):
        raise FileNotFound(f"{model} has no file {file!r}; it has: {_some(f.path for f in files)}")
    return [f for f in files if shard_group(f.path) == shard_group(file)]


def _default(files: Sequence[RemoteFile], exclude: Sequence[str], model: str) -> list[RemoteFile]:
    kept = [f for f in files if not matches(f.path, exclude)]
    usable = [f for f in kept if not matches(f.path, _OTHER_WEIGHTS)]
    top = [f for f in usable if "/" not in f.path]
    # A format counts by its files beside config.json; only a repository without any is searched deeper.
    for pool in (top, usable):
        for suffixes in ((".safetensors",), (".bin", ".pt", ".pth")):
            weights = [f for f in pool if f.path.endswith(suffixes)]
            if weights:
                weights = _one_variant(weights)
                return weights + [f for f in usable if _is_side_file(f.path)]
    groups = sorted({shard_group(f.path) for f in usable if f.path.lower().endswith(".gguf")})
    groups = [g for g in groups if not PurePosixPath(g).name.lower().startswith("mmproj")] or groups
    if len(groups) > 1:
        raise FileNotFound(
            f"{model} holds {len(groups)} GGUF files, of which one is needed: add its name, as in "
            f"{model}/{groups[0]}, or give an include pattern; it has: {_some(groups)}"
        )
    gguf = [f for f in usable if groups and shard_group(f.path) == groups[0]]
    return gguf + [f for f in usable if _is_side_file(f.path)]


def _one_variant(weights: list[RemoteFile]) -> list[RemoteFile]:
    """Drop second copies of the same weights: ``consolidated.*`` beside ``model*``, ``model.fp16.*`` beside it."""
    names = {PurePosixPath(f.path).name for f in weights}
    if any(n.startswith(("model", "pytorch_model")) for n in names):
        weights = [f for f in weights if not PurePosixPath(f.path).name.startswith("consolidated")]
        variant = re.compile(r"(?:model|pytorch_model)\.(?:fp16|bf16|fp32|non_ema|int8)\b")
        plain = [f for f in weights if not variant.match(PurePosixPath(f.path).name)]
        weights = plain or weights
    return weights


def _is_side_file(path: str) -> bool:
    """Configuration, tokenizer, chat template, code, licence: small, and never weights."""
    name = PurePosixPath(path).name.lower()
    if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", *_MEDIA)) or matches(
        path, _OTHER_WEIGHTS
    ):
        return False
    return "/" not in path or name.endswith((".json", ".jinja", ".txt", ".model", ".py"))


def _some(names: Iterable[str], limit: int = 12) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more if listed else "no files at all"
