"""What the chart renders: snapshots of whole installations, and the rules that every one of them must keep."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from .conftest import CHART, ROOT, Render

SNAPSHOTS = pathlib.Path(__file__).parent / "snapshots"

EVERYTHING: dict[str, Any] = {
    "gateway": {
        "auth": {"enabled": True, "secrets": ["team-a", "team-b"]},
        "service": {"type": "NodePort", "nodePort": 30080},
    },
    "networkPolicy": {"metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]},
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "podMonitor": {"enabled": True},
        "grafanaDashboard": {"enabled": True},
    },
    "operator": {
        "hubs": {"huggingFace": "https://hub.example"},
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://p:1"}],
    },
    "imagePullSecrets": [{"name": "registry"}],
}
INSTALLATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({}, "1.31.0"),
    "namespaced": ({"watchNamespaces": ["team-a", "team-b"]}, "1.31.0"),
    "everything": (EVERYTHING, "1.31.0"),
    "old-server": ({}, "1.20.2"),
    "without-gateway": (
        {"gateway": {"enabled": False}, "networkPolicy": {"enabled": False}, "crds": {"install": False}},
        "1.31.0",
    ),
}


@pytest.fixture(scope="module", params=INSTALLATIONS)
def installation(request: pytest.FixtureRequest, render: Render) -> tuple[str, list[dict[str, Any]]]:
    values, kube = INSTALLATIONS[request.param]
    return request.param, render(values=values, kube=kube)


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for document in documents:
        if document["kind"] in ("Deployment", "Job", "DaemonSet", "StatefulSet"):
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def rules(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for document in documents:
        if document["kind"] in ("Role", "ClusterRole"):
            yield from document["rules"]


def test_lint(helm: str) -> None:
    done = subprocess.run([helm, "lint", "--strict", CHART], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_generated_files_are_fresh() -> None:
    command = [sys.executable, ROOT / "charts" / "generate_schema.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_snapshot(installation: tuple[str, list[dict[str, Any]]]) -> None:
    """The rendered manifests are those reviewed. UPDATE_SNAPSHOTS=1 writes them anew."""
    name, documents = installation
    # The definition is checked field by field below; the dashboard's text is not a manifest
    kept = [document for document in documents if document["kind"] != "CustomResourceDefinition"]
    kept = [{**d, "data": sorted(d["data"])} if d["kind"] == "ConfigMap" else d for d in kept]
    kept.sort(key=lambda d: (d["kind"], d["metadata"].get("namespace", ""), d["metadata"]["name"]))
    text = yaml.safe_dump_all(kept, sort_keys=True, width=120)
    file = SNAPSHOTS / f"{name}.yaml"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        file.write_text(text)
    assert file.exists(), f"{file} is missing: run with UPDATE_SNAPSHOTS=1 and review it"
    assert text == file.read_text(), (
        f"differs from {file.name}: run with UPDATE_SNAPSHOTS=1 and review the change"
    )


def test_pods_are_hardened(installation: tuple[str, list[dict[str, Any]]]) -> None:
    for name, pod in pods(installation[1]):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert "memory" in container["resources"]["limits"], name
            assert container["livenessProbe"], name
            assert container["readinessProbe"], name


def test_roles_are_narrow(installation: tuple[str, list[dict[str, Any]]]) -> None:
    for rule in rules(installation[1]):
        for field in ("verbs", "resources", "apiGroups"):
            assert not any("*" in item for item in rule[field]), rule
        if "secrets" in rule["resources"]:
            assert rule["verbs"] == ["get"], rule
            assert rule["resources"] == ["secrets"], rule
            assert rule["resourceNames"], rule


def test_namespaced_mode_has_no_cluster_roles(render: Render) -> None:
    documents = render(values={"watchNamespaces": ["team-a"]})
    assert not [d for d in documents if d["kind"].startswith("ClusterRole")]
    found = {
        (d["kind"], d["metadata"]["namespace"]) for d in documents if d["kind"] in ("Role", "RoleBinding")
    }
    assert ("Role", "team-a") in found
    assert ("RoleBinding", "team-a") in found


def test_every_binding_names_a_role_and_an_account(installation: tuple[str, list[dict[str, Any]]]) -> None:
    documents = installation[1]
    known = {(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents}
    for document in documents:
        if document["kind"].endswith("RoleBinding") or document["kind"] == "RoleBinding":
            role = document["roleRef"]
            assert (role["kind"], document["metadata"].get("namespace"), role["name"]) in known
            for subject in document["subjects"]:
                assert (subject["kind"], subject["namespace"], subject["name"]) in known


def test_services_and_policies_select_the_pods(installation: tuple[str, list[dict[str, Any]]]) -> None:
    documents = installation[1]
    labels = [d["spec"]["template"]["metadata"]["labels"] for d in documents if d["kind"] == "Deployment"]
    for document in documents:
        if document["kind"] in ("Service", "NetworkPolicy", "PodDisruptionBudget"):
            selector = document["spec"].get("selector") or document["spec"]["podSelector"]
            selector = selector.get("matchLabels", selector)
            assert sum(selector.items() <= found.items() for found in labels) == 1, document["metadata"][
                "name"
            ]


def test_secrets_may_be_opened_only_by_saying_so(render: Render) -> None:
    open_rules = [r for r in rules(render(values={"tokenSecrets": ["*"]})) if "secrets" in r["resources"]]
    assert [r.get("resourceNames") for r in open_rules] == [None]
    assert not [r for r in rules(render(values={"tokenSecrets": []})) if "secrets" in r["resources"]]


def definition(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [d for d in documents if d["kind"] == "CustomResourceDefinition"]
    return found


def without_rules(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: without_rules(value) for key, value in node.items() if key != "x-kubernetes-validations"}
    return [without_rules(item) for item in node] if isinstance(node, list) else node


def test_definition_is_the_generated_one(render: Render) -> None:
    """With CEL rules for servers that know them, the same without for those that refuse the field."""
    (path,) = (ROOT / "crds").glob("*.yaml")
    wanted = yaml.safe_load(path.read_text())["spec"]
    assert definition(render())["spec"] == wanted
    assert "x-kubernetes-validations" in json.dumps(wanted)
    assert definition(render(kube="1.20.2"))["spec"] == without_rules(wanted)


def test_definition_stays_on_uninstall_unless_told(render: Render) -> None:
    assert definition(render())["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "annotations" not in definition(render("crds.keep=false"))["metadata"]


def test_policy_version_follows_the_server(render: Render) -> None:
    def version(kube: str) -> list[str]:
        return [d["apiVersion"] for d in render(kube=kube) if d["kind"] == "PodDisruptionBudget"]

    assert version("1.31.0") == ["policy/v1"]
    assert version("1.20.2") == ["policy/v1beta1"]


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("gateway.replicas=0", "replicas"),
        ("gateway.replica=3", "replica"),
        ("images.pullPolicy=Sometimes", "pullPolicy"),
        ("gateway.service.port=70000", "port"),
        ("operator.logFormat=xml", "logFormat"),
    ],
)
def test_schema_refuses(render: Render, setting: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        render(setting)


def test_dashboard_is_valid_json() -> None:
    dashboard = json.loads((CHART / "files" / "dashboard.json").read_text())
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(identifiers) == len(set(identifiers))
    assert all(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
