"""Models and endpoints from the cluster: InferenceModels, and the runtime pods that carry their label."""

from __future__ import annotations

import asyncio
import base64
import binascii
import itertools
import logging
import os
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from kubeinfer_gateway.discovery.base import Discovery
from kubeinfer_gateway.discovery.watch import KubeClient, Watcher
from kubeinfer_gateway.metrics import Metrics
from kubeinfer_gateway.registry import EndpointSpec, ModelSpec, Registry

logger = logging.getLogger(__name__)

MODEL_LABEL = "kubeinfer.io/model"
RUNTIME_SELECTOR = f"{MODEL_LABEL},app.kubernetes.io/component=runtime"
RUNTIME_PORT = 8000
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class _Meta(msgspec.Struct, rename="camel"):
    name: str
    namespace: str = ""
    uid: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None


class _ModelSpec(msgspec.Struct, rename="camel"):
    served_names: list[str] | None = None
    suspend: bool | None = None


class _ModelStatus(msgspec.Struct, rename="camel"):
    phase: str | None = None
    message: str | None = None


class _Model(msgspec.Struct):
    metadata: _Meta
    spec: _ModelSpec | None = None
    status: _ModelStatus | None = None


class _Port(msgspec.Struct, rename="camel"):
    container_port: int
    name: str | None = None


class _Container(msgspec.Struct):
    ports: list[_Port] | None = None
    args: list[str] | None = None


class _PodSpec(msgspec.Struct):
    containers: list[_Container] | None = None


class _Condition(msgspec.Struct):
    type: str
    status: str


class _PodStatus(msgspec.Struct, rename="camel"):
    pod_ip: str | None = msgspec.field(default=None, name="podIP")
    conditions: list[_Condition] | None = None


class _Pod(msgspec.Struct):
    metadata: _Meta
    spec: _PodSpec | None = None
    status: _PodStatus | None = None


class _Secret(msgspec.Struct):
    metadata: _Meta
    data: dict[str, str] | None = None


_model = msgspec.json.Decoder(_Model)
_pod = msgspec.json.Decoder(_Pod)
_secret = msgspec.json.Decoder(_Secret)
T = TypeVar("T")


def model_spec(model: _Model, endpoints: Iterable[EndpointSpec]) -> ModelSpec:
    meta = model.metadata
    created = 0.0
    if meta.creation_timestamp:
        created = datetime.fromisoformat(meta.creation_timestamp.replace("Z", "+00:00")).timestamp()
    names = (model.spec.served_names if model.spec else None) or [meta.name]
    status = model.status
    note = ": ".join(part for part in ((status.phase, status.message) if status else ()) if part)
    return ModelSpec(
        f"{meta.namespace}/{meta.name}",
        tuple(dict.fromkeys(names)),
        created,
        tuple(endpoints),
        suspended=bool(model.spec and model.spec.suspend),
        note=note[:300],
    )


def endpoint_spec(pod: _Pod) -> EndpointSpec | None:
    """The pod's endpoint where it takes requests: ready, with an address, and not on its way out."""
    status = pod.status
    if pod.metadata.deletion_timestamp or status is None or not status.pod_ip:
        return None
    if not any(c.type == "Ready" and c.status == "True" for c in status.conditions or ()):
        return None
    port = RUNTIME_PORT
    names: tuple[str, ...] = ()
    for container in (pod.spec.containers or ()) if pod.spec else ():
        for declared in container.ports or ():
            if declared.name == "http":
                port, names = declared.container_port, _names_served(container.args or [])
    return EndpointSpec(pod.metadata.uid or pod.metadata.name, status.pod_ip, port, names=names)


def _names_served(arguments: list[str]) -> tuple[str, ...]:
    """The names in a runtime's command line: while a model is renamed, its pods do not all have the same."""
    if "--served-model-name" not in arguments:
        return ()
    words = arguments[arguments.index("--served-model-name") + 1 :]
    return tuple(itertools.takewhile(lambda word: not word.startswith("--"), words))


