"""What a model goes back to, what stays for that, and what is taken away, when pods and downloads fail or the spec changes its mind."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from operator_world import CLAIMS, HUB, Cluster, claim, condition, pod_status

from kubeinfer_operator import names
from kubeinfer_operator.hub import HubError
from kubeinfer_operator.kube import CLASSES, DEPLOYMENTS, JOBS, PODS, REVISIONS, Manifest
from kubeinfer_operator.world import Token

LENGTH = "--max-model-len"


def length_of(cluster: Cluster) -> str:
    arguments = cluster.deployment()["spec"]["template"]["spec"]["containers"][0]["args"]  # type: ignore[index]
    return str(arguments[arguments.index(LENGTH) + 1])


def runtime_pods(cluster: Cluster) -> list[Manifest]:
    return [
        p
        for p in cluster.world.of_model(PODS, "default", "smol")
        if "runtime" in p["metadata"]["labels"].values()
    ]


def change_pod(cluster: Cluster, status: dict[str, Any], name: str | None = None) -> None:
    pod = copy.deepcopy(runtime_pods(cluster)[0])
    pod["metadata"]["name"] = name or pod["metadata"]["name"]
    cluster.add(PODS, pod | {"status": status})


def rollout(cluster: Cluster, reason: str) -> None:
    """The Deployment controller's word on the progress of a template."""
    deployment = copy.deepcopy(cluster.deployment())
    assert deployment is not None
    deployment["status"] = {
        "observedGeneration": deployment["metadata"].get("generation", 0),
        "conditions": [{"type": "Progressing", "status": "True", "reason": reason}],
    }
    cluster.add(DEPLOYMENTS, deployment)


def bound(cluster: Cluster, name: str = "smol-weights") -> None:
    held = copy.deepcopy(cluster.world.get(CLAIMS, "default", name))
    assert held is not None
    cluster.add(CLAIMS, held | {"status": {"phase": "Bound"}})


def deleted(cluster: Cluster, kind: str) -> list[str]:
    return [
        what.partition("/")[2] for how, what in cluster.writes if how == "delete" and what.startswith(kind)
    ]


def test_a_crash_long_after_a_change_takes_nothing_back() -> None:
    cluster = Cluster()
    cluster.model(replicas=3, engine={"maxModelLen": 1024})
    cluster.serve()
    cluster.edit(engine={"maxModelLen": 2048})
    cluster.serve()
    rollout(cluster, "NewReplicaSetAvailable")
    change_pod(cluster, pod_status("crash"))
    cluster.settle()
    assert length_of(cluster) == "2048"
    assert condition(cluster.current(), "RuntimeReady")["reason"] == "EngineFailed"
    assert cluster.current()["status"]["phase"] == "Degraded"
    # Going back to what has served once is a change, which may fail.
    cluster.run_pods()
    cluster.edit(engine={"maxModelLen": 1024})
    cluster.settle()
    assert length_of(cluster) == "1024"
    rollout(cluster, "ReplicaSetUpdated")
    cluster.run_pods(state="crash")
    cluster.settle()
    assert length_of(cluster) == "2048"
    assert condition(cluster.current(), "RuntimeReady")["reason"] == "RolledBack"


def test_a_claim_stays_until_what_comes_after_it_has_served() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    bound(cluster)
    cluster.add(CLAIMS, claim("shared"))
    cluster.edit(storage={"existingClaim": "shared"})
    cluster.settle()
    for job in cluster.jobs():
        if not job.get("status"):
            cluster.finish_job(job)
    cluster.settle()
    cluster.run_pods(state="crash")
    cluster.settle()
    cluster.run_pods()
    cluster.settle()
    assert condition(cluster.current(), "Ready")["reason"] == "ServingLastGood"
    (volume, *_) = cluster.deployment()["spec"]["template"]["spec"]["volumes"]  # type: ignore[index]
    assert volume["persistentVolumeClaim"]["claimName"] == "smol-weights"
    assert deleted(cluster, "PersistentVolumeClaim") == []
    cluster.edit(storage={"existingClaim": "shared"}, engine={"maxModelLen": 512})
    cluster.serve()
    assert deleted(cluster, "PersistentVolumeClaim") == ["smol-weights"]


def test_nothing_is_taken_away_at_zero_replicas() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    cluster.add(CLAIMS, claim("shared"))
    cluster.edit(storage={"existingClaim": "shared"}, replicas=0)
    cluster.settle()
    for job in cluster.jobs():
        if not job.get("status"):
            cluster.finish_job(job)
    cluster.settle()
    assert deleted(cluster, "PersistentVolumeClaim") == []


