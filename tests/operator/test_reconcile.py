"""The life of a model, told by the pure reconcile over a cluster that is only objects."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_world import COMMIT, CONFIG, Cluster, claim, condition

from kubeinfer_operator.builders import runtime as build
from kubeinfer_operator.config import Settings
from kubeinfer_operator.hub import HubError
from kubeinfer_operator.kube import (
    BUDGETS,
    CLAIMS,
    CLASSES,
    DEPLOYMENTS,
    JOBS,
    MODELS,
    PODS,
    POLICIES,
    REVISIONS,
    SERVICES,
)
from kubeinfer_operator.plan import Hub


def test_a_model_comes_to_life() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.settle()
    model = cluster.current()
    assert model["status"]["phase"] == "Downloading"
    assert model["status"]["weights"] | {"request": "", "planned": ""} == {
        "source": "hf://acme/smol", "revision": COMMIT, "total": 270_000_700, "progress": "0%", "request": "", "planned": "",
    }  # fmt: skip
    assert (
        cluster.world.get(CLAIMS, "default", "smol-weights")["spec"]["resources"]["requests"]["storage"]
        == "1Gi"
    )
    assert cluster.deployment() is None
    (job,) = cluster.jobs()
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[0] == f"hf://acme/smol@{COMMIT}"

    cluster.finish_job()
    cluster.settle()
    assert condition(cluster.current(), "WeightsReady")["status"] == "True"
    deployment = cluster.deployment()
    assert deployment["spec"]["replicas"] == 1
    path = arguments[arguments.index("--local-dir") + 1]
    assert deployment["spec"]["template"]["spec"]["containers"][0]["args"][0] == path
    assert cluster.current()["status"]["phase"] == "Starting"

    cluster.run_pods()
    out = cluster.settle()
    assert condition(cluster.current(), "RuntimeReady")["status"] == "True"
    assert condition(cluster.current(), "Ready")["reason"] == "Probing", (
        "pods that are ready have answered nobody yet"
    )
    assert out.probe == "http://10.0.0.7:8000/v1/models"

    cluster.answers()
    cluster.settle()
    model = cluster.current()
    assert {c["status"] for c in model["status"]["conditions"]} == {"True"}
    assert model["status"]["phase"] == "Ready"
    assert "message" not in model["status"]
    for kind in (SERVICES, POLICIES, BUDGETS):
        assert cluster.world.get(kind, "default", "smol") is not None


def test_settled_means_no_writes() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    before = list(cluster.writes)
    for _ in range(3):
        cluster.wait(60)
        cluster.reconcile()
    assert cluster.writes == before


def test_everything_is_owned_by_the_model() -> None:
    cluster = Cluster()
    model = cluster.model()
    cluster.serve()
    for kind, cache in cluster.world.caches.items():
        for obj in cache:
            if kind not in (MODELS, PODS, CLASSES):
                assert [ref["uid"] for ref in obj["metadata"]["ownerReferences"]] == [
                    model["metadata"]["uid"]
                ], obj["kind"]
                assert not any(ref["blockOwnerDeletion"] for ref in obj["metadata"]["ownerReferences"])


@given(st.lists(st.integers(0, 6), max_size=25), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_killed_anywhere_it_ends_the_same(stops: list[int], data: st.DataObject) -> None:
    """The operator dies after any number of writes, status or not, and the same state is reached in the end."""
    calm, storm = Cluster(), Cluster()
    calm.model()
    storm.model()
    calm.serve()
    for stop in stops:
        storm.reconcile(stop_after=stop)
        if storm.jobs() and data.draw(st.booleans()) and not storm.jobs()[0].get("status"):
            storm.finish_job()
        if storm.deployment() and data.draw(st.booleans()):
            storm.run_pods()
    storm.serve()
    for kind in (DEPLOYMENTS, REVISIONS, JOBS, SERVICES, CLAIMS):
        assert [o["metadata"]["name"] for o in storm.world.caches[kind]] == [
            o["metadata"]["name"] for o in calm.world.caches[kind]
        ]
    assert storm.deployment()["spec"] == calm.deployment()["spec"]
    assert [c["reason"] for c in storm.current()["status"]["conditions"]] == [
        c["reason"] for c in calm.current()["status"]["conditions"]
    ]


def test_an_upgrade_of_the_operator_leaves_pods_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    before = copy.deepcopy(cluster.deployment()["spec"]["template"])
    cluster.world.settings = dataclasses.replace(
        Settings(),
        runtime_image_cpu="runtime:2",
        puller_image="puller:2",
        image_pull_policy="Always",
        run_as_user=1000,
    )
    monkeypatch.setattr(build, "PRE_STOP_SECONDS", 30)
    cluster.settle()
    assert cluster.deployment()["spec"]["template"] == before
    cluster.edit(rollout={"restartedAt": "now"})
    cluster.settle()
    assert cluster.deployment()["spec"]["template"]["spec"]["containers"][0]["image"] == "runtime:2"


def test_no_hub_is_needed_after_a_restart() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    cluster.desk.answers["hf://acme/smol"] = HubError("NetworkUnreachable", "no route", False)
    before = list(cluster.writes)
    cluster.settle()
    assert cluster.writes == before
    cluster.edit(replicas=3)
    cluster.settle()
    assert cluster.deployment()["spec"]["replicas"] == 3
    assert condition(cluster.current(), "WeightsReady")["status"] == "True"
    cluster.edit(engine={"maxModelLen": 512})
    cluster.settle()
    assert "512" in cluster.deployment()["spec"]["template"]["spec"]["containers"][0]["args"]


def test_a_branch_that_moves_moves_nothing() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    cluster.desk.answers["hf://acme/smol"] = Hub("f" * 40, {"model.safetensors": 1}, CONFIG)
    before = list(cluster.writes)
    cluster.settle()
    assert cluster.writes == before


def test_what_does_not_fit_gets_no_pod() -> None:
    cluster = Cluster()
    cluster.model(resources={"device": "gpu", "memoryPerDevice": "1Gi"})
    cluster.settle()
    found = condition(cluster.current(), "Planned")
    assert (found["status"], found["reason"]) == ("False", "InsufficientMemory")
    assert "resources" in found["message"]
    assert cluster.current()["status"]["phase"] == "Failed"
    assert cluster.jobs() == []
    assert cluster.deployment() is None


def test_what_no_longer_fits_goes_on_serving() -> None:
    cluster = Cluster()
    cluster.model(resources={"device": "cpu", "limits": {"memory": "4Gi"}})
    cluster.serve()
    template = copy.deepcopy(cluster.deployment()["spec"]["template"])
    cluster.edit(resources={"device": "cpu", "limits": {"memory": "256Mi"}})
    cluster.settle()
    assert condition(cluster.current(), "Planned")["status"] == "False"
    assert cluster.deployment()["spec"]["template"] == template
    assert condition(cluster.current(), "Ready")["status"] == "True"
    assert cluster.current()["status"]["phase"] == "Degraded"
    cluster.edit(resources={"device": "cpu", "limits": {"memory": "4Gi"}})
    cluster.settle()
    assert cluster.current()["status"]["phase"] == "Ready"


@pytest.mark.parametrize("how", ["crash", "deadline"])
def test_a_bad_change_is_taken_back(how: str) -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    good = copy.deepcopy(cluster.deployment()["spec"]["template"])
    cluster.edit(engine={"maxModelLen": 999_999})
    cluster.settle()
    assert cluster.deployment()["spec"]["template"] != good
    cluster.run_pods(state="crash" if how == "crash" else "image")
    if how == "deadline":
        deployment = copy.deepcopy(cluster.deployment())
        deployment["status"] = {
            "observedGeneration": deployment["metadata"].get("generation", 1),
            "conditions": [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}],
        }
        cluster.add(DEPLOYMENTS, deployment)
    cluster.reconcile()
    cluster.run_pods()
    cluster.settle()
    assert cluster.deployment()["spec"]["template"] == good
    found = condition(cluster.current(), "RuntimeReady")
    assert (found["status"], found["reason"]) == ("False", "RolledBack")
    assert ("max_model_len" if how == "crash" else "runtime:1") in found["message"]
    assert condition(cluster.current(), "Ready")["reason"] == "ServingLastGood"
    assert cluster.current()["status"]["phase"] == "Degraded"

    # Scaling is no reason to try the bad template again, and works meanwhile.
    cluster.edit(replicas=2)
    cluster.settle()
    assert cluster.deployment()["spec"]["template"] == good
    assert cluster.deployment()["spec"]["replicas"] == 2
    # A new change is.
    cluster.edit(engine={"maxModelLen": 1024})
    cluster.serve()
    assert cluster.current()["status"]["phase"] == "Ready"
    assert condition(cluster.current(), "RuntimeReady")["reason"] == "Running"


def test_nothing_to_go_back_to_is_told_with_the_engines_last_line() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.settle()
    cluster.finish_job()
    cluster.settle()
    cluster.run_pods(state="crash")
    cluster.settle()
    found = condition(cluster.current(), "RuntimeReady")
    assert found["reason"] == "EngineFailed"
    assert found["message"].startswith("OptionError: max_model_len is too large")
    cluster.run_pods()
    cluster.answers()
    cluster.settle()
    assert condition(cluster.current(), "RuntimeReady")["reason"] == "Running"


@pytest.mark.parametrize(
    ("state", "reason"), [("image", "ImagePullFailed"), ("unschedulable", "InsufficientResources")]
)
def test_pods_that_do_not_start_say_why(state: str, reason: str) -> None:
    cluster = Cluster()
    cluster.model()
    cluster.settle()
    cluster.finish_job()
    cluster.settle()
    cluster.run_pods(state=state)
    cluster.settle()
    assert condition(cluster.current(), "RuntimeReady")["reason"] == reason
    assert condition(cluster.current(), "Ready")["reason"] == reason


def test_never_ready_while_not_answering() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    cluster.answers(False)
    cluster.settle()
    assert condition(cluster.current(), "Ready")["reason"] == "NotAnswering"
    cluster.answers()
    cluster.settle()
    assert condition(cluster.current(), "Ready")["status"] == "True"
    cluster.run_pods(state="starting")
    cluster.settle()
    assert condition(cluster.current(), "Ready")["status"] == "False"


def test_oldest_keeps_a_name() -> None:
    cluster = Cluster()
    cluster.model("old", servedNames=["chat"])
    cluster.wait(10)
    cluster.model("new", servedNames=["chat", "other"])
    cluster.settle("old")
    cluster.settle("new")
    assert condition(cluster.current("old"), "Accepted")["status"] == "True"
    found = condition(cluster.current("new"), "Accepted")
    assert found["reason"] == "NameClash"
    assert "default/old" in found["message"]
    assert cluster.world.drop_model(("default", "old")) == {("default", "new")}
    cluster.settle("new")
    assert condition(cluster.current("new"), "Accepted")["status"] == "True"


def test_a_service_of_somebody_else_is_left_alone() -> None:
    cluster = Cluster()
    cluster.add(SERVICES, {"metadata": {"name": "smol", "namespace": "default"}, "spec": {}})
    cluster.model()
    cluster.settle()
    assert condition(cluster.current(), "Accepted")["reason"] == "NameTaken"
    assert [w for w in cluster.writes if w[0] != "status"] == []


def test_an_edit_that_cannot_be_understood_stops_nothing() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    model = copy.deepcopy(cluster.current())
    model["spec"]["autoscaling"] = {"minReplicas": 3, "maxReplicas": 1}
    model["metadata"]["generation"] += 1
    cluster.add(MODELS, model)
    before = [w for w in cluster.writes if w[0] != "status"]
    cluster.settle()
    assert condition(cluster.current(), "Accepted")["reason"] == "InvalidSpec"
    assert condition(cluster.current(), "Ready")["status"] == "True"
    assert cluster.current()["status"]["phase"] == "Degraded"
    assert [w for w in cluster.writes if w[0] != "status"] == before


def test_suspended() -> None:
    cluster = Cluster()
    cluster.model(suspend=True)
    cluster.settle()
    assert cluster.current()["status"]["phase"] == "Suspended"
    assert cluster.jobs() == []
    assert list(cluster.world.caches[CLAIMS]) == []
    cluster.model("given", model={"uri": "file:///models/x"}, suspend=True)
    cluster.settle("given")
    assert cluster.current("given")["status"]["phase"] == "Suspended"
    assert condition(cluster.current("given"), "Ready")["reason"] == "Suspended"
    assert {kind for kind, _ in cluster.writes} == {"status"}
    cluster.edit(suspend=False)
    cluster.serve()
    assert cluster.current()["status"]["phase"] == "Ready"
    cluster.edit(suspend=True)
    cluster.settle()
    assert cluster.deployment()["spec"]["replicas"] == 0
    assert len(cluster.jobs()) == 1, "the weights stay"


def test_scaled_to_zero_is_idle() -> None:
    cluster = Cluster()
    cluster.model(autoscaling={"minReplicas": 0, "maxReplicas": 2})
    cluster.serve()
    assert cluster.deployment()["spec"]["replicas"] == 1, "it is seen to work before it sleeps"
    cluster.world.decisions[("default", "smol")] = 0
    cluster.settle()
    cluster.run_pods()
    cluster.settle()
    assert cluster.current()["status"]["phase"] == "Idle"
    cluster.world.decisions.clear()
    cluster.settle()
    assert cluster.deployment()["spec"]["replicas"] == 0, "a restart of the operator wakes nobody"


def test_what_an_earlier_spec_needed_is_taken_away() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    old_job = cluster.jobs()[0]["metadata"]["name"]
    cluster.add(CLAIMS, claim("common"))
    cluster.edit(storage={"existingClaim": "common"})
    cluster.settle()
    assert cluster.world.get(CLAIMS, "default", "smol-weights") is not None, "the old pods still read it"
    cluster.serve()
    assert cluster.world.get(CLAIMS, "default", "smol-weights") is None
    assert cluster.world.get(JOBS, "default", old_job) is None
    assert cluster.world.get(CLAIMS, "default", "common") is not None


def test_only_changes_of_the_pods_change_the_template() -> None:
    cluster = Cluster()
    cluster.model()
    cluster.serve()
    revision = cluster.current()["status"]["revision"]
    for edit in (
        {"replicas": 2},
        {"rollout": {"strategy": "inPlace", "progressDeadline": 60}},
        {"autoscaling": {"maxReplicas": 5}},
        {"model": {"uri": "hf://acme/smol", "mirrors": ["modelscope://acme/smol"]}},
    ):
        cluster.edit(**edit)
        cluster.settle()
        assert cluster.current()["status"]["revision"] == revision, edit
    assert cluster.deployment()["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    cluster.edit(rollout={"drainTimeout": 5})
    cluster.settle()
    assert cluster.current()["status"]["revision"] != revision
