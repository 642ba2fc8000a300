"""From pydantic's JSON schema to the structural schema that a CustomResourceDefinition takes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

_KEEP = (
    "type",
    "description",
    "default",
    "enum",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
)


def structural(model: type[BaseModel]) -> Schema:
    """The structural schema of ``model``: references inlined, nulls dropped, every default in it."""
    raw = model.model_json_schema(by_alias=True, mode="validation")
    return _convert(raw, raw.get("$defs", {}))


def _convert(node: Schema, defs: dict[str, Schema]) -> Schema:
    node = _flatten(node, defs)
    out: Schema = {key: node[key] for key in _KEEP if key in node}
    out.update({key: value for key, value in node.items() if key.startswith("x-kubernetes-")})
    if out.get("default", ...) is None:
        del out["default"]
    for bound, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if strict in node:
            out[bound], out[strict] = node[strict], True
    if out.get("x-kubernetes-int-or-string"):
        for key in ("type", "pattern", "maxLength"):
            out.pop(key, None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        out["pattern"] = node["pattern"]
    if "const" in node:
        out["enum"] = [node["const"]]
    if "enum" in out and "type" not in out:
        out["type"] = {bool: "boolean", int: "integer", float: "number", str: "string"}[type(out["enum"][0])]
    if out.get("type") == "object":
        properties = node.get("properties")
        if properties:
            required = node.get("required", ())
            out["properties"] = {
                key: _property(value, defs, key in required) for key, value in properties.items()
            }
            if required:
                out["required"] = sorted(required)
        elif isinstance(node.get("additionalProperties"), dict) and node["additionalProperties"]:
            out["additionalProperties"] = _convert(node["additionalProperties"], defs)
            out.pop("default", None)
        else:
            out["x-kubernetes-preserve-unknown-fields"] = True
            out.pop("default", None)
    if out.get("type") == "array":
        out["items"] = _convert(node["items"], defs)
        if out.get("default") == []:
            del out["default"]
    if out.get("type") == "integer":
        out.setdefault("format", "int64")
    return out


def _property(node: Schema, defs: dict[str, Schema], required: bool) -> Schema:
    out = _convert(node, defs)
    if "properties" in out and not required and "anyOf" not in node:
        # An object that is always there: the API server fills the defaults inside it.
        out["default"] = {}
    return out


def _flatten(node: Schema, defs: dict[str, Schema]) -> Schema:
    """Resolve ``$ref``, ``allOf`` of one and ``anyOf`` with null, keeping what stands beside them."""
    merged = dict(node)
    if "$ref" in merged:
        target = defs[merged.pop("$ref").rpartition("/")[2]]
        merged = {**_flatten(target, defs), **merged}
    options = merged.pop("anyOf", None)
    if options is not None:
        real = [option for option in options if option.get("type") != "null"]
        if len(real) != 1:
            raise ValueError(f"no structural schema for a choice of {len(real)} types: {node}")
        merged = {**_flatten(real[0], defs), **merged}
    return merged
