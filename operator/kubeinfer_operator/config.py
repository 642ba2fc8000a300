"""Settings of the operator: environment variables, each with a flag of the same name that wins."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

MANAGER = "kubeinfer-operator"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a cluster's administrator decides for all models."""

    runtime_image_cpu: str = "docker.io/kubeinfer/kubeinfer-runtime-cpu:0.1.0"
    runtime_image_cuda: str = "docker.io/kubeinfer/kubeinfer-runtime-cuda:0.1.0"
    puller_image: str = "docker.io/kubeinfer/kubeinfer-operator:0.1.0"
    image_pull_policy: str = "IfNotPresent"
    watch_namespaces: tuple[str, ...] = ()
    hf_endpoint: str = ""
    modelscope_endpoint: str = ""
    https_proxy: str = ""
    http_proxy: str = ""
    no_proxy: str = ""
    gateway_selector: str = "app.kubernetes.io/component=gateway"
    gateway_port: int = 8081
    health_port: int = 8080
    workers: int = 16
    resync_seconds: float = 300.0
    probe_seconds: float = 30.0
    progress_seconds: float = 3.0
    autoscale_seconds: float = 2.0
    run_as_user: int = 65532
    log_format: str = "text"

    def runtime_image(self, device: str) -> str:
        """The default runtime image of a device, ``gpu`` or ``cpu``."""
        return self.runtime_image_cuda if device == "gpu" else self.runtime_image_cpu


_ENV = {
    "runtime_image_cpu": "KUBEINFER_RUNTIME_IMAGE_CPU",
    "runtime_image_cuda": "KUBEINFER_RUNTIME_IMAGE_CUDA",
    "puller_image": "KUBEINFER_PULLER_IMAGE",
    "image_pull_policy": "KUBEINFER_IMAGE_PULL_POLICY",
    "watch_namespaces": "WATCH_NAMESPACES",
    "hf_endpoint": "HF_ENDPOINT",
    "modelscope_endpoint": "MODELSCOPE_ENDPOINT",
    "https_proxy": "HTTPS_PROXY",
    "http_proxy": "HTTP_PROXY",
    "no_proxy": "NO_PROXY",
    "gateway_selector": "KUBEINFER_GATEWAY_SELECTOR",
    "gateway_port": "KUBEINFER_GATEWAY_PORT",
    "health_port": "KUBEINFER_HEALTH_PORT",
    "workers": "KUBEINFER_WORKERS",
    "resync_seconds": "KUBEINFER_RESYNC_SECONDS",
    "probe_seconds": "KUBEINFER_PROBE_SECONDS",
    "progress_seconds": "KUBEINFER_PROGRESS_SECONDS",
    "autoscale_seconds": "KUBEINFER_AUTOSCALE_SECONDS",
    "run_as_user": "KUBEINFER_RUN_AS_USER",
    "log_format": "KUBEINFER_LOG_FORMAT",
}


def _convert(default: Any, text: str) -> Any:
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return type(default)(text)


def read_settings(argv: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from flags and environment. A value of the wrong type ends the process with what is wrong."""
    env = os.environ if environ is None else environ
    parser = argparse.ArgumentParser(
        prog="kubeinfer-operator", description="The operator of InferenceModels."
    )
    defaults = Settings()
    for field in fields(Settings):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            metavar="VALUE",
            help=f"Also {_ENV[field.name]}.",
            default=None,
        )
    given = vars(parser.parse_args(list(argv)))
    values: dict[str, Any] = {}
    for field in fields(Settings):
        default = getattr(defaults, field.name)
        text = given[field.name] if given[field.name] is not None else env.get(_ENV[field.name], "")
        if text == "":
            continue
        try:
            values[field.name] = _convert(default, text)
        except ValueError:
            parser.error(f"{_ENV[field.name]}={text!r} is not of type {type(default).__name__}")
    return Settings(**values)
