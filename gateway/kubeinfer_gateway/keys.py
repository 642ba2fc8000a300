"""API keys: who may call which model, and how often.

Only hashes of keys are kept. Limits are token buckets in this process: with N gateways behind one address a key gets
up to N times its limit, as long as its requests spread evenly.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from time import monotonic
from typing import Annotated

import msgspec

from kubeinfer_gateway.errors import GatewayError

logger = logging.getLogger(__name__)
PREFIX = "ki-"


class KeyEntry(msgspec.Struct, forbid_unknown_fields=True):
    """One key as written in a file or Secret. `models`: served names or patterns such as "qwen*"; limits are per
    minute, and none where absent."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-fA-F]{64}$")]
    models: list[str] = msgspec.field(default_factory=lambda: ["*"])
    requests_per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None
    tokens_per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None


class Bucket:
    """A token bucket that holds one minute's allowance. It may go below zero: what is used is known only afterwards."""

    __slots__ = ("level", "limit", "stamp")

    def __init__(self, per_minute: float, now: float) -> None:
        self.limit = per_minute
        self.level = per_minute
        self.stamp = now

    def refill(self, now: float) -> float:
        self.level = min(self.limit, self.level + (now - self.stamp) * self.limit / 60)
        self.stamp = now
        return self.level

    def wait(self, need: float, now: float) -> float:
        """Seconds until `need` is there; 0 where it is."""
        need = min(need, self.limit)
        return max(0.0, (need - self.refill(now)) * 60 / self.limit)


@dataclass
class ApiKey:
    """A key and what is left of its limits."""

    entry: KeyEntry
    requests: Bucket | None = None
    tokens: Bucket | None = None

    @property
    def name(self) -> str:
        return self.entry.name

    def allows(self, model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in self.entry.models)

    def admit(self, tokens: int) -> None:
        """Counts one request, and `tokens` that it will take at least until `settle` says what it took.

        Raises GatewayError 429 where a limit is used up.
        """
        now = monotonic()
        if self.tokens is not None and (wait := self.tokens.wait(1, now)) > 0:
            raise self._limited("tokens_per_minute", self.tokens.limit, wait)
        if self.requests is not None:
            if (wait := self.requests.wait(1, now)) > 0:
                raise self._limited("requests_per_minute", self.requests.limit, wait)
            self.requests.level -= 1
        if self.tokens is not None:
            self.tokens.level -= tokens

    def settle(self, admitted: int, used: int) -> None:
        if self.tokens is not None:
            self.tokens.refill(monotonic())
            self.tokens.level += admitted - used

    def _limited(self, what: str, limit: float, wait: float) -> GatewayError:
        return GatewayError(
            429,
            f"The API key '{self.name}' has used up its {what} ({limit:g}). Try again in {wait:.0f} s.",
            code=what,
            retry_after=wait,
        )


class KeyStore:
    """The keys in force. `required`: whether requests need one at all."""

    def __init__(self, required: bool) -> None:
        self.required = required
        self._keys: dict[str, ApiKey] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def replace(self, entries: Iterable[KeyEntry]) -> None:
        """Puts new entries in force; a key whose limits stay the same keeps what it has used."""
        now = monotonic()
        keys: dict[str, ApiKey] = {}
        for entry in entries:
            digest = entry.sha256.lower()
            old = self._keys.get(digest)
            keys[digest] = ApiKey(
                entry,
                _bucket(entry.requests_per_minute, old.requests if old else None, now),
                _bucket(entry.tokens_per_minute, old.tokens if old else None, now),
            )
        self._keys = keys

    def authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> ApiKey | None:
        """The caller's key; None where none is needed. Raises GatewayError 401."""
        if not self.required:
            return None
        presented = b""
        for name, value in headers:
            if name == b"authorization":
                scheme, _, rest = value.partition(b" ")
                if scheme.lower() == b"bearer":
                    presented = rest.strip()
            elif name in (b"api-key", b"x-api-key") and not presented:
                presented = value.strip()
        if not presented:
            raise GatewayError(
                401, "No API key was given. Send it as 'Authorization: Bearer KEY'.", code="missing_api_key"
            )
        key = self._keys.get(hashlib.sha256(presented).hexdigest())
        if key is None:
            raise GatewayError(401, "The API key is not valid here.", code="invalid_api_key")
        return key


def _bucket(per_minute: float | None, old: Bucket | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    return old if old is not None and old.limit == per_minute else Bucket(per_minute, now)


_entry = msgspec.json.Decoder(KeyEntry | list[KeyEntry])


def parse_entries(sources: Mapping[str, bytes]) -> tuple[list[KeyEntry], list[str]]:
    """Reads JSON documents (an entry, or a list of them, each) by name. Returns the entries and what was wrong."""
    entries: list[KeyEntry] = []
    problems: list[str] = []
    for name, text in sorted(sources.items()):
        try:
            read = _entry.decode(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            problems.append(f"{name}: {error}")
            continue
        entries += read if isinstance(read, list) else [read]
    return entries, problems


def read_directory(path: Path) -> dict[str, bytes]:
    """The files under a path: itself where it is a file, else each file in it or one folder below (projected volumes
    keep their data in hidden folders, which are skipped)."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    found: dict[str, bytes] = {}
    for child in sorted(path.iterdir()):
        if child.name.startswith("."):
            continue
        if child.is_file():
            found[child.name] = child.read_bytes()
        elif child.is_dir():
            for inner in sorted(child.iterdir()):
                if not inner.name.startswith(".") and inner.is_file():
                    found[f"{child.name}/{inner.name}"] = inner.read_bytes()
    return found


def generate_key(
    name: str, models: list[str], requests_per_minute: float | None, tokens_per_minute: float | None
) -> tuple[str, str]:
    """A new key, and the entry to store in its place (JSON)."""
    key = PREFIX + secrets.token_urlsafe(32)
    entry: dict[str, object] = {
        "name": name,
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "models": models,
    }
    if requests_per_minute is not None:
        entry["requests_per_minute"] = requests_per_minute
    if tokens_per_minute is not None:
        entry["tokens_per_minute"] = tokens_per_minute
    return key, json.dumps(entry)
