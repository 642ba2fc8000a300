"""What dies comes back by itself, and Ready is never claimed by a model that does not answer."""

from __future__ import annotations

import pathlib
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from harness.client import Client
from harness.kube import Kube, KubeError, Object, condition, poll, ready
from harness.models import Models, manifest
from harness.release import Release

CONTROL = pathlib.Path(__file__).with_name("cluster") / "control"


@pytest.fixture
def served(model: Object, models: Models) -> str:
    """The shared model, ready."""
    name = str(model["metadata"]["name"])
    models.wait_ready(name)
    return name


@pytest.fixture
def honest(served: str, models: Models, client: Client) -> Iterator[None]:
    """Meanwhile: whenever the status says Ready twice in a row, a request in between is answered."""
    lies: list[str] = []
    stop = threading.Event()

    def is_ready() -> bool:
        return condition(models.get(served), "Ready").get("status") == "True"

    def watch() -> None:
        while not stop.wait(0.5):
            try:
                if not is_ready():
                    continue
                answer = client.chat(served, max_tokens=2)
                # The status may be one probe behind; it must not go on claiming what is not so
                if answer["status"] != 200:
                    time.sleep(8)
                    if is_ready() and client.chat(served, max_tokens=2)["status"] != 200:
                        lies.append(f"Ready, and the answer is {answer['status']} {answer['text'][:200]}")
            except (KubeError, KeyError, subprocess.TimeoutExpired, ValueError):
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert lies == []


def test_engine_killed(served: str, honest: None, models: Models, client: Client) -> None:
    (pod,) = [pod for pod in models.pods(served) if ready(pod)]
    name = pod["metadata"]["name"]
    restarts = pod["status"]["containerStatuses"][0]["restartCount"]
    models.engine_kill(name)

    def restarted() -> Object | None:
        status = (models.kube.get("pod", name) or {})["status"]["containerStatuses"][0]
        return status if status["restartCount"] > restarts else None

    status = poll("the container was restarted", restarted, 60)
    ended = status["lastState"]["terminated"]
    assert ended["exitCode"] != 0
    assert "engine" in ended["message"].strip().splitlines()[-1].lower(), ended["message"]
    models.wait_ready(served)
    assert client.chat(served)["status"] == 200


def test_pod_deleted(served: str, honest: None, models: Models, client: Client) -> None:
    (pod,) = [pod for pod in models.pods(served) if ready(pod)]
    models.kube.delete("pod", pod["metadata"]["name"], "--grace-period=0", "--force")
    poll(
        "another pod is there",
        lambda: pod["metadata"]["uid"] not in {p["metadata"]["uid"] for p in models.pods(served)},
        60,
    )
    models.wait_replicas(served, 1)
    assert client.chat(served)["status"] == 200


def test_operator_killed_in_the_middle_of_a_change(
    served: str, models: Models, release: Release, client: Client
) -> None:
    """Killed three times while a model is made: the model becomes ready, once, with one download and one pod."""
    spec = manifest("survivor", storage={"persistentVolumeClaim": {}})
    with models.temporary(spec) as name:
        for _ in range(3):
            for pod in release.pods("operator"):
                release.kube.delete("pod", pod["metadata"]["name"], "--grace-period=0", "--force")
            time.sleep(4)
        models.wait_ready(name, 180)
        assert len(models.pods(name)) == 1
        jobs = [
            job
            for job in models.kube.list("jobs")
            if job["metadata"]["labels"].get("kubeinfer.io/model") == name
        ]
        assert len(jobs) <= 1
    models.wait_gone(name)


def test_stopped_operator_blocks_nothing(
    served: str, models: Models, release: Release, client: Client, shared_weights: str
) -> None:
    """No operator: requests are served, and `kubectl delete` takes the model and all that is its away."""
    spec = manifest("orphan", storage={"existingClaim": shared_weights})
    models.kube.apply(spec)
    models.wait_ready("orphan")
    release.kube.run("scale", "deployment/kubeinfer-operator", "--replicas=0")
    try:
        poll(
            "the operator is gone",
            lambda: not release.kube.list("pods", "app.kubernetes.io/name=kubeinfer-operator"),
            150,  # the kubelet may look at a pod that has ended only a minute later
        )
        assert client.chat(served)["status"] == 200
        models.kube.delete("inferencemodel", "orphan", "--timeout=20s")
        models.wait_gone("orphan")
    finally:
        release.kube.run("scale", "deployment/kubeinfer-operator", "--replicas=1")
        release.wait_ready("operator", 1)


def test_api_server_restart(
    served: str, own_cluster: bool, models: Models, client: Client, release: Release, system: Kube
) -> None:
    """kill -9 of the API server: streams go on, and a change made afterwards is acted on."""
    if not own_cluster:
        pytest.skip("only on the cluster that e2e/run brought up")
    before = models.staying(served)
    with client.detached_load(served, tokens=24) as report:
        time.sleep(1)
        subprocess.run([CONTROL, "restart", "apiserver"], check=True)
        poll("the API server answers again", lambda: system.run("get", "--raw", "/readyz") or None, 60)
        models.kube.run("scale", f"inferencemodel/{served}", "--replicas=2")
        models.wait_replicas(served, 2)
        models.kube.run("scale", f"inferencemodel/{served}", "--replicas=1")
        models.wait_replicas(served, 1)
    assert report["failures"] == []
    assert report["requests"] > 0
    assert before & models.staying(served) or len(models.staying(served)) == 1
    for component in ("operator", "gateway"):
        for pod in release.pods(component):
            assert pod["status"]["containerStatuses"][0]["restartCount"] == 0, component


def test_bad_change_keeps_the_last_good_one_serving(served: str, models: Models, client: Client) -> None:
    """An image that does not exist: the old pods serve on, the condition names the image, undoing it clears all."""
    before = models.staying(served)
    models.kube.patch("inferencemodel", served, {"spec": {"image": "localhost/no-such-image:1"}})
    try:
        found = models.wait_reason(
            served, "RuntimeReady", {"ImagePullFailed", "RolloutFailed", "RolledBack"}, 60
        )
        assert "no-such-image" in found["message"]
        assert client.chat(served)["status"] == 200
        assert before <= models.staying(served)
    finally:
        models.kube.run(
            "patch",
            "inferencemodel",
            served,
            "--type=json",
            "-p",
            '[{"op": "remove", "path": "/spec/image"}]',
        )
    models.wait_ready(served)
    assert before & models.staying(served)
