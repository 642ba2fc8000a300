"""Checks of a whole object, the same for the operator and for ``kubeinfer up``."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from kubeinfer.weights.errors import InvalidModelId
from kubeinfer_operator import names
from kubeinfer_operator.api.rules import broken_rules
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.builders.weights import sources_of


class Refused(ValueError):
    """An object that cannot be worked with; ``reason`` is that of the condition."""

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


def read_manifest(document: Any) -> tuple[str, InferenceModelSpec]:
    """Name and spec of a manifest from a file. Unknown fields are refused, as ``kubectl apply`` does."""
    if not isinstance(document, dict):
        raise Refused("InvalidSpec", "a manifest is a mapping of apiVersion, kind, metadata and spec")
    kind = f"{document.get('apiVersion')}, {document.get('kind')}"
    if (document.get("apiVersion"), document.get("kind")) != (names.API_VERSION, names.KIND):
        raise Refused("InvalidSpec", f"this is {kind}, not {names.API_VERSION}, {names.KIND}")
    name = (document.get("metadata") or {}).get("name")
    if not isinstance(name, str):
        raise Refused("InvalidSpec", "metadata.name is missing")
    raw = document.get("spec")
    unknown = unknown_fields(raw, InferenceModelSpec, "spec")
    if unknown:
        raise Refused("InvalidSpec", "; ".join(unknown))
    return name, read_spec(name, raw)


def unknown_fields(raw: Any, model: type[BaseModel], path: str) -> list[str]:
    """A sentence for each field of ``raw`` that ``model`` does not have, with the nearest one that it has."""
    if not isinstance(raw, dict):
        return []
    fields = {info.alias or name: info.annotation for name, info in model.model_fields.items()}
    found = []
    for key, value in raw.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            found.append(f"unknown field {path}.{key}" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        inner = _model_in(fields[key])
        if inner is not None:
            items = value if isinstance(value, list) else [value]
            for item in items:
                found += unknown_fields(item, inner, f"{path}.{key}")
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        inner = _model_in(part)
        if inner is not None:
            return inner
    return None
