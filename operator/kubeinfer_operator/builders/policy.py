"""What guards the runtime pods: ServiceAccount, NetworkPolicy, PodDisruptionBudget."""

from __future__ import annotations

from typing import Any

from kubeinfer_operator import names
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.builders.weights import storage_kind


def _metadata(name: str, model: str, namespace: str, owner: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": namespace,
        "labels": names.labels(model, names.COMPONENT_RUNTIME),
        "ownerReferences": [owner],
    }


def service_account(model: str, namespace: str, owner: dict[str, Any]) -> dict[str, Any]:
    """An account without rights and without a token."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _metadata(names.service_account_name(model), model, namespace, owner),
        "automountServiceAccountToken": False,
    }


def network_policy(
    model: str, namespace: str, spec: InferenceModelSpec, owner: dict[str, Any]
) -> dict[str, Any]:
    """In: the API's port, from inside the cluster. Out: names only, where the pod fetches nothing itself."""
    policy: dict[str, Any] = {
        "podSelector": {"matchLabels": names.selector(model)},
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [{"namespaceSelector": {}}], "ports": [{"port": names.RUNTIME_PORT, "protocol": "TCP"}]}
        ],
    }
    fetches = storage_kind(spec) in ("hostPath", "ephemeral") or bool(getattr(spec.engine, "tokenizer", None))
    if not fetches:
        policy["policyTypes"].append("Egress")
        policy["egress"] = [{"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(model, model, namespace, owner),
        "spec": policy,
    }


def disruption_budget(model: str, namespace: str, owner: dict[str, Any]) -> dict[str, Any]:
    """At most one pod at a time leaves for a node's maintenance; it drains as any leaving pod does."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(model, model, namespace, owner),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": names.selector(model)}},
    }
