"""Upgrade, delete, uninstall: the runtimes are left alone, and then nothing is left."""

from __future__ import annotations

import time

from harness.client import Client
from harness.hub import Hub
from harness.kube import Kube, Object, poll, ready
from harness.models import Models, manifest
from harness.release import Release


def test_chart_upgrade_leaves_runtimes_alone(
    model: Object, models: Models, release: Release, client: Client
) -> None:
    """A new operator image's tag and new values: operator and gateway are replaced, the model's pods are not."""
    name = model["metadata"]["name"]
    models.wait_ready(name)
    before = {pod["metadata"]["uid"] for pod in models.pods(name)}
    operators = {pod["metadata"]["uid"] for pod in release.pods("operator")}
    images = release.values["images"] | {
        "runtimeCpu": {"repository": "localhost/kubeinfer-runtime-cpu", "tag": "next"}
    }
    with client.load(name, streams=2, tokens=16) as load:
        release.install(images=images)
        poll(
            "a new operator",
            lambda: not operators & {pod["metadata"]["uid"] for pod in release.pods("operator")},
            60,
        )
        release.wait_ready("operator", 1)
        time.sleep(8)
        release.install()
        release.wait_ready("operator", 1)
    assert load.report["failures"] == []
    assert {pod["metadata"]["uid"] for pod in models.pods(name)} == before


def test_delete_leaves_nothing(models: Models, work: Kube) -> None:
    """Everything of every kind that the API server can list, before and after a model's life."""
    before = work.everything()
    models.kube.apply(manifest("short-lived", replicas=2, storage={"persistentVolumeClaim": {}}))
    models.wait_replicas("short-lived", 2)
    made = work.everything() - before
    assert {"Deployment/short-lived", "Service/short-lived", "InferenceModel/short-lived"} <= made
    models.kube.delete("inferencemodel", "short-lived")
    poll("nothing is left", lambda: not (work.everything() & made), 150, every=1)


def test_everything_goes(
    model: Object, models: Models, release: Release, hub: Hub, work: Kube, system: Kube
) -> None:
    name = model["metadata"]["name"]
    assert [pod for pod in models.pods(name) if ready(pod)]
    models.kube.delete("inferencemodel", name)
    models.wait_gone(name)
    release.uninstall()
    kept = {"ServiceAccount/default", "ConfigMap/kube-root-ca.crt"}

    def left() -> set[str]:
        return {item for item in system.everything() - kept if not item.startswith("Secret/default-token")}

    # A pod whose containers have ended goes when its kubelet looks at it again, which may be a minute later.
    poll("nothing of the release is left", lambda: not left(), 150, every=1)
    for kind in ("clusterroles", "clusterrolebindings"):
        assert "kubeinfer-" not in system.run("get", kind, "-o", "name")
    # The definition stays, with what users wrote, until they delete it
    assert system.get("crd", "inferencemodels.kubeinfer.io") is not None
    system.delete("crd", "inferencemodels.kubeinfer.io", "--timeout=60s")
