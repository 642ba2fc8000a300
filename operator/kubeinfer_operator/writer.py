"""Carries out what a reconcile asks for, and leaves out writes that would change nothing."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

from kubeinfer_operator import names
from kubeinfer_operator.conditions import stamp
from kubeinfer_operator.config import MANAGER
from kubeinfer_operator.kube import EVENTS, JOBS, KINDS, MODELS, REVISIONS, Kube, KubeError, Manifest
from kubeinfer_operator.outcome import Action, Annotate, Apply, Delete
from kubeinfer_operator.store import key_of, subset
from kubeinfer_operator.world import World

# Written once and never again: a Job's pod template cannot be changed, a record must not be.
_WRITE_ONCE = (JOBS, REVISIONS)


class Refusal(Exception):
    """The API server refuses a write for a reason that a person must see."""

    def __init__(self, action: Action, error: KubeError) -> None:
        self.kind = KINDS[action.manifest["kind"]] if isinstance(action, Apply) else action.kind
        name = action.manifest["metadata"]["name"] if isinstance(action, Apply) else action.name
        # Some refusals go on with a dump of the object.
        said = error.message.strip().splitlines()[0][:400] if error.message.strip() else error.reason
        super().__init__(f"the API server refuses {self.kind.kind} {name}: {said}")
        self.status = error.status
        self.error = error


def stamped(manifest: Manifest) -> Manifest:
    """``manifest`` with its own hash in an annotation, by which fields that are no longer wanted are noticed."""
    meta = manifest["metadata"]
    notes = {**meta.get("annotations", {}), names.ANNOTATION_APPLIED: names.digest(manifest, 16)}
    return {**manifest, "metadata": {**meta, "annotations": notes}}


def is_so_already(manifest: Manifest, live: Manifest) -> bool:
    """Whether applying ``manifest`` (stamped) would change nothing in ``live``."""
    have = (live["metadata"].get("annotations") or {}).get(names.ANNOTATION_APPLIED)
    if have != manifest["metadata"]["annotations"][names.ANNOTATION_APPLIED]:
        return False
    content = {key: value for key, value in manifest.items() if key not in ("apiVersion", "kind", "metadata")}
    meta = {
        key: manifest["metadata"][key] for key in ("labels", "ownerReferences") if key in manifest["metadata"]
    }
    return subset(content, live) and subset(meta, live["metadata"])


class Writer:
    """Writes of one operator. What the API server answers goes into the caches at once."""

    def __init__(self, kube: Kube, world: World) -> None:
        self._kube, self._world = kube, world

    async def perform(self, actions: list[Action]) -> int:
        """Do ``actions`` in order; returns how many were needed. Raises :class:`KubeError`, or :class:`Refusal`, which of a ``status`` of 500
        and more may pass by itself."""
        done = 0
        for action in actions:
            try:
                done += await self._one(action)
            except KubeError as error:
                lasting = error.status in (400, 403, 422) or error.status >= 500
                if lasting or (error.status == 409 and "being deleted" not in error.message):
                    raise Refusal(action, error) from error
                raise
        return done

    async def _one(self, action: Action) -> int:
        if isinstance(action, Apply):
            return await self._apply(action.manifest)
        if isinstance(action, Delete):
            await self._kube.delete(action.kind, action.namespace, action.name, uid=action.uid)
            return 1
        return await self._annotate(action)

    async def _apply(self, manifest: Manifest) -> int:
        kind = KINDS[manifest["kind"]]
        live = self._world.get(kind, *key_of(manifest))
        wanted = stamped(manifest)
        if live is not None and (kind in _WRITE_ONCE or is_so_already(wanted, live)):
            return 0
        answer = await self._kube.apply(wanted)
        answer["metadata"].pop("managedFields", None)
        self._world.caches[kind].put(answer)
        return 1

    async def _annotate(self, action: Annotate) -> int:
        live = self._world.get(action.kind, action.namespace, action.name)
        if live is not None and _has(live["metadata"], action.metadata):
            return 0
        answer = await self._kube.patch_metadata(action.kind, action.namespace, action.name, action.metadata)
        answer["metadata"].pop("managedFields", None)
        self._world.caches[action.kind].put(answer)
        return 1

    async def status(self, model: Manifest, status: dict[str, Any]) -> Manifest | None:
        """Patch what is different; returns the new object, or None when nothing is or the model is gone."""
        patch = difference(model.get("status") or {}, status)
        if not patch:
            return None
        try:
            return await self._kube.patch_status(MODELS, *key_of(model), patch)
        except KubeError as error:
            if error.not_found:
                return None
            raise

    async def event(self, model: Manifest, kind: str, reason: str, message: str) -> None:
        """An Event on the model. Losing one is no failure."""
        namespace, name = key_of(model)
        now = stamp(datetime.now(UTC))
        manifest = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"namespace": namespace, "name": f"{name}.{uuid.uuid4().hex[:16]}"},
            "type": kind,
            "reason": reason,
            "message": message[:1000],
            "involvedObject": {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "name": name,
                "namespace": namespace,
                "uid": model["metadata"]["uid"],
                "resourceVersion": model["metadata"].get("resourceVersion", ""),
            },
            "source": {"component": MANAGER},
            "reportingComponent": MANAGER,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        await self._kube.create(EVENTS, manifest)


def _has(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    for key, value in wanted.items():
        have = found.get(key)
        if isinstance(value, dict):
            if not _has(have or {}, value):
                return False
        elif value is None:
            if have is not None:
                return False
        elif have != value:
            return False
    return True


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The JSON merge patch that makes ``after`` of ``before``: null for what is no more, lists whole."""
    patch: dict[str, Any] = {key: None for key in before if key not in after}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            inner = difference(old, value)
            if inner:
                patch[key] = inner
        elif value is None:
            if key in before:
                patch[key] = None
        elif old != value:
            patch[key] = value
    return patch
