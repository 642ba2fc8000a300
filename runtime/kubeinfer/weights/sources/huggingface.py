"""Models on Hugging Face, or on a mirror that speaks its API, through ``huggingface_hub``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from kubeinfer.weights.errors import (
    Forbidden,
    HubUnavailable,
    InvalidModelId,
    ModelNotFound,
    NetworkUnreachable,
    RevisionNotFound,
    TooManyRequests,
    WeightsError,
)
from kubeinfer.weights.sources.base import (
    FileRequest,
    RemoteFile,
    ResolvedModel,
    WeightSource,
    home,
    retry_after,
    root_cause,
)
from kubeinfer.weights.uri import ModelSource

DEFAULT_ENDPOINT = "https://huggingface.co"
_API_TIMEOUT = 20.0
_ATTEMPTS = 3
_LONGEST_WAIT = 60.0  # seconds


class HuggingFaceSource(WeightSource):
    """``HF_ENDPOINT``, ``HF_TOKEN`` (or the token file of a login) and ``HF_HOME``/``HF_HUB_CACHE`` hold."""

    backoff: ClassVar[float] = 0.5  # seconds before the second attempt to resolve

    def __init__(self, model: ModelSource, *, token: str | None = None, endpoint: str | None = None) -> None:
        super().__init__(model, token=token, endpoint=endpoint)
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        if self.token is None:
            # The SDK reads some of its environment at import only; these two are read here, now.
            self.token = (
                os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or _login_token()
            )

    def resolve(self) -> ResolvedModel:
        # Unlike the other SDK, this one asks once.
        for attempt in range(_ATTEMPTS):
            try:
                return self._resolve_once()
            except (NetworkUnreachable, HubUnavailable, TooManyRequests) as error:
                wait = error.details.get("retryAfter", self.backoff * 2**attempt)
                if attempt == _ATTEMPTS - 1 or wait > _LONGEST_WAIT:
                    raise
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _resolve_once(self) -> ResolvedModel:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(endpoint=self.endpoint, token=self.token or False, library_name="kubeinfer")
        try:
            info = api.model_info(self.model.repo, revision=self.model.revision, timeout=_API_TIMEOUT)
            commit = str(info.sha)
            files = [
                RemoteFile(
                    path=entry.path,
                    size=int(entry.lfs.size if entry.lfs else entry.size),
                    sha256=entry.lfs.sha256 if entry.lfs else None,
                    git_sha1=None if entry.lfs else entry.blob_id,
                )
                for entry in api.list_repo_tree(self.model.repo, revision=commit, recursive=True)
                if isinstance(entry, RepoFile)
            ]
        except WeightsError:
            raise
        except Exception as error:
            raise self._explain(error) from error
        return ResolvedModel(self.model, commit, tuple(files), self.endpoint)

    def request_for(self, resolved: ResolvedModel, file: RemoteFile) -> FileRequest:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.model.repo, file.path, revision=resolved.revision, endpoint=self.endpoint)
        return FileRequest(url, {"Authorization": f"Bearer {self.token}"} if self.token else {})

    def cache_dir(self) -> Path:
        env = os.environ
        if cache := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
            return Path(cache).expanduser()
        if hf_home := env.get("HF_HOME"):
            return Path(hf_home).expanduser() / "hub"
        return Path(env.get("XDG_CACHE_HOME") or home() / ".cache") / "huggingface" / "hub"

    def cached_snapshots(self, cache_dir: Path) -> list[Path]:
        folder = cache_dir / repo_folder(self.model.repo)
        wanted = self.model.revision or "main"
        try:
            commit = (folder / "refs" / wanted).read_text().strip()
        except OSError:
            commit = wanted
        snapshot = folder / "snapshots" / commit
        return [snapshot] if snapshot.is_dir() else []

    def _explain(self, error: Exception) -> WeightsError:
        from huggingface_hub import errors as hf

        model, host = self.model, urlsplit(self.endpoint).netloc
        response: Any = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(error, hf.HFValidationError):
            return InvalidModelId(f"{model}: {error}")
        if isinstance(error, hf.OfflineModeIsEnabled):
            return NetworkUnreachable(
                f"{model}: HF_HUB_OFFLINE is set, so {host} was not asked; unset it or name a local folder"
            )
        if isinstance(error, hf.RevisionNotFoundError):
            return RevisionNotFound(
                f"{model.repo_uri} exists on {host}, but has no branch, tag or commit {model.revision!r}; "
                "correct what stands after '@' or leave it out for the default branch",
            )
        if isinstance(error, hf.GatedRepoError):
            return Forbidden(
                f"{model.repo_uri} is gated on {host}: accept its terms on its page there with the account of the "
                + (
                    "token in use"
                    if self.token
                    else "token, and set HF_TOKEN or --token-file to a token of it"
                )
            )
        if isinstance(error, hf.RepositoryNotFoundError):
            return ModelNotFound(
                f"{host} has no model {model.repo!r}, or it is private and "
                + (
                    "the token in use may not read it"
                    if self.token
                    else "no token was given (HF_TOKEN, --token-file)"
                )
                + "; check the spelling of ORG/NAME"
            )
        if isinstance(error, hf.DisabledRepoError) or status in (401, 403):
            return Forbidden(
                f"{host} refuses {model.repo_uri} (HTTP {status}): "
                + (
                    "the token in use is not valid there or may not read it"
                    if self.token
                    else "it wants a token"
                )
                + "; set HF_TOKEN or --token-file"
            )
        if status == 429:
            return TooManyRequests(
                f"{host} limits the rate of requests (HTTP 429) while resolving {model}; try later",
                retryAfter=retry_after(response.headers.get("Retry-After")),
            )
        if status is not None and status >= 500:
            return HubUnavailable(
                f"{host} answered HTTP {status} while resolving {model}; try later or use a mirror"
            )
        if is_network_error(error):
            return NetworkUnreachable(unreachable_message(str(model), host, error, "HF_ENDPOINT"))
        return HubUnavailable(f"{host} gave no usable answer for {model}: {type(error).__name__}: {error}")


def repo_folder(repo: str) -> str:
    """The folder of a model in the Hugging Face cache."""
    return "models--" + repo.replace("/", "--")


def is_network_error(error: BaseException) -> bool:
    """Whether an SDK's error means that no answer came, whatever HTTP library that version uses."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        names = {cls.__name__ for cls in type(current).__mro__}
        if names & {
            "TransportError",
            "ConnectionError",
            "ConnectTimeout",
            "TimeoutError",
            "Timeout",
            "gaierror",
        }:
            return True
        current = current.__cause__ or current.__context__
    return False


def unreachable_message(model: str, host: str, error: BaseException, variable: str) -> str:
    """What to say, and to do, when a hub does not answer."""
    return (
        f"cannot reach {host} for {model} ({root_cause(error)}). Check network, proxy and DNS; or set {variable} to a mirror, "
        "give --mirror with another hub, or name a local folder that holds the model"
    )


def _login_token() -> str | None:
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token
