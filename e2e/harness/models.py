"""InferenceModels and what the operator makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .hub import REPOSITORY
from .kube import Kube, Object, condition, poll, ready

CONDITIONS = ("Accepted", "Planned", "WeightsReady", "RuntimeReady", "Ready")


def manifest(name: str, uri: str = f"hf://{REPOSITORY}", **spec: Any) -> Object:
    """A small model on the CPU; `spec` is merged over the defaults, one level deep."""
    merged: Object = {
        "model": {"uri": uri},
        "resources": {"device": "cpu", "requests": {"cpu": "100m", "memory": "512Mi"}},
        "engine": {"maxModelLen": 1024, "maxNumSeqs": 16},
        "rollout": {"drainTimeout": 60},
    }
    for key, value in spec.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return {
        "apiVersion": "kubeinfer.io/v1alpha1",
        "kind": "InferenceModel",
        "metadata": {"name": name},
        "spec": merged,
    }


class Models:
    """The InferenceModels of one namespace."""

    def __init__(self, kube: Kube) -> None:
        self.kube = kube

    def get(self, name: str) -> Object:
        """Raises KeyError where there is none."""
        found = self.kube.get("inferencemodel", name)
        if found is None:
            raise KeyError(f"no InferenceModel {name}")
        return found

    def wait(self, name: str, what: str, look: Callable[[Object], Any], timeout: float = 60.0) -> Object:
        """The object once `look` is true of it. On a time-out the message holds its conditions."""
        seen: list[Object] = []

        def once() -> Object | None:
            seen[:] = [self.get(name)]
            return seen[0] if look(seen[0]) else None

        try:
            return poll(f"{name}: {what}", once, timeout)
        except TimeoutError as error:
            status = seen[0].get("status", {}) if seen else {}
            lines = [
                f"{c['type']}={c['status']} {c['reason']}: {c.get('message', '')}"
                for c in status.get("conditions", [])
            ]
            raise TimeoutError("\n".join([str(error), f"phase {status.get('phase')}", *lines])) from None

    def wait_ready(self, name: str, timeout: float = 120.0) -> Object:
        """Ready for the generation that is there now."""

        def look(model: Object) -> bool:
            found = condition(model, "Ready")
            generation = model["metadata"]["generation"]
            return (
                found.get("status") == "True"
                and found.get("observedGeneration") == generation
                and model["status"].get("observedGeneration") == generation
            )

        return self.wait(name, "Ready", look, timeout)

    def wait_reason(self, name: str, kind: str, reasons: set[str], timeout: float = 60.0) -> Object:
        """Until condition `kind` is not true, with one of `reasons`; returns the condition."""

        def look(model: Object) -> bool:
            found = condition(model, kind)
            return found.get("status") in ("False", "Unknown") and found.get("reason") in reasons

        return condition(
            self.wait(name, f"{kind} is false because of {' or '.join(sorted(reasons))}", look, timeout), kind
        )

    def wait_replicas(self, name: str, count: int, timeout: float = 180.0) -> Object:
        """Until exactly `count` replicas are ready and the status says so."""

        def look(model: Object) -> bool:
            status = model.get("status", {})
            return (
                status.get("readyReplicas", 0) == count
                and status.get("observedGeneration") == model["metadata"]["generation"]
                and len([pod for pod in self.pods(name) if ready(pod)]) == count
            )

        return self.wait(name, f"{count} ready replicas", look, timeout)

    def pods(self, name: str) -> list[Object]:
        """The runtime's pods, leaving ones too."""
        return self.kube.list("pods", f"kubeinfer.io/model={name},app.kubernetes.io/component=runtime")

    def staying(self, name: str) -> set[str]:
        """The uids of the runtime's pods that are not leaving."""
        return {
            pod["metadata"]["uid"] for pod in self.pods(name) if "deletionTimestamp" not in pod["metadata"]
        }

    def children(self, name: str) -> set[str]:
        """KIND/NAME of every object that carries the model's label or is owned by it."""
        found = set()
        kinds = "pods,jobs,deployments,replicasets,services,endpoints,persistentvolumeclaims,serviceaccounts,configmaps,secrets"
        for kind in (kinds, "networkpolicies,poddisruptionbudgets"):
            for item in self.kube.list(kind):
                labels = item["metadata"].get("labels") or {}
                owners = [owner["name"] for owner in item["metadata"].get("ownerReferences") or []]
                if labels.get("kubeinfer.io/model") == name or name in owners:
                    found.add(f"{item['kind']}/{item['metadata']['name']}")
        return found

    def wait_gone(self, name: str, timeout: float = 120.0) -> None:
        """Until the object and everything made for it are gone."""

        def look() -> bool:
            left.clear()
            left.update(self.children(name))
            return self.kube.get("inferencemodel", name) is None and not left

        left: set[str] = set()
        try:
            poll(f"{name} and what was made for it are gone", look, timeout, every=0.5)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; left: {sorted(left)}") from None

    def engine_kill(self, pod: str, signal: str = "KILL") -> None:
        """Send a signal to the engine's process inside a runtime pod."""
        code = (
            "import os, signal, pathlib\n"
            "hit = [int(p.name) for p in pathlib.Path('/proc').iterdir() if p.name.isdigit()\n"
            "       and b'core_process' in (p / 'cmdline').read_bytes()]\n"
            "assert hit, 'no engine process'\n"
            f"[os.kill(pid, signal.SIG{signal}) for pid in hit]"
        )
        # The container may end before the command in it has
        self.kube.run("exec", pod, "-c", "runtime", "--", "python", "-c", code, check=False)

    @contextlib.contextmanager
    def temporary(self, model: Object) -> Iterator[str]:
        """The model's name, while it exists."""
        name = str(model["metadata"]["name"])
        self.kube.apply(model)
        try:
            yield name
        finally:
            self.kube.delete("inferencemodel", name, "--wait=false")
