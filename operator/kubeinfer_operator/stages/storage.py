"""The claim that holds the weights: made, sized, or found missing, with a reason that says what to do."""

from __future__ import annotations

from datetime import datetime

from kubeinfer_operator import names
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.builders import job as build
from kubeinfer_operator.builders.weights import claim_of, owns_claim
from kubeinfer_operator.conditions import WEIGHTS_READY, no, read_stamp
from kubeinfer_operator.kube import CLAIMS, CLASSES, Manifest
from kubeinfer_operator.outcome import Apply, Outcome
from kubeinfer_operator.stages.accept import owned_by
from kubeinfer_operator.store import key_of, quantity
from kubeinfer_operator.world import World

DEFAULT_CLASS = (
    "storageclass.kubernetes.io/is-default-class",
    "storageclass.beta.kubernetes.io/is-default-class",
)
UNBOUND_SECONDS = 20.0
_FIELD = "spec.storage.persistentVolumeClaim.storageClassName"


def ensure_claim(
    model: Manifest,
    spec: InferenceModelSpec,
    world: World,
    now: datetime,
    out: Outcome,
    total: int | None,
    copies: int = 1,
) -> Manifest | None:
    """The claim, once it is there and can be used; else None, with the finding that says why not.

    ``total`` bytes come; during a change of revision there are ``copies`` of about that, and a claim that can grow does.
    """
    namespace, name = key_of(model)
    claim = claim_of(name, spec)
    assert claim is not None
    found = world.get(CLAIMS, namespace, claim)
    if not owns_claim(spec):
        if found is None:
            text = f"PersistentVolumeClaim {claim!r} is not in namespace {namespace}: create it, or name another one"
            out.findings.append(no(WEIGHTS_READY, "ClaimMissing", text))
            out.look_again(10.0)
        return found
    wanted = spec.storage.persistent_volume_claim
    if found is None:
        trouble = _class_trouble(spec, world)
        if trouble is not None:
            out.findings.append(no(WEIGHTS_READY, *trouble))
            return None
    elif not owned_by(found, model):
        text = f"PersistentVolumeClaim {claim!r} belongs to something else: delete it, or set spec.storage.existingClaim"
        out.findings.append(no(WEIGHTS_READY, "NameTaken", text))
        return None
    if found is not None and (fixed := _immutable(spec, found)):
        text = (
            f"PersistentVolumeClaim {claim!r} has {fixed}, which cannot be changed: take that back in "
            "spec.storage.persistentVolumeClaim, delete the model and create it again, or use spec.storage.existingClaim"
        )
        out.findings.append(no(WEIGHTS_READY, "ClaimImmutable", text))
        return None
    if wanted and wanted.size:
        need = str(wanted.size)
    elif total:
        need = f"{build.claim_bytes(total) // build.GIB}Gi"
    else:
        need = "1Gi" if found is None else str(found["spec"]["resources"]["requests"]["storage"])
    if found is not None:
        have = str(found["spec"]["resources"]["requests"]["storage"])
        if quantity(have) >= quantity(need):
            roomy = (
                f"{copies * build.claim_bytes(total) // build.GIB}Gi"
                if total and not (wanted and wanted.size)
                else have
            )
            need = roomy if quantity(roomy) > quantity(have) and _expandable(found, world) else have
        elif not _expandable(found, world):
            text = (
                f"PersistentVolumeClaim {claim!r} has {have} and {need} are needed, and its StorageClass does not allow "
                "expansion: delete the model and create it again, or use spec.storage.existingClaim"
            )
            out.findings.append(no(WEIGHTS_READY, "ClaimTooSmall", text))
            return None
    owner = names.owner_reference(model)
    if found is None:
        out.actions.append(Apply(build.claim(name, namespace, spec, need, owner)))
        out.findings.append(
            no(WEIGHTS_READY, "ClaimPending", f"PersistentVolumeClaim {claim!r} of {need} is being made")
        )
        return None
    if quantity(need) > quantity(str(found["spec"]["resources"]["requests"]["storage"])):
        out.actions.append(Apply(build.claim(name, namespace, spec, need, owner)))
    if _stuck(found, world, now):
        text = (
            f"PersistentVolumeClaim {claim!r} is not bound to a volume yet: `kubectl describe pvc -n {namespace} {claim}` "
            f"says why; a StorageClass that provisions is chosen in {_FIELD}"
        )
        out.findings.append(no(WEIGHTS_READY, "ClaimPending", text))
        out.look_again(60.0)
    elif found.get("status", {}).get("phase") == "Pending":
        out.look_again(UNBOUND_SECONDS)
    return found


def _immutable(spec: InferenceModelSpec, claim: Manifest) -> str:
    """What the claim has that the spec wants otherwise."""
    wanted = spec.storage.persistent_volume_claim
    if wanted is None:
        return ""
    name, modes = claim["spec"].get("storageClassName"), claim["spec"].get("accessModes") or []
    if wanted.storage_class_name is not None and name is not None and wanted.storage_class_name != name:
        return f"StorageClass {name!r}"
    return f"accessModes {modes}" if modes and set(wanted.access_modes) != set(modes) else ""


def _class_trouble(spec: InferenceModelSpec, world: World) -> tuple[str, str] | None:
    if not world.capabilities.storage_classes:
        return None
    wanted = spec.storage.persistent_volume_claim
    name = wanted.storage_class_name if wanted else None
    classes = list(world.caches[CLASSES])
    known = ", ".join(sorted(c["metadata"]["name"] for c in classes)) or "none"
    if name == "":
        return None
    if name is not None:
        if any(c["metadata"]["name"] == name for c in classes):
            return None
        return (
            "StorageClassMissing",
            f"StorageClass {name!r} does not exist (there are: {known}): change {_FIELD}",
        )
    if any(
        (c["metadata"].get("annotations") or {}).get(mark) == "true"
        for c in classes
        for mark in DEFAULT_CLASS
    ):
        return None
    return (
        "NoDefaultStorageClass",
        f"no StorageClass is the cluster's default (there are: {known}): set {_FIELD}, or use spec.storage.hostPath, "
        "ephemeral or existingClaim",
    )


def _class_of(claim: Manifest, world: World) -> Manifest | None:
    return world.get(CLASSES, "", str(claim["spec"].get("storageClassName") or ""))


def _expandable(claim: Manifest, world: World) -> bool:
    if claim.get("status", {}).get("phase") != "Bound":
        return False  # the API server lets only a bound claim grow
    if not world.capabilities.storage_classes:
        return True
    found = _class_of(claim, world)
    return bool(found and found.get("allowVolumeExpansion"))


def _stuck(claim: Manifest, world: World, now: datetime) -> bool:
    if claim.get("status", {}).get("phase") != "Pending":
        return False
    found = _class_of(claim, world)
    if found is not None and found.get("volumeBindingMode") == "WaitForFirstConsumer":
        return False
    created = claim["metadata"].get("creationTimestamp")
    return created is not None and (now - read_stamp(created)).total_seconds() > UNBOUND_SECONDS
