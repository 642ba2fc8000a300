"""What fetching a model would mean, without fetching its weights: for the operator's plan and ``--resolve-only``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from kubeinfer.weights.download import resolve_any
from kubeinfer.weights.errors import HubUnavailable, WeightsError
from kubeinfer.weights.request import make_request
from kubeinfer.weights.sources import RemoteFile, ResolvedModel, WeightSource
from kubeinfer.weights.uri import ModelSource

_CONFIG_LIMIT = 4 << 20  # bytes; a config.json is a few KiB


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model at a commit, the files that a pull would fetch and its ``config.json`` (None: it has none, as a
    GGUF repository)."""

    source: str
    revision: str
    files: tuple[RemoteFile, ...]
    config: dict[str, Any] | None

    @property
    def total_bytes(self) -> int:
        return sum(f.size for f in self.files)

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "revision": self.revision,
            "totalBytes": self.total_bytes,
            "files": [asdict(f) for f in self.files],
            "config": self.config,
        }


def resolve(
    model: str | ModelSource,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mirrors: Sequence[str] = (),
    token: str | None = None,
) -> ModelPlan:
    """Resolve ``model`` (else the first mirror that answers). Blocks for a few small requests; raises a
    ``WeightsError``. Any thread may call it."""
    request = make_request(
        model, revision=revision, include=include, exclude=exclude, mirrors=mirrors, token=token
    )
    source, resolved, files = resolve_any(request)
    return ModelPlan(source.model.repo_uri, resolved.revision, tuple(files), _read_config(source, resolved))


def _read_config(source: WeightSource, resolved: ResolvedModel) -> dict[str, Any] | None:
    file = next((f for f in resolved.files if f.path == "config.json"), None)
    if file is None or file.size > _CONFIG_LIMIT:
        return None
    request = source.request_for(resolved, file)
    parts = urlsplit(request.url)
    if parts.scheme == "file":
        data = Path(unquote(parts.path)).read_bytes()
    else:
        data = _get(request.url, request.headers, str(resolved))
    try:
        config = json.loads(data)
    except ValueError as error:
        raise HubUnavailable(f"config.json of {resolved} is no JSON: {error}") from error
    return config if isinstance(config, dict) else None


def _get(url: str, headers: dict[str, str], model: str) -> bytes:
    import requests

    from kubeinfer.weights.errors import Forbidden, NetworkUnreachable

    error: WeightsError | None = None
    for _ in range(3):
        try:
            with contextlib.closing(requests.get(url, headers=headers, timeout=20)) as response:
                if response.status_code == 200:
                    return bytes(response.content)
                host, status = urlsplit(url).netloc, response.status_code
                error = HubUnavailable(f"{host} answers HTTP {status} for config.json of {model}")
                if status in (401, 403):
                    raise Forbidden(
                        f"{host} refuses config.json of {model} (HTTP {status}): the token may not read it"
                    )
        except requests.exceptions.RequestException as failure:
            error = NetworkUnreachable(
                f"cannot read config.json of {model} from {urlsplit(url).netloc}: {failure}"
            )
    assert error is not None
    raise error
