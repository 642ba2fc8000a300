"""A local copy of everything the operator made, kept by list and watch.

A reader never asks the API server. A list that follows a broken watch replaces the copy, so that what was deleted
meanwhile is gone here too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from kubeinfer_operator.kube import Kind, Kube, KubeError, Manifest

logger = logging.getLogger("kubeinfer.operator.store")

Key = tuple[str, str]
Changed = Callable[[Kind, Manifest, bool], None]  # the object, and whether it was deleted
WATCH_SECONDS = 240


def key_of(obj: Manifest) -> Key:
    """Namespace (empty for what has none) and name."""
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def slim(obj: Manifest) -> Manifest:
    """Without what the operator never reads and what takes most of the memory."""
    obj["metadata"].pop("managedFields", None)
    return obj


def is_older(obj: Manifest, known: Manifest | None) -> bool:
    """Whether ``obj`` is an earlier version of ``known``: an event that was overtaken by the answer to a write."""
    if known is None or known["metadata"].get("uid") != obj["metadata"].get("uid"):
        return False
    one, other = obj["metadata"].get("resourceVersion", ""), known["metadata"].get("resourceVersion", "")
    return one.isdigit() and other.isdigit() and int(one) < int(other)


class Cache:
    """Objects of one kind, by key and by one label."""

    def __init__(self, label: str) -> None:
        self._objects: dict[Key, Manifest] = {}
        self._label = label
        self._by_label: dict[Key, dict[str, Manifest]] = {}

    def get(self, namespace: str, name: str) -> Manifest | None:
        return self._objects.get((namespace, name))

    def labelled(self, namespace: str, value: str) -> list[Manifest]:
        """Objects whose label is ``value``, oldest name first."""
        found = self._by_label.get((namespace, value), {})
        return [found[name] for name in sorted(found)]

    def __iter__(self) -> Iterator[Manifest]:
        return iter(list(self._objects.values()))

    def __len__(self) -> int:
        return len(self._objects)

    def put(self, obj: Manifest, *, force: bool = False) -> bool:
        """Take an object in, unless a newer version of it is here; ``force`` after a list, which is the truth."""
        key = key_of(obj)
        if not force and is_older(obj, self._objects.get(key)):
            return False
        self.drop(key)
        self._objects[key] = obj
        value = obj["metadata"].get("labels", {}).get(self._label)
        if value is not None:
            self._by_label.setdefault((key[0], value), {})[key[1]] = obj
        return True

    def drop(self, key: Key) -> Manifest | None:
        old = self._objects.pop(key, None)
        if old is not None:
            value = old["metadata"].get("labels", {}).get(self._label)
            names = self._by_label.get((key[0], value)) if value is not None else None
            if names is not None:
                names.pop(key[1], None)
                if not names:
                    del self._by_label[(key[0], value)]
        return old

    def keys(self) -> set[Key]:
        return set(self._objects)


class Reflector:
    """Keeps a :class:`Cache` equal to what the API server has, and says what changed."""

    def __init__(
        self,
        kube: Kube,
        kind: Kind,
        cache: Cache,
        changed: Changed,
        *,
        namespace: str | None = None,
        selector: str = "",
    ) -> None:
        self.kind = kind
        self.synced = asyncio.Event()
        self.last_heard = time.monotonic()
        self._kube, self._cache, self._changed = kube, cache, changed
        self._namespace, self._selector = namespace, selector

    async def run(self) -> None:
        """List and watch until cancelled; errors are waited out, never passed on."""
        version, backoff = "", 0.5
        while True:
            try:
                if not version:
                    version = await self._list()
                version = await self._watch(version)
                backoff = 0.5
            except TimeoutError:
                logger.warning("watch of %s went silent; connecting again", self.kind.plural)
            except KubeError as error:
                if error.status:
                    # The server cannot go on from there (410) or says no: begin with a list again.
                    version = ""
                    if error.status == 410:
                        continue
                log = logger.warning if backoff < 1 else logger.debug
                log("%s: %s; trying again", self.kind.plural, error)
                await asyncio.sleep(backoff * random.uniform(0.8, 1.2))
                backoff = min(backoff * 2, 3.0)

    async def _list(self) -> str:
        listed = await self._kube.list(self.kind, self._namespace, selector=self._selector)
        self.last_heard = time.monotonic()
        seen = set()
        for item in listed["items"]:
            item.setdefault("kind", self.kind.kind)
            item.setdefault("apiVersion", self.kind.api_version)
            seen.add(key_of(item))
            self._take(item, force=True)
        for key in self._cache.keys() - seen:
            if self._namespace is None or key[0] == self._namespace:
                gone = self._cache.drop(key)
                if gone is not None:
                    self._changed(self.kind, gone, True)
        self.synced.set()
        return str(listed["metadata"]["resourceVersion"])

    async def _watch(self, version: str) -> str:
        events = self._kube.watch(
            self.kind, self._namespace, selector=self._selector, version=version, seconds=WATCH_SECONDS
        )
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            async for event in events:
                self.last_heard = time.monotonic()
                obj = event["object"]
                if event["type"] == "ERROR":
                    raise KubeError(
                        int(obj.get("code", 0)), str(obj.get("message", "")), str(obj.get("reason", ""))
                    )
                version = obj["metadata"]["resourceVersion"]
                if event["type"] == "BOOKMARK":
                    continue
                if event["type"] == "DELETED":
                    self._cache.drop(key_of(obj))
                    self._changed(self.kind, obj, True)
                else:
                    self._take(obj)
        self.last_heard = time.monotonic()
        return version

    def _take(self, obj: Manifest, *, force: bool = False) -> None:
        old = self._cache.get(*key_of(obj))
        if old is not None and old["metadata"]["resourceVersion"] == obj["metadata"]["resourceVersion"]:
            return
        if self._cache.put(slim(obj), force=force):
            self._changed(self.kind, obj, False)


def silent_for(reflectors: list[Reflector]) -> float:
    """Seconds since the least lively of them heard of the API server."""
    return max((time.monotonic() - r.last_heard for r in reflectors), default=0.0)


def subset(wanted: Any, found: Any) -> bool:
    """Whether ``found`` has all that ``wanted`` asks for; what the server adds is no difference."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return found is None and not wanted
        return all(subset(value, found.get(key)) for key, value in wanted.items())
    if wanted is None or wanted == [] or wanted == "":
        return not found
    if isinstance(wanted, list):
        return isinstance(found, list) and len(wanted) == len(found) and all(map(subset, wanted, found))
    if wanted == found:
        return True
    return (
        isinstance(wanted, str | int | float)
        and isinstance(found, str | int | float)
        and same_quantity(wanted, found)
    )


_FACTORS = {
    "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60,
}  # fmt: skip


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity as a number. Raises ``ValueError``."""
    word = str(text).strip()
    for length in (2, 1, 0):
        suffix = word[len(word) - length :] if length else ""
        if suffix in _FACTORS and len(suffix) == length:
            return float(word[: len(word) - length]) * _FACTORS[suffix]
    raise ValueError(f"{text!r} is no quantity")


def same_quantity(one: str | float, other: str | float) -> bool:
    """Whether two spellings mean one quantity (``1000m`` and ``1``)."""
    if isinstance(one, bool) or isinstance(other, bool):
        return False
    try:
        return quantity(one) == quantity(other)
    except ValueError:
        return False
