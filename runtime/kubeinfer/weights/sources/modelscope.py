"""Models on ModelScope, through the hub half of its SDK (``modelscope_hub``; ``import modelscope`` loads torch)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
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
from kubeinfer.weights.sources.base import FileRequest, RemoteFile, ResolvedModel, WeightSource, home
from kubeinfer.weights.sources.huggingface import is_network_error, unreachable_message
from kubeinfer.weights.uri import ModelSource

DEFAULT_ENDPOINT = "https://modelscope.cn"
DEFAULT_REVISION = "master"
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class ModelScopeSource(WeightSource):
    """``MODELSCOPE_ENDPOINT`` (or the older ``MODELSCOPE_DOMAIN``), ``MODELSCOPE_API_TOKEN`` (or the SDK's
    login) and ``MODELSCOPE_CACHE`` hold."""

    def __init__(self, model: ModelSource, *, token: str | None = None, endpoint: str | None = None) -> None:
        super().__init__(model, token=token, endpoint=endpoint)
        asked = endpoint or os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or ""
        self._endpoint_given = bool(asked.strip())
        asked = asked.strip() or DEFAULT_ENDPOINT
        self.endpoint = (asked if "://" in asked else f"https://{asked}").rstrip("/")
        self._hub: Any = None
        if self.token is None:
            self.token = os.environ.get("MODELSCOPE_API_TOKEN") or os.environ.get("MODELSCOPE_SDK_TOKEN")

    def _api(self) -> Any:
        if self._hub is None:
            # The SDK looks for a home when it is imported, and a container's user may have none.
            os.environ.setdefault("HOME", str(home()))
            from modelscope_hub import HubApi, HubConfig

            # The endpoint goes to the constructor: the SDK warns where it finds MODELSCOPE_DOMAIN by itself.
            config = HubConfig(endpoint=self.endpoint, token=self.token)
            self.token = config.token
            self._hub = HubApi(config=config, user_agent="kubeinfer")
        return self._hub

    def resolve(self) -> ResolvedModel:
        asked = self.model.revision or DEFAULT_REVISION
        try:
            # HubApi.list_repo_files drops the commit of each entry, so the listing is taken one layer down.
            entries = self._api().legacy.list_repo_files(self.model.repo, "model", revision=asked)
        except Exception as error:
            if not self._endpoint_given and _status(error) == 404 and self._other_site():
                return self.resolve()
            raise self._explain(error) from error
        if not entries:
            # The hub answers an unknown revision of some models with an empty list.
            self._check_revision_exists()
        files = tuple(
            RemoteFile(path=str(e["Path"]), size=int(e.get("Size") or 0), sha256=_sha256(e.get("Sha256")))
            for e in entries
            if e.get("Type") != "tree"
        )
        return ResolvedModel(self.model, _newest_commit(entries, asked), files, self.endpoint)

    def request_for(self, resolved: ResolvedModel, file: RemoteFile) -> FileRequest:
        url = self._api().legacy.get_download_url(self.model.repo, "model", file.path, resolved.revision)
        if not self.token:
            return FileRequest(url)
        return FileRequest(
            url, {"Authorization": f"Bearer {self.token}", "Cookie": f"m_session_id={self.token}"}
        )

    def cache_dir(self) -> Path:
        cache = os.environ.get("MODELSCOPE_CACHE")
        return Path(cache).expanduser() if cache else home() / ".cache" / "modelscope"

    def cached_snapshots(self, cache_dir: Path) -> list[Path]:
        org, name = self.model.repo.split("/")
        snapshots = cache_dir / "models" / f"{org}--{name}" / "snapshots"
        revision = self.model.revision
        found = [snapshots / r for r in ([revision] if revision else [DEFAULT_REVISION, "main"])]
        if revision in (None, DEFAULT_REVISION):
            # SDKs before 1.38 kept one unversioned folder, with '.' spelled '___'.
            old = name.replace(".", "___")
            found += [cache_dir / "models" / org / old, cache_dir / "hub" / "models" / org / old]
        return [folder for folder in found if folder.is_dir()]

    def _other_site(self) -> bool:
        """Switch to the international site when the model lives there."""
        from modelscope_hub import HubApi, HubConfig

        try:
            self.endpoint = HubApi(config=HubConfig(token=self.token)).resolve_endpoint_for_read(
                self.model.repo
            )
        except Exception:
            return False
        self._endpoint_given, self._hub = True, None
        return True

    def _revisions(self) -> Sequence[str] | None:
        try:
            return [
                str(r.get("Revision") or r.get("name"))
                for r in self._api().list_repo_revisions(self.model.repo, "model")
            ]
        except Exception:
            return None

    def _check_revision_exists(self) -> None:
        known = self._revisions()
        if (
            known
            and self.model.revision not in (None, *known)
            and not _COMMIT.match(self.model.revision or "")
        ):
            raise self._revision_error(known)

    def _revision_error(self, known: Sequence[str]) -> RevisionNotFound:
        host = urlsplit(self.endpoint).netloc
        return RevisionNotFound(
            f"{self.model.repo_uri} exists on {host}, but has no branch, tag or commit "
            f"{self.model.revision or DEFAULT_REVISION!r}; it has: {', '.join(known[:12]) or 'none'}"
        )

    def _explain(self, error: Exception) -> WeightsError:
        if isinstance(error, WeightsError):
            return error
        model, host, status = self.model, urlsplit(self.endpoint).netloc, _status(error)
        if status in (400, 404):
            known = self._revisions()
            if known is not None and (model.revision or DEFAULT_REVISION) not in known:
                return self._revision_error(known)
            if status == 404:
                return ModelNotFound(
                    f"{host} has no model {model.repo!r}, or it is private and "
                    + (
                        "the token in use may not read it"
                        if self.token
                        else "no token was given (MODELSCOPE_API_TOKEN)"
                    )
                    + "; check the spelling of ORG/NAME"
                )
            return InvalidModelId(f"{host} does not accept {model}: {_first_line(error)}")
        if status in (401, 403):
            return Forbidden(
                f"{host} refuses {model.repo_uri} (HTTP {status}): "
                + (
                    "the token in use is not valid there or may not read it"
                    if self.token
                    else "it wants a token"
                )
                + "; set MODELSCOPE_API_TOKEN or --token-file"
            )
        if status == 429:
            return TooManyRequests(
                f"{host} limits the rate of requests (HTTP 429) while resolving {model}; try later"
            )
        if status is not None and status >= 500:
            return HubUnavailable(
                f"{host} answered HTTP {status} while resolving {model}; try later or use a mirror"
            )
        if is_network_error(error):
            return NetworkUnreachable(unreachable_message(str(model), host, error, "MODELSCOPE_ENDPOINT"))
        return HubUnavailable(
            f"{host} gave no usable answer for {model}: {type(error).__name__}: {_first_line(error)}"
        )


def _newest_commit(entries: Sequence[dict[str, Any]], asked: str) -> str:
    """The commit of the newest change listed: the hub has no call that turns a branch into its commit.

    Files removed by a later commit are not in the listing, and all that are in it are the same at this one.
    """
    if _COMMIT.match(asked):
        return asked
    commits = [e for e in entries if _COMMIT.match(str(e.get("Revision") or ""))]
    newest = max(commits, key=lambda e: int(e.get("CommittedDate") or 0), default=None)
    return str(newest["Revision"]) if newest else asked


def _sha256(value: Any) -> str | None:
    text = str(value or "").lower()
    return text if _SHA256.match(text) else None


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status_code", None)
    return int(status) if status is not None else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
