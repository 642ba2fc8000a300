"""`helm install` and what it leaves in the cluster."""

from __future__ import annotations

import pytest

from conftest import SYSTEM, WORK
from harness.kube import Kube
from harness.release import NAME, Release


def test_everything_is_ready_and_nothing_restarted(release: Release) -> None:
    release.wait_ready("operator", 1)
    release.wait_ready("gateway", 2)
    for component in ("operator", "gateway"):
        for pod in release.pods(component):
            (container,) = pod["status"]["containerStatuses"]
            assert container["restartCount"] == 0, container["lastState"]


def test_definition_is_established(system: Kube, release: Release) -> None:
    definition = system.get("crd", "inferencemodels.kubeinfer.io")
    assert definition is not None
    assert {c["type"]: c["status"] for c in definition["status"]["conditions"]}["Established"] == "True"
    assert definition["spec"]["names"]["shortNames"] == ["im"]


@pytest.mark.parametrize("component", ["operator", "gateway"])
@pytest.mark.parametrize(
    ("verb", "what"),
    [
        ("list", "secrets"),
        ("watch", "secrets"),
        ("create", "secrets"),
        ("create", "pods/exec"),
        ("create", "pods"),
        ("create", "clusterrolebindings"),
        ("delete", "nodes"),
        ("delete", "namespaces"),
    ],
)
def test_rights_end_where_they_should(release: Release, component: str, verb: str, what: str) -> None:
    account = f"system:serviceaccount:{SYSTEM}:{NAME}-{component}"
    answer = release.kube.run("auth", "can-i", verb, what, "-n", WORK, f"--as={account}", check=False)
    assert answer.strip() == "no"


def test_gateway_may_only_look(release: Release) -> None:
    account = f"system:serviceaccount:{SYSTEM}:{NAME}-gateway"
    for verb in ("patch", "delete", "update"):
        answer = release.kube.run(
            "auth", "can-i", verb, "inferencemodels", "-n", WORK, f"--as={account}", check=False
        )
        assert answer.strip() == "no", verb
