"""An InferenceModel on this machine: the same checks, weights and runtime arguments as in a cluster, as processes."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kubeinfer.errors import yaml_problem
from kubeinfer.weights.download import fetch
from kubeinfer.weights.errors import NotHere, WeightsError
from kubeinfer.weights.locate import local_path
from kubeinfer.weights.uri import parse
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.api.validate import Refused, read_manifest
from kubeinfer_operator.builders.arguments import serve_arguments, served_names
from kubeinfer_operator.builders.weights import excluded, sources_of
from kubeinfer_operator.names import API_VERSION, KIND


class LocalError(Exception):
    """Why a manifest cannot run here, for the person who wrote it."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """One model of a manifest: ``replicas`` processes of one command each."""

    name: str
    spec: InferenceModelSpec
    replicas: int


@dataclass(frozen=True, slots=True)
class Process:
    """One process to run. ``health``: address that answers 200 once it serves."""

    label: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    health: str | None = None
    grace: float = 10.0


def read_files(
    paths: Sequence[Path], *, device: str | None = None, replicas: int | None = None
) -> list[LocalModel]:
    """The models of all files. ``device`` and ``replicas`` stand in for the manifest's. Raises :class:`LocalError`."""
    models: list[LocalModel] = []
    for path in paths:
        try:
            documents = [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d is not None]
        except OSError as error:
            raise LocalError(f"cannot read {path}: {error.strerror}") from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise LocalError(f"{path} is not YAML: {yaml_problem(error)}") from None
        ours = [d for d in documents if isinstance(d, dict) and d.get("kind") == KIND]
        if not ours:
            raise LocalError(f"{path}: holds no {KIND} ({API_VERSION})")
        for document in ours:
            try:
                name, spec = read_manifest(_on_device(document, device))
            except Refused as error:
                raise LocalError(f"{path}: {error}") from None
            models.append(LocalModel(name, spec, _replicas(spec, replicas)))
    taken: dict[str, str] = {}
    for model in models:
        for served in served_names(model.name, model.spec):
            other = taken.setdefault(served, model.name)
            if other != model.name:
                raise LocalError(
                    f"{other} and {model.name} both serve the name {served!r}: change one's spec.servedNames"
                )
    if len({model.name for model in models}) != len(models):
        raise LocalError("a metadata.name is there twice: each model needs its own")
    return models


def _on_device(document: dict[str, Any], device: str | None) -> dict[str, Any]:
    """The manifest with another device: a manifest for GPUs can be tried on a laptop."""
    spec = document.get("spec")
    if device is None or not isinstance(spec, dict):
        return document
    resources = {"device": device}
    engine = {
        key: value
        for key, value in (spec.get("engine") or {}).items()
        if device == "gpu" or key not in _GPU_ONLY
    }
    return {**document, "spec": {**spec, "resources": resources, "engine": engine}}


_GPU_ONLY = (
    "tensorParallelSize", "pipelineParallelSize", "swapSpace", "cpuOffloadGb", "gpuMemoryUtilization",
    "cudagraphCaptureSizes", "disableCustomAllReduce",
)  # fmt: skip


def _replicas(spec: InferenceModelSpec, wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    if spec.suspend:
        return 0
    if spec.autoscaling is not None:
        return max(1, spec.autoscaling.min_replicas)
    return spec.replicas


def weights_of(model: LocalModel, claims: dict[str, Path], progress: Callable[..., None]) -> Path:
    """The folder or file the engine loads, fetched if need be. Raises :class:`WeightsError`.

    ``claims``: folders that stand in for PersistentVolumeClaims, by name. A hostPath is used as the cluster's pods do.
    """
    spec = model.spec
    sources = sources_of(spec.model)
    first = sources[0]
    if first.scheme == "file":
        return local_path(first)
    if first.scheme == "pvc":
        if first.claim not in claims:
            raise NotHere(
                f"{spec.model.uri}: say where that claim's files are, with --claim {first.claim}=FOLDER"
            )
        return local_path(parse(f"file://{(claims[first.claim] / first.path).resolve()}"))
    token = "MODELSCOPE_API_TOKEN" if first.scheme == "modelscope" else "HF_TOKEN"
    if spec.model.token_secret_ref is not None and not os.environ.get(token):
        print(
            f"{model.name}: spec.model.tokenSecretRef is for clusters; here the token is taken from ${token}",
            file=sys.stderr,
        )
    cache = spec.storage.host_path.path if spec.storage.host_path else None
    return fetch(
        first,
        include=spec.model.include,
        exclude=excluded(spec),
        mirrors=[str(source) for source in sources[1:]],
        cache_dir=cache,
        progress=progress,
    )


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def runtime_processes(model: LocalModel, path: Path, ports: Sequence[int]) -> list[Process]:
    """One process a port, with the arguments that the pod would get."""
    env: dict[str, str] = {}
    for item in model.spec.template.env:
        if item.value_from is not None:
            raise LocalError(
                f"{model.name}: spec.template.env {item.name} comes from the cluster (valueFrom): give it a value"
            )
        env[item.name] = item.value or ""
    many = len(ports) > 1
    return [
        Process(
            f"{model.name}-{number}" if many else model.name,
            [
                sys.executable,
                "-m",
                "kubeinfer.cli.main",
                "serve",
                *serve_arguments(model.name, model.spec, str(path), host="127.0.0.1", port=port),
            ],
            env,
            f"http://127.0.0.1:{port}/health",
            model.spec.rollout.drain_timeout + 10.0,
        )
        for number, port in enumerate(ports)
    ]


def upstreams(models: Sequence[LocalModel], ports: dict[str, list[int]]) -> dict[str, Any]:
    """The gateway's list of models, for its file."""
    return {
        "models": [
            {
                "name": model.name,
                "served_names": served_names(model.name, model.spec),
                "urls": [f"http://127.0.0.1:{port}" for port in ports[model.name]],
            }
            for model in models
        ]
    }


def gateway_process(upstream_file: Path, host: str, port: int, internal_port: int) -> Process:
    """The same gateway as in a cluster, told where the models are by a file."""
    return Process(
        "gateway",
        [
            sys.executable, "-m", "kubeinfer_gateway", "--discovery", "static", "--upstream-file", str(upstream_file),
            "--host", host, "--port", str(port), "--internal-port", str(internal_port), "--shutdown-delay", "0",
            "--shutdown-timeout", "30", "--log-format", "text", "--no-access-log",
        ],
        {},
        f"http://127.0.0.1:{internal_port}/readyz",
        35.0,
    )  # fmt: skip


__all__ = [
    "LocalError",
    "LocalModel",
    "Process",
    "WeightsError",
    "free_port",
    "gateway_process",
    "read_files",
    "runtime_processes",
    "upstreams",
    "weights_of",
]
