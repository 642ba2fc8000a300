"""A small Kubernetes API server: list and watch of three kinds, with the faults that real ones have."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from aiohttp import web

_HISTORY = 1000
KINDS = {"inferencemodels": "InferenceModel", "pods": "Pod", "secrets": "Secret"}


class FakeKubernetes:
    """Objects are put and deleted by the test; clients list and watch them over HTTP.

    `drop_watches()` cuts the open ones, `stall` keeps them open and silent, `compact()` makes earlier versions expire
    (410 Gone), `stop()` and `start()` are a restart.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
        self.events: dict[str, list[tuple[int, str, dict[str, Any]]]] = {kind: [] for kind in KINDS}
        self.version = 100
        self.oldest = 0
        self.stall = False
        self.gone_as_status = False
        self.port = 0
        self.requests: defaultdict[str, int] = defaultdict(int)
        self.page = 0
        self.forbidden: set[str] = set()
        self._changed = asyncio.Condition()
        self._transports: set[asyncio.Transport] = set()
        self._runner: web.AppRunner | None = None

    async def start(self) -> FakeKubernetes:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        return self

    async def stop(self) -> None:
        self.drop_watches()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def write_kubeconfig(self, path: Path) -> Path:
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "fake",
                    "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
                    "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
                    "users": [{"name": "fake", "user": {"token": "secret-token"}}],
                }
            )
        )
        return path

    # What tests do

    async def put(self, kind: str, item: dict[str, Any]) -> None:
        meta = item["metadata"]
        meta.setdefault("namespace", "default")
        meta.setdefault("uid", f"uid-{kind}-{meta['namespace']}-{meta['name']}")
        meta.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        key = f"{meta['namespace']}/{meta['name']}"
        await self._event(kind, "MODIFIED" if key in self.objects[kind] else "ADDED", item)
        self.objects[kind][key] = copy.deepcopy(item)

    async def delete(self, kind: str, name: str) -> None:
        await self._event(kind, "DELETED", self.objects[kind].pop(name if "/" in name else f"default/{name}"))

    async def _event(self, kind: str, what: str, item: dict[str, Any]) -> None:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.events[kind].append((self.version, what, copy.deepcopy(item)))
        async with self._changed:
            self._changed.notify_all()

    def model(self, name: str, **spec: Any) -> dict[str, Any]:
        return {
            "apiVersion": "kubeinfer.io/v1alpha1",
            "kind": "InferenceModel",
            "metadata": {"name": name},
            "spec": {"model": {"uri": "hf://a/b"}, **spec},
        }

    def pod(
        self,
        name: str,
        model: str,
        port: int,
        *,
        ready: bool = True,
        leaving: bool = False,
        component: str = "runtime",
    ) -> dict[str, Any]:
        item: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": {"kubeinfer.io/model": model, "app.kubernetes.io/component": component},
            },
            "spec": {"containers": [{"name": "runtime", "ports": [{"name": "http", "containerPort": port}]}]},
            "status": {
                "podIP": "127.0.0.1",
                "phase": "Running",
                "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
            },
        }
        if leaving:
            item["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:01Z"
        return item

    def secret(self, name: str, **data: str) -> dict[str, Any]:
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": encoded}

    def drop_watches(self) -> None:
        for transport in list(self._transports):
            transport.abort()

    def compact(self) -> None:
        self.oldest = self.version
        for events in self.events.values():
            events.clear()

    # The API

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        kind = parts[-1]
        if kind not in KINDS:
            return self._status(404, "the server could not find the requested resource")
        if request.headers.get("authorization") != "Bearer secret-token":
            return self._status(401, "Unauthorized")
        if kind in self.forbidden:
            return self._status(403, f"{kind} is forbidden")
        namespace = parts[parts.index("namespaces") + 1] if "namespaces" in parts else None
        watch = request.query.get("watch") == "true"
        self.requests[f"{'watch' if watch else 'list'} {kind}"] += 1
        if watch:
            return await self._watch(request, kind, namespace)
        items = [item for item in self.objects[kind].values() if self._matches(item, request, namespace)]
        start = int(request.query.get("continue") or 0)
        limit = self.page or int(request.query.get("limit") or 0) or len(items) + 1
        meta = {"resourceVersion": str(self.version)}
        if start + limit < len(items):
            meta["continue"] = str(start + limit)
        return web.json_response(
            {"kind": KINDS[kind] + "List", "metadata": meta, "items": items[start : start + limit]}
        )

    def _matches(self, item: dict[str, Any], request: web.Request, namespace: str | None) -> bool:
        meta = item["metadata"]
        if namespace is not None and meta["namespace"] != namespace:
            return False
        for part in filter(None, request.query.get("labelSelector", "").split(",")):
            key, equals, value = part.partition("=")
            labels = meta.get("labels") or {}
            if key not in labels or (equals and labels[key] != value):
                return False
        field = request.query.get("fieldSelector", "")
        return not field or field == f"metadata.name={meta['name']}"

    def _status(self, code: int, message: str) -> web.Response:
        return web.json_response(
            {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message},
            status=code,
        )

    async def _watch(self, request: web.Request, kind: str, namespace: str | None) -> web.StreamResponse:
        since = int(request.query["resourceVersion"])
        gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
        if since < self.oldest and self.gone_as_status:
            return self._status(410, "too old resource version")
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        assert isinstance(request.transport, asyncio.Transport) or request.transport is not None
        self._transports.add(request.transport)  # type: ignore[arg-type]
        deadline = asyncio.get_running_loop().time() + float(request.query.get("timeoutSeconds") or 1800)
        try:
            if since < self.oldest:
                await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
                return response
            while True:
                for version, what, item in list(self.events[kind]):
                    if version > since and self._matches(item, request, namespace):
                        while self.stall:
                            await asyncio.sleep(0.02)
                        await response.write(json.dumps({"type": what, "object": item}).encode() + b"\n")
                since = max(since, self.version)
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0 and not self.stall:
                    break
                try:
                    async with asyncio.timeout(max(0.05, min(left, 0.5))), self._changed:
                        await self._changed.wait()
                except TimeoutError:
                    mark = {"kind": KINDS[kind], "metadata": {"resourceVersion": str(self.version)}}
                    if not self.stall:
                        await response.write(
                            json.dumps({"type": "BOOKMARK", "object": mark}).encode() + b"\n"
                        )
            return response
        finally:
            self._transports.discard(request.transport)  # type: ignore[arg-type]