def test_a_pod_that_has_ended_is_no_replica() -> None:
    evicted = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory."}
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    change_pod(cluster, evicted, "smol-evicted")
    cluster.settle()
    assert condition(cluster.current(), "RuntimeReady")["reason"] == "Running"
    assert cluster.current()["status"]["phase"] == "Ready"
    change_pod(cluster, evicted)
    for pod in runtime_pods(cluster):
        if pod["metadata"]["name"] != "smol-evicted":
            cluster.world.caches[PODS].drop(("default", pod["metadata"]["name"]))
    cluster.settle()
    found = condition(cluster.current(), "RuntimeReady")
    assert "smol-evicted ended: Evicted: The node was low on memory." in found["message"]


def test_a_download_that_nobody_wants_is_stopped_and_its_files_go() -> None:
    other = dataclasses.replace(HUB, revision="f" * 40)
    cluster = Cluster(answers={"hf://acme/other": other})
    cluster.model()
    cluster.settle()
    (first,) = cluster.jobs()
    cluster.edit(model={"uri": "hf://acme/other"})
    cluster.settle()
    (second,) = cluster.jobs()
    assert deleted(cluster, "Job") == [first["metadata"]["name"]]
    pod = second["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["command"][4:] == [second["metadata"]["labels"][names.LABEL_ARTIFACT]]


def test_suspending_breaks_a_download_off() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.settle()
    cluster.edit(suspend=True)
    cluster.settle()
    assert cluster.jobs() == []
    assert condition(cluster.current(), "WeightsReady")["reason"] == "Suspended"
    cluster.edit(suspend=False)
    cluster.serve()
    cluster.edit(suspend=True)
    cluster.settle()
    assert condition(cluster.current(), "WeightsReady")["status"] == "True", "what is there stays"


def test_what_a_failed_change_fetched_does_not_stay() -> None:
    answers = {f"hf://acme/m{i}": dataclasses.replace(HUB, revision=str(i) * 40) for i in range(4)}
    cluster = Cluster(answers=dict(answers))
    cluster.model(model={"uri": "hf://acme/m0"})
    cluster.serve()
    serving = cluster.jobs()[0]["metadata"]["labels"][names.LABEL_ARTIFACT]
    for i in (1, 2, 3):
        cluster.edit(model={"uri": f"hf://acme/m{i}"})
        cluster.settle()
        (job,) = [job for job in cluster.jobs() if not job.get("status")]
        coming = job["metadata"]["labels"][names.LABEL_ARTIFACT]
        kept = job["spec"]["template"]["spec"]["initContainers"][0]["command"][4:]
        assert sorted(kept) == sorted([serving, coming])
        # A Job that is done says that its files are there: one whose files go must go with them.
        assert {j["metadata"]["labels"][names.LABEL_ARTIFACT] for j in cluster.jobs()} == {serving, coming}
        cluster.finish_job(job)
        cluster.settle()
        cluster.run_pods(state="crash")
        cluster.settle()
        assert condition(cluster.current(), "RuntimeReady")["reason"] == "RolledBack"


def test_a_model_from_a_mirror_stays_there() -> None:
    answers: dict[str, Any] = {
        "hf://acme/smol": HubError("HubUnavailable", "503", True),
        "modelscope://acme/smol": dataclasses.replace(HUB, revision="b" * 40),
    }
    cluster = Cluster(answers=answers)
    cluster.model(model={"uri": "hf://acme/smol", "mirrors": ["modelscope://acme/smol"]})
    cluster.serve()
    before = cluster.current()["status"]
    answers["hf://acme/smol"] = HUB
    cluster.settle()
    assert cluster.current()["status"] == before
    assert len(cluster.jobs()) == 1


def test_the_deadline_moves_without_new_pods() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    template = cluster.deployment()["spec"]["template"]  # type: ignore[index]
    cluster.edit(rollout={"progressDeadline": 3600})
    cluster.settle()
    assert cluster.deployment()["spec"]["progressDeadlineSeconds"] == 3600  # type: ignore[index]
    assert cluster.deployment()["spec"]["template"] == template  # type: ignore[index]
    probe = template["spec"]["containers"][0]["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] > 3600


def test_pods_that_fetch_have_time_for_it() -> None:
    cluster = Cluster()
    cluster.model(storage={"ephemeral": {}}, rollout={"progressDeadline": 600})
    cluster.settle()
    assert cluster.deployment()["spec"]["progressDeadlineSeconds"] == 600 + 55  # type: ignore[index]


def test_a_token_is_for_the_secret_and_the_hub_that_the_spec_names() -> None:
    denied = HubError("Forbidden", "gated", False)
    answers: dict[str, Any] = {"hf://acme/smol": denied, "modelscope://acme/smol": denied}
    cluster = Cluster(answers=answers)
    cluster.model(model={"uri": "hf://acme/smol", "tokenSecretRef": {"name": "hub", "key": "hf"}})
    cluster.world.tokens[("default", "smol")] = Token("hub", "hf", "secret")
    assert not cluster.reconcile().token_needed
    assert cluster.desk.asked[-1][3] == "secret"
    cluster.edit(model={"uri": "hf://acme/smol", "tokenSecretRef": {"name": "other", "key": "hf"}})
    assert cluster.reconcile().token_needed, "another Secret is read at once"
    cluster.world.tokens[("default", "smol")] = Token("other", "hf", problem="Secret 'other' does not exist")
    cluster.settle()
    assert condition(cluster.current(), "WeightsReady")["message"].startswith(
        "gated; Secret 'other' does not exist"
    )
    cluster.world.tokens[("default", "smol")] = Token("other", "hf", "secret")
    cluster.desk.asked.clear()
    cluster.edit(model={"uri": "modelscope://acme/smol"})
    cluster.settle()
    assert {question[3] for question in cluster.desk.asked} == {""}, "the token was for another hub"


def test_a_claim_of_another_kind_is_said_to_be_impossible() -> None:
    cluster = Cluster()
    cluster.add(CLASSES, {"metadata": {"name": "fast"}})
    cluster.model(storage={"persistentVolumeClaim": {"storageClassName": "standard"}})
    cluster.serve()
    revision = cluster.current()["status"]["revision"]
    for other in ({"storageClassName": "fast"}, {"accessModes": ["ReadWriteMany"]}):
        cluster.edit(storage={"persistentVolumeClaim": other})
        cluster.settle()
        assert condition(cluster.current(), "WeightsReady")["reason"] == "ClaimImmutable"
        assert condition(cluster.current(), "Ready")["status"] == "True", "what serves goes on serving"
    cluster.edit(storage={})
    cluster.settle()
    assert cluster.current()["status"]["revision"] == revision
    assert cluster.current()["status"]["phase"] == "Ready"


def test_what_is_not_in_the_pods_makes_no_new_ones() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    template = cluster.deployment()["spec"]["template"]  # type: ignore[index]
    cluster.world.tokens[("default", "smol")] = Token("hub", "token", "secret")
    cluster.edit(
        model={"uri": "hf://acme/smol", "tokenSecretRef": {"name": "hub"}},
        storage={"persistentVolumeClaim": {}},
        resources={"device": "cpu", "memoryPerDevice": "80Gi"},
    )
    cluster.serve()
    assert cluster.deployment()["spec"]["template"] == template  # type: ignore[index]
    assert len(list(cluster.world.caches[REVISIONS])) == 1


def test_a_download_without_a_pod_says_where_to_look() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.settle()
    assert condition(cluster.current(), "WeightsReady")["reason"] == "Downloading"
    cluster.wait(40)
    cluster.settle()
    found = condition(cluster.current(), "WeightsReady")
    assert found["reason"] == "PodCreationFailed"
    assert "kubectl describe job" in found["message"]
    cluster.puller_pod(cluster.world.caches[JOBS].labelled("default", "smol")[0], {"running": {}})
    cluster.settle()
    assert condition(cluster.current(), "WeightsReady")["reason"] == "Downloading"


def test_a_variable_that_is_given_again_replaces_ours() -> None:
    cluster = Cluster()
    given = [{"name": "HOME", "value": "/home"}, {"name": "A", "value": "1"}, {"name": "A", "value": "2"}]
    cluster.model(template={"env": given})
    cluster.serve()
    env = cluster.deployment()["spec"]["template"]["spec"]["containers"][0]["env"]  # type: ignore[index]
    found = [item["name"] for item in env]
    assert len(found) == len(set(found))
    assert {item["name"]: item.get("value") for item in env}.items() >= {"HOME": "/home", "A": "2"}.items()


@pytest.mark.parametrize(("before", "after", "asked"), [(["a"], ["a", "b"], ("a",)), (["a"], ["b"], ("a",))])
def test_while_names_change_pods_are_asked_for_those_they_have(
    before: list[str], after: list[str], asked: tuple[str, ...]
) -> None:
    cluster = Cluster()
    cluster.model(servedNames=before)
    cluster.serve()
    cluster.edit(servedNames=after)
    assert cluster.reconcile().probe_names == asked
    cluster.run_pods(state="starting")
    assert cluster.reconcile().probe_names == asked
    cluster.run_pods()
    assert cluster.reconcile().probe_names == tuple(sorted(after))
