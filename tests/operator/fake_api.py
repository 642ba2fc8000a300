"""A small Kubernetes API server on loopback: lists, watches, server-side apply, merge patches, status, deletion, logs.

It holds objects of any kind, knows nothing of their meaning, and collects what has lost its owner. Faults: connections can
be cut and watches made silent.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from typing import Any

from aiohttp import web

Object = dict[str, Any]
RESOURCES = {
    "v1": {"pods": "Pod", "services": "Service", "persistentvolumeclaims": "PersistentVolumeClaim",
           "serviceaccounts": "ServiceAccount", "events": "Event", "secrets": "Secret", "nodes": "Node", "namespaces": "Namespace"},
    "apps/v1": {"deployments": "Deployment", "controllerrevisions": "ControllerRevision"},
    "batch/v1": {"jobs": "Job"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "storage.k8s.io/v1": {"storageclasses": "StorageClass"},
    "apiextensions.k8s.io/v1": {"customresourcedefinitions": "CustomResourceDefinition"},
    "kubeinfer.io/v1alpha1": {"inferencemodels": "InferenceModel"},
}  # fmt: skip
CLUSTERWIDE = ("nodes", "storageclasses", "namespaces", "customresourcedefinitions")


def _merge(target: Object, patch: Object) -> Object:
    out = dict(target)
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict):
            inner = out.get(key)
            out[key] = _merge(inner if isinstance(inner, dict) else {}, value)
        else:
            out[key] = value
    return out


class FakeApi:
    """``objects`` by (group version, plural, namespace, name)."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str, str], Object] = {}
        self.calls: list[tuple[str, str]] = []
        self.logs: dict[str, str] = {}
        self.deny: dict[str, tuple[int, str]] = {}
        self._version = itertools.count(1)
        self._uid = itertools.count(1)
        self._watchers: list[tuple[str, str, str, dict[str, str], asyncio.Queue[Object | None]]] = []
        self._runner: web.AppRunner | None = None
        self.port = 0
        self._oldest = 0

    async def start(self, port: int = 0) -> None:
        """History is lost with a restart: a watch from before it gets 410, as after a compaction."""
        self._oldest = next(self._version)
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port or self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Every connection ends at once; the objects stay, as in etcd."""
        for *_, queue in self._watchers:
            queue.put_nowait(None)
        self._watchers.clear()
        if self._runner is not None:
            await self._runner.cleanup()

    # What tests do to the cluster

    def all(self, plural: str) -> list[Object]:
        return [obj for (_, kind, _, _), obj in sorted(self.objects.items()) if kind == plural]

    def get(self, plural: str, name: str, namespace: str = "default") -> Object | None:
        return next(
            (o for (_, k, ns, n), o in self.objects.items() if (k, ns, n) == (plural, namespace, name)), None
        )

    def put(self, version: str, plural: str, obj: Object) -> Object:
        obj = copy.deepcopy(obj)
        meta = obj["metadata"]
        if plural not in CLUSTERWIDE:
            meta.setdefault("namespace", "default")
        key = (version, plural, meta.get("namespace", ""), meta["name"])
        old = self.objects.get(key)
        meta.setdefault("uid", old["metadata"]["uid"] if old else f"uid-{next(self._uid)}")
        meta.setdefault(
            "creationTimestamp", old["metadata"]["creationTimestamp"] if old else "2026-01-01T00:00:00Z"
        )
        if old is not None and {**old, "metadata": 0} == {**obj, "metadata": 0} and _same_meta(old, obj):
            return old
        changed = old is None or old.get("spec") != obj.get("spec")
        meta["generation"] = (old["metadata"]["generation"] + changed) if old else 1
        meta["resourceVersion"] = str(next(self._version))
        obj.setdefault("kind", RESOURCES[version][plural])
        obj.setdefault("apiVersion", version)
        if plural == "services":
            obj["spec"].setdefault("clusterIP", "127.0.0.1")
        self.objects[key] = obj
        self._tell(version, plural, "ADDED" if old is None else "MODIFIED", obj)
        return obj

    def patch(
        self, version: str, plural: str, name: str, patch: Object, namespace: str = "default"
    ) -> Object:
        old = self.objects[version, plural, namespace, name]
        return self.put(version, plural, _merge(copy.deepcopy(old), patch))

    def remove(self, version: str, plural: str, name: str, namespace: str = "default") -> None:
        obj = self.objects.pop((version, plural, namespace, name))
        obj["metadata"]["resourceVersion"] = str(next(self._version))
        self._tell(version, plural, "DELETED", obj)
        uid = obj["metadata"]["uid"]
        for (v, kind, ns, n), child in list(self.objects.items()):
            owners = child["metadata"].get("ownerReferences") or []
            if owners and all(o["uid"] == uid for o in owners) and (v, kind, ns, n) in self.objects:
                self.remove(v, kind, n, ns)

    def _tell(self, version: str, plural: str, event: str, obj: Object) -> None:
        for v, kind, namespace, selector, queue in self._watchers:
            if (
                (v, kind) == (version, plural)
                and namespace in ("", obj["metadata"].get("namespace", ""))
                and _selected(obj, selector)
            ):
                queue.put_nowait({"type": event, "object": copy.deepcopy(obj)})

    # HTTP

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        if parts == ["version"]:
            return web.json_response({"major": "1", "minor": "27", "gitVersion": "v1.27.0"})
        if parts == ["api"]:
            return web.json_response({"versions": ["v1"]})
        if parts == ["apis"]:
            return web.json_response({"groups": [_group(v) for v in RESOURCES if "/" in v]})
        version, rest = ("v1", parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        if version not in RESOURCES:
            return _status(404, "no such group")
        if not rest:
            return web.json_response(
                {"resources": [_resource(version, plural) for plural in RESOURCES[version]]}
            )
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        plural, name, sub = rest[0], rest[1] if len(rest) > 1 else "", rest[2] if len(rest) > 2 else ""
        if plural not in RESOURCES[version]:
            return _status(404, f"no such resource {plural}")
        if plural in self.deny and request.method != "GET":
            return _status(*self.deny[plural])
        self.calls.append((request.method, plural))
        return await self._verb(request, version, plural, namespace, name, sub)

    async def _verb(
        self, request: web.Request, version: str, plural: str, namespace: str, name: str, sub: str
    ) -> web.StreamResponse:
        key = (version, plural, namespace, name)
        if request.method == "GET" and not name:
            selector = _parse(request.query.get("labelSelector", ""))
            if request.query.get("watch") == "true":
                return await self._watch(request, version, plural, namespace, selector)
            items = [
                o for (v, k, ns, _), o in sorted(self.objects.items())
                if (v, k) == (version, plural) and namespace in ("", ns) and _selected(o, selector)
            ]  # fmt: skip
            return web.json_response(
                {
                    "kind": "List",
                    "metadata": {"resourceVersion": str(next(self._version))},
                    "items": copy.deepcopy(items),
                }
            )
        if request.method == "GET" and sub == "log":
            return web.Response(text=self.logs.get(name, ""))
        if request.method == "POST":
            body = await request.json()
            body["metadata"].setdefault("namespace", namespace)
            return web.json_response(self.put(version, plural, body), status=201)
        old = self.objects.get(key)
        if request.method == "PATCH":
            body = json.loads(await request.read())
            if "apply-patch" in request.content_type:
                kept = {"status": old["status"]} if old and "status" in old else {}
                # A manager owns all of what it applied: what it leaves out is gone.
                new = {**_defaults(old, body), **kept}
                return web.json_response(self.put(version, plural, new))
            if old is None:
                return _status(404, f"{plural} {name} not found")
            return web.json_response(self.put(version, plural, _merge(copy.deepcopy(old), body)))
        if old is None:
            return _status(404, f"{plural} {name} not found")
        if request.method == "DELETE":
            self.remove(version, plural, name, namespace)
        return web.json_response(copy.deepcopy(old))

    async def _watch(
        self, request: web.Request, version: str, plural: str, namespace: str, selector: dict[str, str]
    ) -> web.StreamResponse:
        since = int(request.query.get("resourceVersion") or 0)
        queue: asyncio.Queue[Object | None] = asyncio.Queue()
        if 0 < since < self._oldest:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            return web.json_response({"type": "ERROR", "object": gone})
        for (v, kind, ns, _), obj in sorted(
            self.objects.items(), key=lambda item: int(item[1]["metadata"]["resourceVersion"])
        ):
            newer = int(obj["metadata"]["resourceVersion"]) > since
            if (
                newer
                and (v, kind) == (version, plural)
                and namespace in ("", ns)
                and _selected(obj, selector)
            ):
                queue.put_nowait({"type": "MODIFIED", "object": copy.deepcopy(obj)})
        entry = (version, plural, namespace, selector, queue)
        self._watchers.append(entry)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        try:
            while (event := await queue.get()) is not None:
                await response.write(json.dumps(event).encode() + b"\n")
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            if entry in self._watchers:
                self._watchers.remove(entry)
        return response


def _same_meta(old: Object, new: Object) -> bool:
    return all(
        (old["metadata"].get(key) or None) == (new["metadata"].get(key) or None)
        for key in ("labels", "annotations", "ownerReferences")
    )


def _defaults(old: Object | None, body: Object) -> Object:
    if old is None:
        return dict(body)
    meta = {**old["metadata"], **body["metadata"]}
    meta["labels"] = {**(old["metadata"].get("labels") or {}), **(body["metadata"].get("labels") or {})}
    return {**body, "metadata": meta}


def _selected(obj: Object, selector: dict[str, str]) -> bool:
    labels = obj["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in selector.items())


def _parse(selector: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in selector.split(",") if "=" in part)


def _group(version: str) -> Object:
    name, _, number = version.partition("/")
    entry = {"groupVersion": version, "version": number}
    return {"name": name, "versions": [entry], "preferredVersion": entry}


def _resource(version: str, plural: str) -> Object:
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    kind = RESOURCES[version][plural]
    return {
        "name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": plural not in CLUSTERWIDE, "verbs": verbs,
    }  # fmt: skip


def _status(code: int, message: str) -> web.Response:
    return web.json_response(
        {"kind": "Status", "code": code, "message": message, "reason": "Because"}, status=code
    )
