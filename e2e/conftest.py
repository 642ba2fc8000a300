"""One cluster, one release, one hub and one model for the whole session, in the order of the files below."""

from __future__ import annotations

import os
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from harness.client import Client
from harness.hub import Hub
from harness.kube import Kube, KubeError, Object, poll
from harness.models import Models
from harness.release import Release

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "smollm2.yaml"
SYSTEM, WORK = "kubeinfer-system", "kubeinfer-e2e"
TAG = os.environ.get("TAG", "e2e")
OPERATOR_IMAGE = f"localhost/kubeinfer-operator:{TAG}"
KEEP = bool(os.environ.get("KEEP"))

# The later files need what the earlier ones brought up, and the last one takes it away
ORDER = [
    "test_install",
    "test_first_model",
    "test_traffic",
    "test_zero",
    "test_faults",
    "test_weights",
    "test_operator",
    "test_removal",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A failed test says what the cluster looked like."""
    report = yield
    if report.failed:
        for namespace in (WORK, SYSTEM):
            kube = Kube(namespace)
            for command in (
                ("get", "inferencemodels,pods,jobs,deployments,pvc", "-o", "wide"),
                (
                    "get",
                    "inferencemodels",
                    "-o",
                    'jsonpath={range .items[*]}{.metadata.name}{"\\n"}{.status}{"\\n"}{end}',
                ),
                ("get", "events", "--sort-by=.lastTimestamp"),
                ("logs", "-l", "app.kubernetes.io/name=kubeinfer-operator", "--tail=60"),
                ("logs", "-l", "app.kubernetes.io/component=runtime", "--tail=25"),
            ):
                try:
                    text = kube.run(*command, check=False)[-6000:]
                except (KubeError, subprocess.TimeoutExpired) as error:
                    text = str(error)
                if text.strip():
                    report.sections.append((f"{namespace}: kubectl {' '.join(command[:2])}", text))
    return report


@pytest.fixture(scope="session")
def own_cluster() -> bool:
    """Whether the cluster is the one of e2e/cluster, whose parts a test may break."""
    return bool(os.environ.get("KUBEINFER_E2E_OWN_CLUSTER"))


def wait_for_the_run_before(kube: Kube) -> None:
    """A run deletes its namespaces and does not wait for it; in one that is leaving nothing can be made."""

    def leaving() -> bool:
        namespace = kube.get("namespace", kube.namespace)
        return namespace is not None and "deletionTimestamp" in namespace["metadata"]

    poll(f"the namespace {kube.namespace} of the run before is gone", lambda: not leaving(), 180, every=1)


@pytest.fixture(scope="session")
def system() -> Iterator[Kube]:
    kube = Kube(SYSTEM)
    poll(
        "the API server answers (is KUBECONFIG set?)", lambda: kube.run("get", "--raw", "/readyz") or None, 20
    )
    wait_for_the_run_before(kube)
    yield kube
    if not KEEP:
        kube.run("delete", "namespace", SYSTEM, "--ignore-not-found", "--wait=false", check=False)


@pytest.fixture(scope="session")
def work(system: Kube) -> Iterator[Kube]:
    """The namespace of the models, the hub and the client."""
    kube = Kube(WORK)
    wait_for_the_run_before(kube)
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": WORK}})
    yield kube
    if not KEEP:
        kube.run("delete", "namespace", WORK, "--ignore-not-found", "--wait=false", check=False)


@pytest.fixture(scope="session")
def hub(work: Kube) -> Hub:
    hub = Hub(work, OPERATOR_IMAGE)
    hub.start()
    hub.faults()
    return hub


@pytest.fixture(scope="session")
def release(system: Kube, hub: Hub) -> Release:
    """The chart, installed with two gateways; both hubs' addresses are the one in the cluster."""
    values = {
        "images": {
            "operator": {"repository": "localhost/kubeinfer-operator", "tag": TAG},
            "runtimeCpu": {"repository": "localhost/kubeinfer-runtime-cpu", "tag": TAG},
        },
        "operator": {"hubs": {"huggingFace": hub.url, "modelScope": hub.url}},
        "gateway": {"replicas": 2, "shutdownTimeout": 60},
    }
    release = Release(system, values)
    release.install()
    return release


@pytest.fixture(scope="session")
def client(work: Kube, release: Release) -> Client:
    client = Client(work, OPERATOR_IMAGE, release.gateway_url)
    client.start()
    return client


@pytest.fixture(scope="session")
def models(work: Kube, release: Release) -> Models:
    return Models(work)


@pytest.fixture(scope="session")
def shared_weights(models: Models) -> str:
    """A claim for models whose weights need not be fetched for each of them."""
    name = "shared-weights"
    models.kube.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
        }
    )
    return name


@pytest.fixture(scope="session")
def example() -> Object:
    """examples/smollm2.yaml as it is."""
    found: Object = yaml.safe_load(EXAMPLE.read_text())
    return found


@pytest.fixture(scope="session")
def model(models: Models, example: Object) -> Object:
    """The example's model, ready; shared by the tests that need one that serves."""
    models.kube.apply(example)
    return models.wait_ready(example["metadata"]["name"], 180)
