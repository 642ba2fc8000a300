"""Is the object one we can work with? The same checks that the API server's CEL makes, and those it cannot."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from kubeinfer.weights.errors import InvalidModelId
from kubeinfer_operator.api.rules import broken_rules
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.builders.arguments import served_names
from kubeinfer_operator.builders.weights import sources_of
from kubeinfer_operator.conditions import ACCEPTED, Finding, no, yes
from kubeinfer_operator.kube import DEPLOYMENTS, SERVICES, Manifest
from kubeinfer_operator.store import key_of
from kubeinfer_operator.world import World


class Refused(ValueError):
    """A spec that cannot be worked with; ``reason`` is that of the condition."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_spec(name: str, raw: Any) -> InferenceModelSpec:
    """Validate a raw spec as the API server would. Raises :class:`Refused` with all that is wrong."""
    try:
        spec = InferenceModelSpec.model_validate(raw)
    except ValidationError as error:
        texts = [f"spec.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise Refused("InvalidSpec", "; ".join(texts)) from None
    if len(set(spec.served_names)) != len(spec.served_names):
        raise Refused("InvalidSpec", "spec.servedNames: a name is given twice: leave one out")
    broken = broken_rules(name, spec.model_dump(by_alias=True, exclude_none=True))
    if broken:
        raise Refused("InvalidSpec", "; ".join(rule.message for rule in broken))
    try:
        sources_of(spec.model)
    except InvalidModelId as error:
        raise Refused("InvalidModelId", error.message) from None
    return spec


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