class KubernetesDiscovery(Discovery):
    """Watches all namespaces, or those named."""

    def __init__(
        self,
        registry: Registry,
        namespaces: tuple[str, ...] = (),
        metrics: Metrics | None = None,
        *,
        watch_seconds: float = 60.0,
    ) -> None:
        super().__init__(registry)
        self._namespaces = namespaces
        self._metrics = metrics
        self._watch_seconds = watch_seconds
        self._models: dict[str, _Model] = {}
        self._pods: dict[
            str, tuple[str, EndpointSpec | None]
        ] = {}  # "namespace/pod": its model's key, endpoint
        self._endpoints: dict[str, dict[str, EndpointSpec]] = {}  # a model's key: "namespace/pod": endpoint
        self._listed: set[str] = set()

    async def run(self) -> None:
        kube = await KubeClient.connect()
        scopes = [f"/namespaces/{name}" for name in self._namespaces] or [""]
        try:
            async with asyncio.TaskGroup() as group:
                for scope in scopes:
                    models = f"/apis/kubeinfer.io/v1alpha1{scope}/inferencemodels"
                    pods = f"/api/v1{scope}/pods"
                    group.create_task(self._watcher(kube, models, scope, "models").run())
                    group.create_task(self._watcher(kube, pods, scope, "pods").run())
        finally:
            await kube.close()

    def _watcher(self, kube: KubeClient, path: str, scope: str, kind: str) -> Watcher:
        prefix = scope.removeprefix("/namespaces/") + "/" if scope else ""

        def on_error() -> None:
            if self._metrics is not None:
                self._metrics.discovery_errors.labels(kind).inc()

        def listed() -> None:
            self._listed.add(path)
            if len(self._listed) == 2 * max(1, len(self._namespaces)):
                self.registry.synced = True

        def replace(items: list[msgspec.Raw]) -> None:
            if kind == "models":
                self._replace_models(prefix, [m for m in (_decode(_model, item) for item in items) if m])
            else:
                self._replace_pods(prefix, [p for p in (_decode(_pod, item) for item in items) if p])
            listed()

        def change(item: msgspec.Raw, deleted: bool) -> None:
            if kind == "models" and (model := _decode(_model, item)):
                self._change_model(model, deleted)
            elif kind == "pods" and (pod := _decode(_pod, item)):
                self._change_pod(pod, deleted)

        return Watcher(
            kube,
            path,
            replace,
            change,
            label_selector=RUNTIME_SELECTOR if kind == "pods" else "",
            seconds=self._watch_seconds,
            on_error=on_error,
        )

    def _replace_models(self, prefix: str, models: list[_Model]) -> None:
        there = {f"{model.metadata.namespace}/{model.metadata.name}" for model in models}
        for key in [key for key in self._models if key.startswith(prefix) and key not in there]:
            del self._models[key]
            self.registry.remove(key)
        for model in models:
            self._change_model(model, False)

    def _change_model(self, model: _Model, deleted: bool) -> None:
        key = f"{model.metadata.namespace}/{model.metadata.name}"
        if deleted or model.metadata.deletion_timestamp:
            self._models.pop(key, None)
            self.registry.remove(key)
            return
        self._models[key] = model
        self._publish(key)

    def _replace_pods(self, prefix: str, pods: list[_Pod]) -> None:
        there = {f"{pod.metadata.namespace}/{pod.metadata.name}" for pod in pods}
        touched = {
            self._forget_pod(name)
            for name in list(self._pods)
            if name.startswith(prefix) and name not in there
        }
        touched |= {self._note_pod(pod) for pod in pods}
        for key in touched - {None}:
            self._publish(str(key))

    def _change_pod(self, pod: _Pod, deleted: bool) -> None:
        name = f"{pod.metadata.namespace}/{pod.metadata.name}"
        key = self._forget_pod(name) if deleted else self._note_pod(pod)
        if key is not None:
            self._publish(key)

    def _note_pod(self, pod: _Pod) -> str | None:
        """Keeps what matters of a pod; returns its model's key where that changed."""
        name = f"{pod.metadata.namespace}/{pod.metadata.name}"
        label = (pod.metadata.labels or {}).get(MODEL_LABEL)
        if label is None:
            return self._forget_pod(name)
        key = f"{pod.metadata.namespace}/{label}"
        endpoint = endpoint_spec(pod)
        if self._pods.get(name) == (key, endpoint):
            return None
        self._forget_pod(name)
        self._pods[name] = (key, endpoint)
        if endpoint is not None:
            self._endpoints.setdefault(key, {})[name] = endpoint
        return key

    def _forget_pod(self, name: str) -> str | None:
        key, _ = self._pods.pop(name, (None, None))
        if key is not None:
            endpoints = self._endpoints.get(key, {})
            endpoints.pop(name, None)
            if not endpoints:
                self._endpoints.pop(key, None)
        return key

    def _publish(self, key: str) -> None:
        model = self._models.get(key)
        if model is not None:
            self.registry.put(model_spec(model, self._endpoints.get(key, {}).values()))


def _decode(decoder: msgspec.json.Decoder[T], item: msgspec.Raw) -> T | None:
    """One odd object must not blind the gateway to all others."""
    try:
        return decoder.decode(item)
    except (msgspec.DecodeError, ValueError) as error:
        logger.warning("an object was not understood: %s", error)
        return None


def own_namespace() -> str:
    if name := os.environ.get("POD_NAMESPACE"):
        return name
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "default"


async def watch_secret(
    reference: str,
    put: Callable[[dict[str, bytes]], None],
    metrics: Metrics | None = None,
    seconds: float = 60.0,
) -> None:
    """Hands on the data of one Secret, NAME or NAMESPACE/NAME, now and whenever it changes; none where it is gone.

    Needs get, list and watch on that one resource name only: the request selects it by name.
    """
    namespace, _, name = reference.rpartition("/")
    kube = await KubeClient.connect()

    def change(item: msgspec.Raw, deleted: bool) -> None:
        secret = _decode(_secret, item)
        if secret is None:
            return
        data: dict[str, bytes] = {}
        for key, text in ((secret.data if not deleted else None) or {}).items():
            try:
                data[key] = base64.b64decode(text, validate=True)
            except binascii.Error:
                logger.error("Secret %s: the value of %s is not base64", reference, key)
        put(data)

    def replace(items: list[msgspec.Raw]) -> None:
        if items:
            change(items[0], False)
        else:
            logger.error(
                "--api-keys-secret %s: there is no such Secret; every request is refused until there is",
                reference,
            )
            put({})

    def on_error() -> None:
        if metrics is not None:
            metrics.discovery_errors.labels("secret").inc()

    try:
        await Watcher(
            kube,
            f"/api/v1/namespaces/{namespace or own_namespace()}/secrets",
            replace,
            change,
            field_selector=f"metadata.name={name}",
            seconds=seconds,
            on_error=on_error,
        ).run()
    finally:
        await kube.close()
