"""Request bodies in the OpenAPI document, from the message types that decode them."""

from __future__ import annotations

from typing import Any

import msgspec


def json_body(cls: type[msgspec.Struct]) -> dict[str, Any]:
    """``openapi_extra`` of a route that takes ``cls`` as its JSON body."""
    (schema,), parts = msgspec.json.schema_components([cls], ref_template="#/$defs/{name}")
    inlined = _inline(schema, parts)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined}}}}


def _inline(node: Any, parts: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        ref = node.get("$ref")
        if isinstance(ref, str):
            return _inline(parts[ref.rsplit("/", 1)[-1]], parts)
        return {key: _inline(value, parts) for key, value in node.items()}
    if isinstance(node, list):
        return [_inline(value, parts) for value in node]
    return node
