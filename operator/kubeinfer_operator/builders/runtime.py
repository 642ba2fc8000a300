"""The runtime's pod template, Deployment and Service."""

from __future__ import annotations

import math
from typing import Any

from kubeinfer_operator import names
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.builders.arguments import serve_arguments
from kubeinfer_operator.builders.weights import (
    Artifact,
    container_security,
    model_path,
    placement,
    pod_security,
    pull_container,
    storage_kind,
    volume,
)
from kubeinfer_operator.config import Settings

# Endpoints and gateways must hear that a pod leaves before it stops taking requests.
PRE_STOP_SECONDS = 3
EXIT_MARGIN_SECONDS = 10
CACHE_DIR = "/var/cache/kubeinfer"
# A container that hangs while it starts is started again after this. Whether a change is given up the Deployment says, whose
# deadline can be moved without new pods.
STARTUP_SECONDS = 14400
SLOW_BYTES_A_SECOND = 5_000_000  # a download that is slower may be given up


def template_key(name: str, spec: InferenceModelSpec, artifact: Artifact | None) -> str:
    """Hash of everything a person wrote that changes the pods, and of nothing else.

    Images and habits of the operator are not part of it: a template is built once for a key and kept, so that an
    upgrade of the operator leaves the pods alone. Values equal to a default are left out, so that a field that a later
    version adds changes no hash.
    """
    wrote = spec.model_dump(by_alias=True, exclude_defaults=True, exclude_none=True)
    for other in ("replicas", "autoscaling", "suspend"):
        wrote.pop(other, None)
    wrote["rollout"] = {
        key: value
        for key, value in wrote.get("rollout", {}).items()
        if key in ("drainTimeout", "restartedAt")
    }
    for volatile in ("mirrors", "revision"):
        wrote["model"].pop(volatile, None)
    wrote["model"]["uri"] = artifact.uri if artifact is not None else spec.model.uri
    if storage_kind(spec) == "claim":  # whose pods fetch nothing
        wrote["model"].pop("tokenSecretRef", None)
        wrote.get("storage", {}).pop("persistentVolumeClaim", None)
    if not wrote.get("storage"):
        wrote.pop("storage", None)
    if wrote.get("resources"):
        wrote["resources"].pop("memoryPerDevice", None)  # for the plan
    return names.digest([name, wrote])


def _resources(spec: InferenceModelSpec, weight_bytes: int | None) -> dict[str, Any]:
    wanted = spec.resources
    requests, limits = dict(wanted.requests), dict(wanted.limits)
    if wanted.device == "gpu":
        requests.setdefault(wanted.resource_name, str(wanted.count))
        limits.setdefault(wanted.resource_name, str(wanted.count))
    if "cpu" not in requests and "cpu" not in limits:
        requests["cpu"] = "1"
    if "memory" not in requests and "memory" not in limits:
        need = (1 << 30) + (weight_bytes or 0 if wanted.device == "cpu" else 0)
        requests["memory"] = f"{math.ceil(need / (1 << 20))}Mi"
    out: dict[str, Any] = {"requests": requests}
    if limits:
        out["limits"] = limits
    return out


def _get(path: str, **thresholds: int) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "http", "scheme": "HTTP"}, **thresholds}


