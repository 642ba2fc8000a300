"""Scale to zero and back: what waits is answered, what is too much is told so at once."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from harness.client import Client
from harness.kube import condition, poll
from harness.models import Models, manifest
from harness.release import Release

QUEUE = 6


@pytest.fixture(scope="module")
def sleeper(models: Models, release: Release, shared_weights: str) -> Iterator[str]:
    """A model that sleeps after some seconds without a request; the gateways queue few requests, one gateway only."""
    small = {
        "replicas": 1,
        "extraArgs": [f"--queue-size={QUEUE}", "--queue-timeout=60"],
        "shutdownTimeout": 60,
    }
    release.install(gateway=small)
    release.wait_ready("gateway", 1)
    scaling = {"minReplicas": 0, "maxReplicas": 1, "scaleToZeroDelay": 3, "scaleDownDelay": 1}
    spec = manifest("sleeper", autoscaling=scaling, storage={"existingClaim": shared_weights})
    with models.temporary(spec) as name:
        yield name
    release.install()
    release.wait_ready("gateway", 2)


def asleep(models: Models, name: str) -> None:
    models.wait(name, "asleep", lambda model: model.get("status", {}).get("phase") == "Idle", 150)
    poll("no pod is left", lambda: not models.pods(name), 150)


def test_sleeps_without_requests(sleeper: str, models: Models) -> None:
    asleep(models, sleeper)
    assert condition(models.get(sleeper), "WeightsReady")["status"] == "True"


def test_requests_at_zero_are_answered(sleeper: str, models: Models, client: Client) -> None:
    asleep(models, sleeper)
    started = time.monotonic()
    report = client.load(sleeper, "--once", streams=4, tokens=6).finish()
    print(
        f"woken and answered in {time.monotonic() - started:.1f} s, {report['keepalives']} keep-alive comments"
    )
    assert report["failures"] == []
    assert [result["status"] for result in report["results"]] == [200] * 4


def test_beyond_the_queue_429_at_once(sleeper: str, models: Models, client: Client) -> None:
    asleep(models, sleeper)
    report = client.load(sleeper, "--once", streams=QUEUE + 3, tokens=6).finish()
    refused = [result for result in report["results"] if result["status"] == 429]
    answered = [result for result in report["results"] if result["status"] == 200]
    assert len(refused) == 3
    assert len(answered) == QUEUE
    assert all(not result["error"] for result in answered), report["failures"]
    for result in refused:
        assert result["seconds"] < 2
        assert int(result["headers"]["retry-after"]) >= 1


def test_past_the_deadline_503(
    sleeper: str, models: Models, client: Client, release: Release, shared_weights: str
) -> None:
    """A model that cannot wake (no node has room) answers 503 when the time is up."""
    release.install(gateway={"replicas": 1, "extraArgs": ["--queue-timeout=3"], "shutdownTimeout": 60})
    spec = manifest(
        "never",
        autoscaling={"minReplicas": 0, "maxReplicas": 1, "scaleToZeroDelay": 3},
        resources={"requests": {"cpu": "1000"}},
        storage={"existingClaim": shared_weights},
    )
    with models.temporary(spec) as name:
        models.wait(
            name,
            "weights are there",
            lambda model: condition(model, "WeightsReady").get("status") == "True",
            60,
        )
        started = time.monotonic()
        answer = client.chat(name)
        assert answer["status"] == 503, answer
        assert 2 < time.monotonic() - started < 15
        assert int(answer["headers"]["retry-after"]) >= 1
        found = models.wait_reason(name, "RuntimeReady", {"InsufficientResources"}, 30)
        assert "cpu" in found["message"]
