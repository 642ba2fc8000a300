"""The chart, installed as a user would."""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile
from typing import Any

from .kube import Kube, poll, ready

CHART = pathlib.Path(__file__).resolve().parents[2] / "charts" / "kubeinfer"
NAME = "kubeinfer"


class Release:
    """One helm release of the chart in one namespace."""

    def __init__(self, kube: Kube, values: dict[str, Any]) -> None:
        self.kube = kube
        self.values = values
        self.gateway_url = f"http://{NAME}-gateway.{kube.namespace}.svc.cluster.local"

    def helm(self, *arguments: str, timeout: float = 240.0) -> str:
        command = ["helm", "--namespace", self.kube.namespace, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"helm {' '.join(arguments)}: {done.stderr.strip()[-3000:]}")
        return done.stdout

    def install(self, *flags: str, **changes: Any) -> None:
        """Install or upgrade, and wait until everything is ready."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(self.values | changes, file)
            file.flush()
            command = ("upgrade", "--install", NAME, str(CHART), "--values", file.name)
            self.helm(*command, "--create-namespace", "--wait", "--timeout", "180s", *flags)

    def uninstall(self) -> None:
        self.helm("uninstall", NAME, "--wait")

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Pods of the operator or the gateway that are not leaving."""
        found = self.kube.list("pods", f"app.kubernetes.io/name=kubeinfer-{component}")
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def wait_ready(self, component: str, count: int, timeout: float = 90.0) -> list[dict[str, Any]]:
        def look() -> list[dict[str, Any]] | None:
            pods = [pod for pod in self.pods(component) if ready(pod)]
            return pods if len(pods) == count else None

        return poll(f"{count} {component} pods ready", look, timeout)
