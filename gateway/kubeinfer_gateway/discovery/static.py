"""Models from flags or a file: for `kubeinfer up`, tests, benchmarks and machines without Kubernetes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import yaml

from kubeinfer_gateway.discovery.base import Discovery, DiscoveryError
from kubeinfer_gateway.registry import EndpointSpec, ModelSpec, Registry

logger = logging.getLogger(__name__)


class _StaticModel(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    urls: list[str] = msgspec.field(default_factory=list)
    served_names: list[str] = msgspec.field(default_factory=list)


class _StaticFile(msgspec.Struct, forbid_unknown_fields=True):
    models: list[_StaticModel]


def parse_url(url: str) -> EndpointSpec:
    """http://HOST:PORT or https://HOST:PORT. Raises DiscoveryError."""
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        port = parts.port
    except ValueError as error:
        raise DiscoveryError(f"'{url}' is not a URL: {error}") from None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.path not in ("", "/", "/v1", "/v1/")
    ):
        raise DiscoveryError(f"'{url}' is not the address of a runtime; write http://HOST:PORT")
    tls = parts.scheme == "https"
    port = port or (443 if tls else 80)
    return EndpointSpec(url, parts.hostname, port, tls)


def parse_flag(text: str) -> ModelSpec:
    """NAME=URL[,URL...]. Raises DiscoveryError."""
    name, equals, urls = text.partition("=")
    if not equals or not name:
        raise DiscoveryError(f"--upstream '{text}': write NAME=URL[,URL...]")
    endpoints = tuple(parse_url(url.strip()) for url in urls.split(",") if url.strip())
    return ModelSpec(f"static/{name}", (name,), 0.0, endpoints)


def read_file(path: Path) -> list[ModelSpec]:
    """Models from a YAML (or JSON) file. Raises DiscoveryError."""
    try:
        value: Any = yaml.safe_load(path.read_text())
        models = msgspec.convert(value, _StaticFile).models
    except (OSError, yaml.YAMLError, msgspec.ValidationError, UnicodeError) as error:
        raise DiscoveryError(f"--upstream-file {path}: {error}") from None
    return [
        ModelSpec(
            model.name if "/" in model.name else f"static/{model.name}",
            tuple(model.served_names or [model.name.rpartition("/")[2]]),
            float(index),
            tuple(parse_url(url) for url in model.urls),
        )
        for index, model in enumerate(models)
    ]


class StaticDiscovery(Discovery):
    """A fixed list, or a file that is looked at again every `interval` seconds."""

    def __init__(
        self, registry: Registry, flags: Sequence[str] = (), file: Path | None = None, interval: float = 1.0
    ) -> None:
        super().__init__(registry)
        if not flags and file is None:
            raise DiscoveryError("--discovery static needs --upstream NAME=URL or --upstream-file FILE")
        self._fixed = [parse_flag(flag) for flag in flags]
        self._file = file
        self._interval = interval

    def load(self) -> None:
        """Puts the list in force. Raises DiscoveryError."""
        models = self._fixed + (read_file(self._file) if self._file is not None else [])
        for gone in self.registry.models.keys() - {model.key for model in models}:
            self.registry.remove(gone)
        for model in models:
            self.registry.put(model)
        self.registry.synced = True

    async def run(self) -> None:
        stamp = self._stamp()
        self.load()
        while True:
            await asyncio.sleep(self._interval)
            if (now := self._stamp()) != stamp:
                stamp = now
                try:
                    self.load()
                    logger.info("read %s again: %d models", self._file, len(self.registry.models))
                except DiscoveryError as error:
                    logger.error("%s; keeping what was read before", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        if self._file is None:
            return None
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
