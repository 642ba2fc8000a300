"""The cluster through kubectl: every call is a process, so nothing of it outlives an API server that restarts."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
Object = dict[str, Any]


class KubeError(RuntimeError):
    """kubectl failed; the message is what it printed."""


def poll(what: str, look: Callable[[], T | None], timeout: float = 60.0, every: float = 0.2) -> T:
    """The first result of `look` that is not None or False. Raises TimeoutError naming `what` and the last exception."""
    end = time.monotonic() + timeout
    last: Exception | None = None
    while True:
        try:
            result = look()
            if result is not None and result is not False:
                return result
            last = None
        except (KubeError, KeyError, IndexError, ValueError) as error:
            last = error
        if time.monotonic() >= end:
            raise TimeoutError(f"not within {timeout:g} s: {what}" + (f" ({last})" if last else ""))
        time.sleep(every)


class Kube:
    """kubectl in one namespace."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def run(
        self, *arguments: str, input: str | None = None, check: bool = True, timeout: float = 120.0
    ) -> str:
        """Standard output of `kubectl -n NAMESPACE ...`. Raises KubeError where it fails and `check` is set."""
        command = ["kubectl", "-n", self.namespace, *arguments]
        done = subprocess.run(
            command, input=input, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode != 0:
            raise KubeError(
                f"kubectl {' '.join(arguments)}: {done.stderr.strip()} {done.stdout.strip()[-2000:]}"
            )
        return done.stdout

    def get(self, kind: str, name: str) -> Object | None:
        """One object, or None where there is none."""
        text = self.run("get", kind, name, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text.strip() else None

    def list(self, kind: str, selector: str = "") -> list[Object]:
        """Objects of a kind in this namespace."""
        flags = ["-l", selector] if selector else []
        found: list[Object] = json.loads(self.run("get", kind, *flags, "-o", "json"))["items"]
        return found

    def apply(self, *objects: Object) -> None:
        """`kubectl apply`."""
        bundle = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.run("apply", "-f", "-", input=json.dumps(bundle))

    def create(self, *objects: Object) -> None:
        """`kubectl create`: one request for each object."""
        bundle = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.run("create", "--validate=false", "-f", "-", input=json.dumps(bundle), timeout=400)

    def patch(self, kind: str, name: str, change: Object) -> None:
        """Merge patch."""
        self.run("patch", kind, name, "--type=merge", "-p", json.dumps(change))

    def delete(self, kind: str, name: str, *flags: str) -> None:
        self.run("delete", kind, name, "--ignore-not-found", *flags)

    def everything(self, ignore: Iterable[str] = ()) -> set[str]:
        """KIND/NAME of every object of every kind that can be listed in this namespace, but those of `ignore`d kinds."""
        kinds = self.run("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
        # What the cluster itself keeps in every namespace, or writes as a log
        skipped = {"events", "events.events.k8s.io", "pods.metrics.k8s.io", *ignore}
        wanted = sorted(kind for kind in kinds if kind not in skipped)
        found = json.loads(self.run("get", ",".join(wanted), "-o", "json"))["items"]
        return {f"{item['kind']}/{item['metadata']['name']}" for item in found}


def condition(model: Object, kind: str) -> Object:
    """One condition of an object; an empty one where it is not set."""
    for found in model.get("status", {}).get("conditions", []):
        if found["type"] == kind:
            return dict(found)
    return {}


def ready(pod: Object) -> bool:
    """Whether a pod is ready and not on its way out."""
    return condition(pod, "Ready").get("status") == "True" and "deletionTimestamp" not in pod["metadata"]
