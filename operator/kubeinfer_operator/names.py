"""Names, labels and hashes of everything the operator makes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

GROUP = "kubeinfer.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InferenceModel"
PLURAL = "inferencemodels"

LABEL_MODEL = f"{GROUP}/model"
LABEL_REVISION = f"{GROUP}/revision"
LABEL_ARTIFACT = f"{GROUP}/artifact"
LABEL_OUTCOME = f"{GROUP}/outcome"
LABEL_COMPONENT = "app.kubernetes.io/component"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_NAME = "app.kubernetes.io/name"
MANAGED_BY = "kubeinfer-operator"
ANNOTATION_APPLIED = f"{GROUP}/applied"
ANNOTATION_MESSAGE = f"{GROUP}/message"

COMPONENT_RUNTIME = "runtime"
COMPONENT_PULLER = "puller"

RUNTIME_PORT = 8000
MODELS_DIR = "/models"


def digest(value: Any, length: int = 10) -> str:
    """A short hash of any JSON value, the same for equal values whatever the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def labels(model: str, component: str) -> dict[str, str]:
    """Labels of an object made for ``model``."""
    return {
        LABEL_NAME: "kubeinfer",
        LABEL_COMPONENT: component,
        LABEL_MANAGED_BY: MANAGED_BY,
        LABEL_MODEL: model,
    }


def selector(model: str) -> dict[str, str]:
    """The labels that pick the runtime pods of ``model``, and nothing else. Never to change: selectors are immutable."""
    return {LABEL_MODEL: model, LABEL_COMPONENT: COMPONENT_RUNTIME}


def selector_text(model: str) -> str:
    """:func:`selector` as text, for ``status.selector``."""
    return ",".join(f"{key}={value}" for key, value in sorted(selector(model).items()))


def claim_name(model: str) -> str:
    return f"{model}-weights"


def service_account_name(model: str) -> str:
    return f"{model}-runtime"


def revision_name(model: str, revision: str) -> str:
    return f"{model}-{revision}"


def owner_reference(model: dict[str, Any], *, controller: bool = True) -> dict[str, Any]:
    """The owner reference that makes ``model`` the owner of an object."""
    meta = model["metadata"]
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": meta["name"],
        "uid": meta["uid"],
        "controller": controller,
        # An owner must not wait for its children: `kubectl delete` ends at once and leaves the rest to the collector.
        "blockOwnerDeletion": False,
    }