def pod_template(
    name: str,
    spec: InferenceModelSpec,
    artifact: Artifact | None,
    settings: Settings,
    *,
    weight_bytes: int | None = None,
) -> dict[str, Any]:
    """The pod template, without the label of its revision."""
    drain = spec.rollout.drain_timeout
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}, {"name": "cache", "emptyDir": {}}]
    mounts: list[dict[str, Any]] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "cache", "mountPath": CACHE_DIR},
    ]
    init: list[dict[str, Any]] = []
    fetched_by_pod = storage_kind(spec) in ("hostPath", "ephemeral")
    models = volume(name, spec, read_only=not fetched_by_pod)
    if models is not None:
        volumes.insert(0, models)
        mounts.insert(0, {"name": "models", "mountPath": names.MODELS_DIR, "readOnly": True})
    if fetched_by_pod:
        assert artifact is not None
        init.append(pull_container("weights", spec, artifact, settings))
    if spec.resources.device == "gpu" and spec.resources.count > 1:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    env: list[dict[str, Any]] = [
        {"name": "HOME", "value": "/tmp"},
        {"name": "LOGNAME", "value": "kubeinfer"},
        {"name": "XDG_CACHE_HOME", "value": CACHE_DIR},
        {"name": "TRITON_CACHE_DIR", "value": f"{CACHE_DIR}/triton"},
        {"name": "HF_HUB_OFFLINE", "value": "1"},
    ]
    if getattr(spec.engine, "tokenizer", None):
        env.pop()
    # A name that is given again replaces ours, as the last of two does: two entries of a name cannot be applied.
    given = {item.name: item.model_dump(by_alias=True, exclude_none=True) for item in spec.template.env}
    env = [item for item in env if item["name"] not in given] + list(given.values())
    container: dict[str, Any] = {
        "name": "runtime",
        "image": spec.image or settings.runtime_image(spec.resources.device),
        "imagePullPolicy": spec.image_pull_policy or settings.image_pull_policy,
        "command": ["kubeinfer", "serve"],
        "args": serve_arguments(name, spec, model_path(spec, artifact)),
        "env": env,
        "ports": [{"name": "http", "containerPort": names.RUNTIME_PORT, "protocol": "TCP"}],
        "resources": _resources(spec, weight_bytes),
        "securityContext": container_security(),
        "startupProbe": _get(
            "/health",
            periodSeconds=1,
            timeoutSeconds=2,
            failureThreshold=max(spec.rollout.progress_deadline, STARTUP_SECONDS),
        ),
        "readinessProbe": _get("/health", periodSeconds=2, timeoutSeconds=3, failureThreshold=2),
        # A step that hangs makes /health fail; a busy one does not. A minute of it is no accident.
        "livenessProbe": _get("/health", periodSeconds=10, timeoutSeconds=10, failureThreshold=6),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP_SECONDS)]}}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }
    pod: dict[str, Any] = {
        "serviceAccountName": names.service_account_name(name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(spec, settings),
        "containers": [container],
        "volumes": volumes,
        "terminationGracePeriodSeconds": drain + PRE_STOP_SECONDS + EXIT_MARGIN_SECONDS,
        **placement(spec),
    }
    if init:
        pod["initContainers"] = init
    if spec.template.priority_class_name:
        pod["priorityClassName"] = spec.template.priority_class_name
    if spec.template.runtime_class_name:
        pod["runtimeClassName"] = spec.template.runtime_class_name
    metadata: dict[str, Any] = {
        "labels": {**spec.template.labels, **names.labels(name, names.COMPONENT_RUNTIME)}
    }
    if spec.template.annotations:
        metadata["annotations"] = dict(spec.template.annotations)
    return {"metadata": metadata, "spec": pod}


def deployment(
    name: str,
    namespace: str,
    spec: InferenceModelSpec,
    template: dict[str, Any],
    revision: str,
    replicas: int,
    owner: dict[str, Any],
    weight_bytes: int | None = None,
) -> dict[str, Any]:
    """The Deployment that runs ``template``, known by its ``revision``. Pods that fetch ``weight_bytes`` have time for it besides."""
    meta = template["metadata"]
    labelled = {
        **template,
        "metadata": {**meta, "labels": {**meta["labels"], names.LABEL_REVISION: revision}},
    }
    surge = spec.rollout.strategy == "surge"
    fetched_by_pod = storage_kind(spec) in ("hostPath", "ephemeral")
    fetching = math.ceil((weight_bytes or 0) / SLOW_BYTES_A_SECOND) if fetched_by_pod else 0
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {**names.labels(name, names.COMPONENT_RUNTIME), names.LABEL_REVISION: revision},
            "ownerReferences": [owner],
        },
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": names.selector(name)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1 if surge else 0, "maxUnavailable": 0 if surge else 1},
            },
            "progressDeadlineSeconds": spec.rollout.progress_deadline + fetching,
            "revisionHistoryLimit": 2,
            "template": labelled,
        },
    }


def service(name: str, namespace: str, owner: dict[str, Any]) -> dict[str, Any]:
    """The Service of the model's name, on the port of the OpenAI API."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": names.labels(name, names.COMPONENT_RUNTIME),
            "ownerReferences": [owner],
        },
        "spec": {
            "selector": names.selector(name),
            "ports": [{"name": "http", "port": names.RUNTIME_PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def endpoint(name: str, namespace: str) -> str:
    """Address of the model's own OpenAI API in the cluster."""
    return f"http://{name}.{namespace}.svc:{names.RUNTIME_PORT}/v1"


def revision_record(
    name: str, namespace: str, template: dict[str, Any], revision: str, generation: int, owner: dict[str, Any]
) -> dict[str, Any]:
    """The record of a template: built once, rolled out again from here whatever the operator's version."""
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": names.revision_name(name, revision),
            "namespace": namespace,
            "labels": {**names.labels(name, names.COMPONENT_RUNTIME), names.LABEL_REVISION: revision},
            "ownerReferences": [owner],
        },
        "revision": generation,
        "data": {"template": template},
    }
