"""Hubs that misbehave: what can heal heals, with little fetched twice; the rest says precisely what a person must do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.hub import REPOSITORY, Hub
from harness.kube import Object, condition
from harness.models import Models, manifest

SIZE = 98_362_432


@pytest.fixture(autouse=True)
def clean_hub(hub: Hub) -> Iterator[None]:
    hub.faults()
    hub.reset_stats()
    yield
    hub.faults()


def weights_only(name: str, uri: str = f"hf://{REPOSITORY}", **spec: object) -> Object:
    """A model that fetches its weights and starts nothing."""
    return manifest(name, uri, replicas=0, **spec)


def fetched(models: Models, name: str, timeout: float = 120) -> Object:
    return models.wait(
        name, "weights are here", lambda m: condition(m, "WeightsReady").get("status") == "True", timeout
    )


@pytest.mark.parametrize(
    ("name", "fault", "most"),
    [
        # Resumed where the connection broke
        ("breaks", "break:after=30000000,times=2,path=*.gguf", 1.1),
        # One wrong byte: found by the hash, and that file fetched again
        ("corrupt-once", "corrupt:after=50000000,times=1,path=*.gguf", 2.1),
        ("busy", "429:times=3,seconds=1", 1.1),
        ("errors", "500:times=2", 1.1),
    ],
)
def test_passing_faults_heal(models: Models, hub: Hub, name: str, fault: str, most: float) -> None:
    hub.faults(fault)
    with models.temporary(weights_only(name)):
        model = fetched(models, name)
        assert model["status"]["weights"]["progress"] == "100%"
        assert hub.stats()["bytes"] <= most * SIZE
    models.wait_gone(name)


def test_modelscope_and_mirror(models: Models, hub: Hub) -> None:
    """The first hub has no such model, the mirror has it: the status says where the weights came from."""
    spec = weights_only("mirrored", "hf://Nobody/Nothing", model={"mirrors": [f"modelscope://{REPOSITORY}"]})
    with models.temporary(spec) as name:
        model = fetched(models, name)
        assert model["status"]["weights"]["source"] == f"modelscope://{REPOSITORY}"
    models.wait_gone(name)


@pytest.mark.parametrize(
    ("name", "uri", "reason", "word"),
    [
        ("bad-id", "hf://Nobody/Nothing", "ModelNotFound", "Nobody/Nothing"),
        ("bad-revision", f"hf://{REPOSITORY}@no-such-branch", "RevisionNotFound", "no-such-branch"),
    ],
)
def test_wrong_names_are_told_apart(models: Models, name: str, uri: str, reason: str, word: str) -> None:
    with models.temporary(weights_only(name, uri)):
        found = models.wait_reason(name, "WeightsReady", {reason}, 40)
        assert word in found["message"]
        assert not [child for child in models.children(name) if child.startswith("Job/")]
    models.wait_gone(name)


def test_token(models: Models, hub: Hub) -> None:
    """Forbidden without the token; right once the Secret is there."""
    hub.copy("Private/Model")
    hub.kube.run(
        "exec",
        "hub",
        "--",
        "sh",
        "-c",
        """echo '{"token": "s3cret", "gated": true}' >/models/Private/Model/.hub.json""",
    )
    reference = {"tokenSecretRef": {"name": "hub-token", "key": "token"}}
    with models.temporary(weights_only("private", "hf://Private/Model")) as name:
        found = models.wait_reason(name, "WeightsReady", {"Forbidden"}, 40)
        assert "token" in found["message"].lower()
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "hub-token"},
            "stringData": {"token": "s3cret"},
        }
        models.kube.apply(secret, weights_only("private", "hf://Private/Model", model=reference))
        fetched(models, name)
    models.kube.delete("secret", "hub-token")
    models.wait_gone(name)


def test_wrong_bytes_are_never_served(models: Models, hub: Hub) -> None:
    hub.faults("corrupt:after=50000000,path=*.gguf")
    with models.temporary(weights_only("corrupt")) as name:
        found = models.wait_reason(name, "WeightsReady", {"HashMismatch"}, 150)
        assert ".gguf" in found["message"]
        assert condition(models.get(name), "Ready")["status"] != "True"
    models.wait_gone(name)


def test_stalls_heal(models: Models, hub: Hub) -> None:
    """Twice the bytes stop coming: the transfer is given up after half a minute each, and goes on where it stopped."""
    hub.faults("stall:after=20000000,seconds=600,times=2,path=*.gguf")
    with models.temporary(weights_only("stalled")) as name:

        def moving(model: Object) -> bool:
            return bool((model.get("status", {}).get("weights") or {}).get("bytes", 0) > 1_000_000)

        seen = models.wait(name, "progress in the status", moving, 60)["status"]["weights"]
        assert seen["total"] == SIZE
        assert seen["bytes"] < SIZE
        fetched(models, name, 150)
        assert hub.stats()["bytes"] <= 1.1 * SIZE
    models.wait_gone(name)


def test_one_download_for_models_that_share_a_claim(models: Models, hub: Hub) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "common"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    models.kube.apply(claim)
    names = ["first", "second", "third"]
    models.kube.apply(*(weights_only(name, storage={"existingClaim": "common"}) for name in names))
    for name in names:
        fetched(models, name)
    assert hub.stats()["bytes"] <= 1.1 * SIZE
    models.kube.delete("inferencemodel", "first", "--wait=false")
    models.wait(names[1], "still there", lambda m: condition(m, "WeightsReady").get("status") == "True", 20)
    for name in names[1:]:
        models.kube.delete("inferencemodel", name, "--wait=false")
    for name in names:
        models.wait_gone(name)
    models.kube.delete("persistentvolumeclaim", "common")
