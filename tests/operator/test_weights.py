"""How a model's weights come to their storage, told by the pure reconcile."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
from operator_world import COMMIT, Cluster, claim, condition

from kubeinfer_operator import names
from kubeinfer_operator.builders.job import prune_container
from kubeinfer_operator.hub import HubError
from kubeinfer_operator.kube import (
    CLAIMS,
    CLASSES,
    JOBS,
    PODS,
    POLICIES,
)
from kubeinfer_operator.world import Progress, Token


def test_failed_download_then_mirror_then_first_again() -> None:
    cluster = Cluster()
    cluster.model(model={"uri": "hf://acme/smol", "mirrors": ["modelscope://acme/smol"]})
    cluster.settle()
    cluster.fail_job("DownloadStalled", "no byte for 30 s")
    cluster.settle()
    first, second = sorted(cluster.jobs(), key=lambda job: "status" not in job)
    assert second["spec"]["template"]["spec"]["containers"][0]["args"][0].startswith(
        "modelscope://acme/smol@"
    )
    cluster.fail_job("HashMismatch", "wrong bytes", second)
    cluster.settle()
    found = condition(cluster.current(), "WeightsReady")
    assert found["reason"] == "DownloadStalled"
    assert "HashMismatch" in found["message"]
    assert cluster.current()["status"]["phase"] == "Failed"
    cluster.wait(121)
    cluster.settle()
    again = cluster.world.get(JOBS, "default", first["metadata"]["name"])
    assert again["metadata"]["uid"] != first["metadata"]["uid"], "the Job is made anew after the back-off"
    cluster.finish_job(again)
    cluster.settle()
    assert condition(cluster.current(), "WeightsReady")["status"] == "True"
    assert cluster.current()["status"]["weights"]["source"] == "hf://acme/smol"


def test_a_mesh_leaves_the_downloads_pods_alone() -> None:
    cluster = Cluster()
    cluster.model(model={"uri": "hf://acme/smol"})
    cluster.settle()
    (job,) = cluster.jobs()
    pods = job["spec"]["template"]["metadata"]
    assert pods["labels"]["sidecar.istio.io/inject"] == "false"
    assert pods["labels"]["kuma.io/sidecar-injection"] == "disabled"
    assert pods["annotations"]["linkerd.io/inject"] == "disabled"
    assert job["metadata"]["labels"].items() <= pods["labels"].items()
    cluster.finish_job(job)
    cluster.settle()
    runtime = cluster.deployment()
    assert runtime is not None
    template = runtime["spec"]["template"]["metadata"]
    assert not any("inject" in key for key in [*template["labels"], *template.get("annotations", {})])


def test_hub_that_refuses_is_left_for_the_mirror() -> None:
    answers = {"hf://acme/smol": HubError("ModelNotFound", "no such model", False)}
    cluster = Cluster(answers=dict(answers))
    cluster.model(model={"uri": "hf://acme/smol"})
    cluster.settle()
    assert condition(cluster.current(), "Planned")["reason"] == "ModelNotFound"
    assert condition(cluster.current(), "WeightsReady")["reason"] == "ModelNotFound"
    assert cluster.jobs() == []
    other = Cluster(answers=dict(answers))
    other.model(model={"uri": "hf://acme/smol", "mirrors": ["modelscope://acme/smol"]})
    other.settle()
    assert other.current()["status"]["weights"]["source"] == "modelscope://acme/smol"


def test_progress_is_shown() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.settle()
    cluster.puller_pod(cluster.jobs()[0], {"running": {}})
    out = cluster.reconcile()
    assert out.follow is not None
    assert out.again == cluster.world.settings.progress_seconds
    cluster.world.progress[("default", "smol")] = Progress(135_000_000, 270_000_000, 1_000_000, 135)
    cluster.reconcile()
    weights = cluster.current()["status"]["weights"]
    assert (weights["bytes"], weights["rate"], weights["eta"], weights["progress"]) == (
        135_000_000,
        1_000_000,
        135,
        "50%",
    )


def test_a_second_attempt_says_what_ended_the_first() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.settle()
    (job,) = cluster.jobs()
    cluster.puller_pod(
        job,
        {"terminated": {"exitCode": 18, "message": '{"reason": "DownloadStalled", "message": "no byte"}'}},
    )
    job = {**copy.deepcopy(job), "status": {"failed": 1, "active": 1}}
    cluster.add(JOBS, job)
    cluster.wait(10)
    again = copy.deepcopy(cluster.puller_pod(job, {"running": {}}))
    again["metadata"]["name"] += "y"
    cluster.puller_pod(
        job,
        {"terminated": {"exitCode": 18, "message": '{"reason": "DownloadStalled", "message": "no byte"}'}},
    )
    cluster.add(
        PODS, again | {"metadata": {**again["metadata"], "creationTimestamp": "2026-01-01T00:00:20Z"}}
    )
    cluster.settle()
    found = condition(cluster.current(), "WeightsReady")
    assert found["reason"] == "DownloadStalled"
    assert "no byte" in found["message"]
    assert cluster.current()["status"]["phase"] == "Downloading"


def test_models_that_share_a_claim_share_the_job() -> None:
    cluster = Cluster()
    cluster.add(CLAIMS, claim("common"))
    uids = []
    for name in ("one", "two", "three"):
        uids.append(cluster.model(name, storage={"existingClaim": "common"})["metadata"]["uid"])
        cluster.settle(name)
    (job,) = cluster.jobs()
    assert {ref["uid"] for ref in job["metadata"]["ownerReferences"]} == set(uids)
    cluster.finish_job(job)
    for name in ("one", "two", "three"):
        cluster.settle(name)
        assert condition(cluster.current(name), "WeightsReady")["status"] == "True"
        assert cluster.deployment(name) is not None


def test_storage_that_is_missing_is_named() -> None:
    cluster = Cluster()
    cluster.model(storage={"persistentVolumeClaim": {"storageClassName": "fast"}})
    cluster.settle()
    found = condition(cluster.current(), "WeightsReady")
    assert found["reason"] == "StorageClassMissing"
    assert "standard" in found["message"]
    cluster.edit(storage={"existingClaim": "nowhere"})
    cluster.settle()
    assert condition(cluster.current(), "WeightsReady")["reason"] == "ClaimMissing"
    bare = Cluster()
    bare.world.caches[CLASSES].drop(("", "standard"))
    bare.model()
    bare.settle()
    assert condition(bare.current(), "WeightsReady")["reason"] == "NoDefaultStorageClass"


@pytest.mark.parametrize("storage", [{"ephemeral": {}}, {"hostPath": {"path": "/data"}}])
def test_weights_fetched_by_the_pods(storage: dict[str, object]) -> None:
    cluster = Cluster()
    cluster.model(storage=storage)
    cluster.settle()
    assert cluster.jobs() == []
    pod = cluster.deployment()["spec"]["template"]["spec"]
    (fetch,) = pod["initContainers"]
    assert fetch["args"][0] == f"hf://acme/smol@{COMMIT}"
    mounts = {m["name"]: m for m in pod["containers"][0]["volumeMounts"]}
    assert mounts["models"]["readOnly"] is True
    assert "Egress" not in cluster.world.get(POLICIES, "default", "smol")["spec"]["policyTypes"]


def test_weights_on_a_claim_already() -> None:
    cluster = Cluster()
    cluster.add(CLAIMS, claim("models"))
    cluster.model(model={"uri": "pvc://models/llama/8b"})
    cluster.settle()
    assert cluster.jobs() == []
    assert cluster.deployment()["spec"]["template"]["spec"]["containers"][0]["args"][0] == "/models/llama/8b"
    assert cluster.desk.asked == []


def test_a_claim_made_anew_is_filled_anew() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    cluster.world.caches[CLAIMS].drop(("default", "smol-weights"))
    cluster.settle()
    assert len([job for job in cluster.jobs() if not job.get("status")]) == 1


def test_secrets_of_the_template_stay_within_the_hub_they_are_for() -> None:
    answers = {"hf://acme/smol": HubError("HubUnavailable", "503", False)}
    cluster = Cluster(answers=answers)
    cluster.model(
        model={
            "uri": "hf://acme/smol",
            "mirrors": ["modelscope://acme/smol"],
            "tokenSecretRef": {"name": "hub"},
        }
    )
    out = cluster.reconcile()
    assert out.token_needed
    cluster.world.tokens[("default", "smol")] = Token("hub", "token", "secret")
    cluster.settle()
    asked = {question[0].scheme: question[3] for question in cluster.desk.asked}
    assert asked == {"hf": "secret", "modelscope": ""}
    env = cluster.jobs()[0]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert not [e for e in env if "valueFrom" in e]
    assert names.LABEL_MODEL in cluster.jobs()[0]["metadata"]["labels"]


def test_a_claim_holds_what_serves_and_what_comes() -> None:
    cluster = Cluster()
    cluster.add(CLASSES, {"metadata": {"name": "growing"}, "allowVolumeExpansion": True})
    cluster.model(storage={"persistentVolumeClaim": {"storageClassName": "growing"}})
    cluster.serve()
    assert "initContainers" not in cluster.jobs()[0]["spec"]["template"]["spec"], (
        "nothing to remove the first time"
    )
    before = cluster.deployment()["spec"]["template"]["spec"]["containers"][0]["args"][0].removeprefix(
        "/models/"
    )
    cluster.edit(model={"uri": "hf://acme/smol", "exclude": ["*.txt"]})
    held = copy.deepcopy(cluster.world.get(CLAIMS, "default", "smol-weights"))
    held["status"] = {"phase": "Pending"}
    cluster.add(CLAIMS, held)
    cluster.reconcile()
    assert cluster.world.get(CLAIMS, "default", "smol-weights")["spec"] == held["spec"], (
        "only a bound claim can grow"
    )
    cluster.add(CLAIMS, held | {"status": {"phase": "Bound"}})
    cluster.settle()
    assert (
        cluster.world.get(CLAIMS, "default", "smol-weights")["spec"]["resources"]["requests"]["storage"]
        == "2Gi"
    )
    (job,) = [job for job in cluster.jobs() if not job.get("status")]
    pod = job["spec"]["template"]["spec"]
    coming = pod["containers"][0]["args"][pod["containers"][0]["args"].index("--local-dir") + 1].removeprefix(
        "/models/"
    )
    assert sorted(pod["initContainers"][0]["command"][4:]) == sorted([before, coming])


def test_removing_old_revisions_from_a_claim(tmp_path: Path) -> None:
    for name in (
        "a" * 16,
        "b" * 16,
        "c" * 16,
        "." + "a" * 16 + ".incomplete",
        "." + "b" * 16 + ".incomplete",
        "lost+found",
        "notes",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    command = prune_container(dict.fromkeys(("image", "imagePullPolicy", "securityContext", "volumeMounts", "resources")), ["a" * 16])["command"]  # fmt: skip
    subprocess.run(
        [sys.executable, *command[1:3], str(tmp_path), *command[4:]], check=True, capture_output=True
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "." + "a" * 16 + ".incomplete",
        "a" * 16,
        "lost+found",
        "notes",
    ]
