"""Under a steady load of streams: no request fails and no stream is cut, whatever a person changes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from harness.client import Client
from harness.kube import Object, poll
from harness.models import Models
from harness.release import NAME, Release


@pytest.fixture
def steady(model: Object, client: Client, models: Models) -> Iterator[Any]:
    """A load of streams that must end without a failure; yields the model's name."""
    name = model["metadata"]["name"]
    models.wait_ready(name)
    load = client.load(name, streams=3, tokens=24)
    time.sleep(2)
    try:
        yield name
        time.sleep(2)
    finally:
        report = load.finish()
    print({key: report[key] for key in ("requests", "tokens", "first_p50", "first_max")})
    assert report["failures"] == []
    assert report["requests"] >= 3


def test_scale_up_and_down(steady: str, models: Models) -> None:
    models.kube.run("scale", f"inferencemodel/{steady}", "--replicas=3")
    models.wait_replicas(steady, 3)
    models.kube.run("scale", f"inferencemodel/{steady}", "--replicas=1")
    models.wait_replicas(steady, 1)
    poll("the other pods are gone", lambda: len(models.pods(steady)) == 1, 120)


def test_rolling_update(steady: str, models: Models) -> None:
    (before,) = models.pods(steady)
    models.kube.patch("inferencemodel", steady, {"spec": {"engine": {"maxNumSeqs": 12}}})
    models.wait_ready(steady, 180)

    def replaced() -> bool:
        pods = models.pods(steady)
        return len(pods) == 1 and pods[0]["metadata"]["uid"] != before["metadata"]["uid"]

    poll("one new pod in place of the old one", replaced, 180)
    (after,) = models.pods(steady)
    assert "12" in after["spec"]["containers"][0]["args"]


def test_gateway_restart(steady: str, release: Release) -> None:
    before = {pod["metadata"]["uid"] for pod in release.pods("gateway")}
    release.kube.run("rollout", "restart", f"deployment/{NAME}-gateway")
    release.kube.run("rollout", "status", f"deployment/{NAME}-gateway", "--timeout=240s", timeout=250)
    assert not before & {pod["metadata"]["uid"] for pod in release.wait_ready("gateway", 2)}


def test_operator_restart_touches_no_runtime(steady: str, release: Release, models: Models) -> None:
    before = {pod["metadata"]["uid"] for pod in models.pods(steady)}
    release.kube.run("rollout", "restart", f"deployment/{NAME}-operator")
    release.kube.run("rollout", "status", f"deployment/{NAME}-operator", "--timeout=120s", timeout=130)
    time.sleep(5)
    assert {pod["metadata"]["uid"] for pod in models.pods(steady)} == before
