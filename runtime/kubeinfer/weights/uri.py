"""What MODEL may be: a folder, a ``.gguf`` file, ``ORG/NAME[@REV]`` or a URI with a scheme."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kubeinfer.weights.errors import InvalidModelId

Scheme = Literal["hf", "modelscope", "file", "pvc"]

HUB_SCHEMES: tuple[Scheme, ...] = ("hf", "modelscope")
USE_MODELSCOPE_ENV = "KUBEINFER_USE_MODELSCOPE"

_ALIASES: dict[str, Scheme] = {
    "hf": "hf",
    "huggingface": "hf",
    "modelscope": "modelscope",
    "ms": "modelscope",
    "file": "file",
    "pvc": "pvc",
}
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?\Z")
_REVISION = re.compile(r"[A-Za-z0-9._/+-]+\Z")
_CLAIM = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?\Z")
_FORMS = (
    "give a folder, a .gguf file, ORG/NAME, ORG/NAME@REV, hf://ORG/NAME@REV, modelscope://ORG/NAME@REV, "
    "file:///PATH or pvc://CLAIM/PATH"
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from, taken apart.

    ``hf`` and ``modelscope`` fill ``repo`` (``ORG/NAME``), ``revision`` (None: the hub's default branch) and
    ``file`` (one file of the repository, for GGUF). ``file`` fills ``path``; ``pvc`` fills ``claim`` and ``path``.
    """

    scheme: Scheme
    repo: str = ""
    revision: str | None = None
    file: str | None = None
    path: str = ""
    claim: str = ""

    @property
    def is_hub(self) -> bool:
        return self.scheme in HUB_SCHEMES

    @property
    def repo_uri(self) -> str:
        """The URI without revision and file: the same for every version of one model."""
        if self.is_hub:
            return f"{self.scheme}://{self.repo}"
        if self.scheme == "pvc":
            return f"pvc://{self.claim}/{self.path}" if self.path else f"pvc://{self.claim}"
        return f"file://{self.path}"

    def with_revision(self, revision: str | None) -> ModelSource:
        """This source at ``revision``; a revision in the URI that differs from it is an error."""
        if revision is None or not self.is_hub:
            return self
        if self.revision is not None and self.revision != revision:
            raise InvalidModelId(
                f"{self} names revision {self.revision!r} and the option says {revision!r}: give the revision once"
            )
        return replace(self, revision=_check_revision(revision, str(self)))

    def __str__(self) -> str:
        if not self.is_hub:
            return self.repo_uri
        file = f"/{self.file}" if self.file else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo_uri}{file}{revision}"


def use_modelscope() -> bool:
    """Whether a plain ``ORG/NAME`` means ModelScope (``KUBEINFER_USE_MODELSCOPE=True``)."""
    return os.environ.get(USE_MODELSCOPE_ENV, "").strip().lower() in ("1", "true", "yes", "on")


def looks_like_path(model: str) -> bool:
    """Whether the text can only be a path, so that a missing one is never looked up on a hub."""
    if "://" in model:
        return False
    if model.startswith(("/", "./", "../", "~")) or model in (".", "..") or model.endswith("/"):
        return True
    return model.lower().endswith(".gguf") and model.count("/") < 2


def parse(model: str) -> ModelSource:
    """Take MODEL apart. Existing folders and files win over hub ids of the same spelling.

    Raises ``InvalidModelId`` (a ``ValueError``) that says what is wrong and what would be right.
    """
    text = model.strip()
    if not text:
        raise InvalidModelId(f"no model given: {_FORMS}")
    scheme_text, separator, rest = text.partition("://")
    if not separator:
        if looks_like_path(text) or Path(text).expanduser().exists():
            return ModelSource("file", path=os.path.expanduser(text))
        return _parse_hub("modelscope" if use_modelscope() else "hf", text, text)
    scheme = _ALIASES.get(scheme_text.lower())
    if scheme is None:
        raise InvalidModelId(f"{text!r}: unknown scheme {scheme_text!r}; {_FORMS}")
    if scheme == "file":
        return _parse_file(rest, text)
    if scheme == "pvc":
        return _parse_pvc(rest, text)
    return _parse_hub(scheme, rest, text)


def _parse_file(rest: str, text: str) -> ModelSource:
    path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    if not path.startswith("/"):
        raise InvalidModelId(f"{text!r}: a file:// URI has an absolute path (three slashes): file:///{rest}")
    return ModelSource("file", path=os.path.normpath(path))


def _parse_pvc(rest: str, text: str) -> ModelSource:
    claim, _, path = rest.partition("/")
    if not _CLAIM.match(claim):
        raise InvalidModelId(
            f"{text!r}: {claim!r} is no name of a PersistentVolumeClaim (lower-case letters, digits, '-' and '.'); "
            "write pvc://CLAIM/PATH"
        )
    if ".." in path.split("/"):
        raise InvalidModelId(f"{text!r}: the path in a claim must not contain '..'")
    return ModelSource("pvc", claim=claim, path=path.strip("/"))


def _parse_hub(scheme: Scheme, rest: str, text: str) -> ModelSource:
    ident, at, revision = rest.partition("@")
    if at and not revision:
        raise InvalidModelId(f"{text!r}: nothing after '@'; name a branch, tag or commit, or leave '@' out")
    parts = ident.split("/")
    if len(parts) < 2 or not all(parts):
        raise InvalidModelId(
            f"{text!r} is neither a file or folder here nor a model id of the form ORG/NAME, for example "
            "Qwen/Qwen3-0.6B"
        )
    org, name, *inner = parts
    for what, value in (("organisation", org), ("name", name)):
        if not _PART.match(value) or ".." in value or "--" in value or len(value) > 96:
            raise InvalidModelId(
                f"{text!r}: {value!r} is no valid {what} of a model: up to 96 letters, digits, '-', '_' and '.', "
                "not starting or ending with '-' or '.', without '--' and '..'"
            )
    if any(piece in (".", "..") for piece in inner):
        raise InvalidModelId(f"{text!r}: a file inside a model must not contain '.' or '..' as a folder")
    file = "/".join(inner) or None
    if file is not None and "://" not in text and not file.lower().endswith(".gguf"):
        raise InvalidModelId(
            f"{text!r} is no file or folder on this machine, and has too many '/' for ORG/NAME; "
            f"for a file inside a hub's model write {scheme}://{rest}"
        )
    return ModelSource(
        scheme, repo=f"{org}/{name}", revision=_check_revision(revision, text) if at else None, file=file
    )


def _check_revision(revision: str, text: str) -> str:
    if not _REVISION.match(revision) or ".." in revision or revision.startswith(("-", "/")):
        raise InvalidModelId(f"{text!r}: {revision!r} is no branch, tag or commit")
    return revision
