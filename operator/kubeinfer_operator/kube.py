"""The few verbs of the Kubernetes API the operator speaks, on plain dictionaries, over the official client's session."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from kubernetes.aio import client, config

from kubeinfer_operator.config import MANAGER

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind and where the API server serves it."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, sub: str | None = None) -> str:
        root = "/api/v1" if self.api_version == "v1" else f"/apis/{self.api_version}"
        parts = [root]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [quote(part, safe="") for part in (name, sub) if part]
        return "/".join(parts)


MODELS = Kind("kubeinfer.io/v1alpha1", "InferenceModel", "inferencemodels")
DEPLOYMENTS = Kind("apps/v1", "Deployment", "deployments")
REVISIONS = Kind("apps/v1", "ControllerRevision", "controllerrevisions")
JOBS = Kind("batch/v1", "Job", "jobs")
PODS = Kind("v1", "Pod", "pods")
SERVICES = Kind("v1", "Service", "services")
CLAIMS = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
ACCOUNTS = Kind("v1", "ServiceAccount", "serviceaccounts")
POLICIES = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
BUDGETS = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
CLASSES = Kind("storage.k8s.io/v1", "StorageClass", "storageclasses", namespaced=False)
NODES = Kind("v1", "Node", "nodes", namespaced=False)
EVENTS = Kind("v1", "Event", "events")
SECRETS = Kind("v1", "Secret", "secrets")

KINDS: dict[str, Kind] = {
    kind.kind: kind
    for kind in (MODELS, DEPLOYMENTS, REVISIONS, JOBS, PODS, SERVICES, CLAIMS, ACCOUNTS, POLICIES, BUDGETS)
}


class KubeError(Exception):
    """An answer of the API server that is no success. ``status`` is 0 when there was no answer."""

    def __init__(self, status: int, message: str, reason: str = "") -> None:
        super().__init__(f"{status} {reason}: {message}" if status else message)
        self.status = status
        self.message = message
        self.reason = reason

    @property
    def not_found(self) -> bool:
        return self.status == 404


class Kube:
    """A client of one API server. Every call has a timeout; ``calls`` counts requests by verb and kind."""

    def __init__(self, api: Any, timeout: float = 30.0) -> None:
        self._api = api
        self._timeout = timeout
        self.calls: dict[tuple[str, str], int] = {}

    @classmethod
    async def connect(cls) -> Kube:
        """From the pod's own service account, else from ``KUBECONFIG``."""
        configuration = client.Configuration()
        if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config(client_configuration=configuration)
        else:
            # The client reads KUBECONFIG when it is imported; here it is read now.
            file = os.environ.get("KUBECONFIG") or None
            await config.load_kube_config(config_file=file, client_configuration=configuration)
        configuration.connection_pool_maxsize = 64
        return cls(client.ApiClient(configuration))

    async def close(self) -> None:
        await self._api.close()

    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        stream: bool = False,
        timeout: float | None = None,
    ) -> Any:
        verb, url, headers, payload, _ = await self._api.param_serialize(
            method,
            path,
            query_params=[],
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        if query:
            url += ("&" if "?" in url else "?") + urlencode(
                {k: v for k, v in query.items() if v not in (None, "")}
            )
        try:
            # The client's own deadline covers the body as well; a watch is bounded by the server and by its reader.
            response = await self._api.rest_client.request(
                verb,
                url,
                headers=headers,
                body=payload,
                _request_timeout=None if stream else timeout or self._timeout,
            )
            if stream and response.status < 300:
                return response.response
            data = await response.read()
        except (TimeoutError, OSError, client.ApiException) as error:
            raise KubeError(0, f"{method} {path}: {type(error).__name__}: {error}") from error
        except Exception as error:  # aiohttp's errors, whose base is Exception
            if type(error).__module__.partition(".")[0] != "aiohttp":
                raise
            raise KubeError(0, f"{method} {path}: {type(error).__name__}: {error}") from error
        if response.status >= 300:
            raise _error(response.status, data)
        return data

    def _count(self, verb: str, kind: Kind) -> None:
        key = (verb, kind.kind)
        self.calls[key] = self.calls.get(key, 0) + 1

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Manifest:
        self._count("get", kind)
        return dict(json.loads(await self._send("GET", kind.path(namespace, name))))

    async def list(
        self,
        kind: Kind,
        namespace: str | None = None,
        *,
        selector: str = "",
        cached: bool = False,
        limit: int = 0,
    ) -> Manifest:
        """A list as the API server answers it; ``cached`` lets it answer from its own cache."""
        self._count("list", kind)
        query = {
            "labelSelector": selector,
            "resourceVersion": "0" if cached else None,
            "limit": limit or None,
        }
        return dict(json.loads(await self._send("GET", kind.path(namespace), query=query)))

    async def watch(
        self, kind: Kind, namespace: str | None, *, selector: str, version: str, seconds: int
    ) -> AsyncIterator[Manifest]:
        """Events until the server ends the watch after ``seconds``. Silence beyond that raises ``TimeoutError``."""
        self._count("watch", kind)
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "labelSelector": selector,
            "resourceVersion": version,
            "timeoutSeconds": seconds,
        }
        async with asyncio.timeout(seconds + 15):
            response = await self._send("GET", kind.path(namespace), query=query, stream=True)
            try:
                async for line in response.content:
                    yield json.loads(line)
            except Exception as error:
                if type(error).__module__.partition(".")[0] != "aiohttp":
                    raise
                raise KubeError(0, f"the watch broke off: {error}") from error
            finally:
                response.close()

    async def apply(self, manifest: Manifest) -> Manifest:
        """Server-side apply under the operator's field manager."""
        kind = KINDS[manifest["kind"]]
        self._count("apply", kind)
        meta = manifest["metadata"]
        data = await self._send(
            "PATCH",
            kind.path(meta["namespace"], meta["name"]),
            query={"fieldManager": MANAGER, "force": "true"},
            body=manifest,
            content_type="application/apply-patch+yaml",
        )
        return dict(json.loads(data))

    async def patch_status(self, kind: Kind, namespace: str, name: str, status: Manifest) -> Manifest:
        """JSON merge patch of the status subresource; null takes a field away."""
        self._count("patch_status", kind)
        data = await self._send(
            "PATCH",
            kind.path(namespace, name, "status"),
            body={"status": status},
            query={"fieldManager": MANAGER},
            content_type="application/merge-patch+json",
        )
        return dict(json.loads(data))

    async def patch_metadata(self, kind: Kind, namespace: str, name: str, metadata: Manifest) -> Manifest:
        """JSON merge patch of an object's metadata."""
        self._count("patch", kind)
        data = await self._send(
            "PATCH",
            kind.path(namespace, name),
            body={"metadata": metadata},
            query={"fieldManager": f"{MANAGER}-marks"},
            content_type="application/merge-patch+json",
        )
        return dict(json.loads(data))

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str | None = None) -> None:
        """Delete in the background; an object that is gone, or is another one by now, is no error."""
        self._count("delete", kind)
        body: Manifest = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            await self._send("DELETE", kind.path(namespace, name), body=body)
        except KubeError as error:
            if error.status not in (404, 409):
                raise

    async def create(self, kind: Kind, manifest: Manifest) -> None:
        self._count("create", kind)
        await self._send("POST", kind.path(manifest["metadata"]["namespace"]), body=manifest)

    async def logs(self, namespace: str, pod: str, container: str, lines: int) -> str:
        """The last ``lines`` lines of a container's log."""
        self._count("logs", PODS)
        query = {"container": container, "tailLines": lines}
        data = await self._send("GET", PODS.path(namespace, pod, "log"), query=query, timeout=10)
        return bytes(data).decode("utf-8", "replace")

    async def api_groups(self) -> set[str]:
        """The group versions that the server serves, for example ``policy/v1``."""
        groups = json.loads(await self._send("GET", "/apis"))["groups"]
        return {version["groupVersion"] for group in groups for version in group["versions"]}


def _error(status: int, data: bytes) -> KubeError:
    try:
        body = json.loads(data)
        return KubeError(status, str(body.get("message", "")), str(body.get("reason", "")))
    except (ValueError, AttributeError):
        return KubeError(status, data.decode("utf-8", "replace")[:300])
