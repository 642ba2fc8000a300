"""Is the object one we can work with? The same checks that the API server's CEL makes, and those it cannot."""

from __future__ import annotations

from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.api.validate import Refused, read_spec
from kubeinfer_operator.builders.arguments import served_names
from kubeinfer_operator.conditions import ACCEPTED, Finding, no, yes
from kubeinfer_operator.kube import DEPLOYMENTS, SERVICES, Manifest
from kubeinfer_operator.store import key_of
from kubeinfer_operator.world import World


def accept(model: Manifest, world: World) -> tuple[InferenceModelSpec | None, Finding]:
    """The spec, or None with the reason why it is not accepted."""
    namespace, name = key_of(model)
    try:
        spec = read_spec(name, model.get("spec"))
    except Refused as error:
        return None, no(ACCEPTED, error.reason, str(error))
    for served in served_names(name, spec):
        first = world.claimants(served)[:1]
        if first and key_of(first[0]) != (namespace, name):
            other = "/".join(key_of(first[0]))
            return None, no(
                ACCEPTED,
                "NameClash",
                f"InferenceModel {other} is older and serves the name {served!r}: give spec.servedNames another one",
            )
    for kind in (SERVICES, DEPLOYMENTS):
        found = world.get(kind, namespace, name)
        if found is not None and not owned_by(found, model):
            return None, no(
                ACCEPTED,
                "NameTaken",
                f"a {kind.kind} {name!r} is there already and is not this model's: delete it or rename the model",
            )
    return spec, yes(ACCEPTED, "Accepted", "the spec is valid")


def owned_by(obj: Manifest, model: Manifest) -> bool:
    """Whether ``model`` (this very object, by uid) is an owner of ``obj``."""
    uid = model["metadata"]["uid"]
    return any(ref.get("uid") == uid for ref in obj["metadata"].get("ownerReferences") or [])
