"""The Job that fetches one revision of a model into a claim, and the claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kubeinfer_operator import names
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.builders.weights import (
    Artifact,
    claim_of,
    placement,
    pod_security,
    pull_container,
    volume,
)
from kubeinfer_operator.config import Settings

GIB = 1 << 30
ATTEMPTS = 3
# A mesh's proxy that is injected as an ordinary container never ends, and so the Job would not.
_NO_PROXY_LABELS = {"sidecar.istio.io/inject": "false", "kuma.io/sidecar-injection": "disabled"}
_NO_PROXY_ANNOTATIONS = {"sidecar.istio.io/inject": "false", "linkerd.io/inject": "disabled"}


def job_name(claim: str, claim_uid: str, artifact: Artifact) -> str:
    """One name for one artifact in one claim: models that share both share the Job. A claim made anew has a new one."""
    return f"kubeinfer-pull-{names.digest([claim, claim_uid, artifact.folder], 12)}"


_PRUNE = """
import os, re, shutil, sys
root, keep = sys.argv[1], set(sys.argv[2:])
for entry in os.scandir(root):
    # A folder of ours, or what an unfinished download left beside it
    ours = re.fullmatch("[.]?([0-9a-f]{16})([.]incomplete)?", entry.name)
    if ours and ours[1] not in keep and entry.is_dir(follow_symlinks=False):
        print("removing", entry.name, flush=True)
        shutil.rmtree(entry.path, ignore_errors=True)
"""


def prune_container(pull: dict[str, Any], keep: Sequence[str]) -> dict[str, Any]:
    """An init container that takes revisions that nothing can go back to off the claim. ``keep``: folders that stay."""
    return {
        **{
            key: pull[key]
            for key in ("image", "imagePullPolicy", "securityContext", "volumeMounts", "resources")
        },
        "name": "prune",
        "command": ["python", "-c", _PRUNE, names.MODELS_DIR, *keep],
    }


def pull_job(
    name: str,
    model: str,
    namespace: str,
    spec: InferenceModelSpec,
    artifact: Artifact,
    owners: Sequence[dict[str, Any]],
    settings: Settings,
    *,
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """The Job ``name``. Its pods stay after a failure, so that their termination message can be read.

    ``keep``: folders of the revision that comes, and of earlier ones that pods read or may go back to. If given, all others are removed
    first: a claim of the model's own holds what serves and what comes, however often the model changes.
    """
    labels = {**names.labels(model, names.COMPONENT_PULLER), names.LABEL_ARTIFACT: artifact.folder}
    vol = volume(model, spec, read_only=False)
    assert vol is not None, claim_of(model, spec)
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(spec, settings),
        "containers": [pull_container("pull", spec, artifact, settings)],
        "volumes": [vol, {"name": "tmp", "emptyDir": {}}],
        **placement(spec),
    }
    if keep:
        pod["initContainers"] = [prune_container(pod["containers"][0], sorted(set(keep)))]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": labels,
            "ownerReferences": list(owners),
        },
        "spec": {
            "backoffLimit": ATTEMPTS - 1,
            "template": {
                "metadata": {"labels": labels | _NO_PROXY_LABELS, "annotations": dict(_NO_PROXY_ANNOTATIONS)},
                "spec": pod,
            },
        },
    }


def claim_bytes(total: int) -> int:
    """Size of a claim for ``total`` bytes of weights: what the file system takes and a little more, in whole GiB."""
    return max(1, math.ceil((total * 1.05 + (256 << 20)) / GIB)) * GIB


def claim(
    model: str, namespace: str, spec: InferenceModelSpec, size: str, owner: dict[str, Any]
) -> dict[str, Any]:
    """The claim of the model's own."""
    wanted = spec.storage.persistent_volume_claim
    out: dict[str, Any] = {
        "accessModes": list(wanted.access_modes) if wanted else ["ReadWriteOnce"],
        "resources": {"requests": {"storage": size}},
    }
    if wanted and wanted.storage_class_name is not None:
        out["storageClassName"] = wanted.storage_class_name
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": names.claim_name(model),
            "namespace": namespace,
            "labels": names.labels(model, "weights"),
            "ownerReferences": [owner],
        },
        "spec": out,
    }
