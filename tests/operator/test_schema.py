"""The CRD: structural, described, and not stale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kubeinfer.options import EngineOptions
from kubeinfer_operator.api.v1alpha1 import EngineSpec
from kubeinfer_operator.generate import crd, main

ROOT = Path(__file__).parents[2]
SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def _nodes(path: str, node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from _nodes(f"{path}.{name}", child)
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from _nodes(f"{path}[]", node[key])


def test_structural() -> None:
    """What the API server asks of a schema: a type at every node, nothing that refers or chooses."""
    for path, node in _nodes("", SCHEMA):
        if node.get("x-kubernetes-int-or-string"):
            assert "type" not in node, path
            continue
        assert node.get("type") in ("object", "array", "string", "integer", "number", "boolean"), path
        assert not {"$ref", "oneOf", "allOf", "anyOf", "not", "title", "const"} & set(node), path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert node.get("default", ...) not in (None, ""), path
        if node.get("exclusiveMinimum") is not None:
            assert node["exclusiveMinimum"] is True, path


def test_every_field_is_described() -> None:
    for path, node in _nodes("", SCHEMA):
        for name, child in node.get("properties", {}).items():
            if f"{path}.{name}" != ".metadata":
                assert len(child.get("description", "")) > 5, f"{path}.{name}"


def test_engine_fields_are_the_engines_options() -> None:
    fields = set(EngineSpec.model_fields)
    for name, info in EngineOptions.model_fields.items():
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        assert (name in fields) == (extra.get("pod") is not False), name
    engine = SCHEMA["properties"]["spec"]["properties"]["engine"]["properties"]
    assert engine["gpuMemoryUtilization"] | {"description": ""} == {
        "type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1, "description": "",
    }  # fmt: skip
    assert engine["blockSize"]["enum"] == [8, 16, 32, 64, 128]
    assert engine["blockSize"]["type"] == "integer"
    assert engine["hfOverrides"]["x-kubernetes-preserve-unknown-fields"] is True
    assert "device" not in engine


def test_defaults_reach_the_inside() -> None:
    spec = SCHEMA["properties"]["spec"]["properties"]
    assert spec["resources"]["default"] == {}
    assert spec["resources"]["properties"]["device"]["default"] == "gpu"
    assert "default" not in spec["autoscaling"]
    assert spec["replicas"]["default"] == 1


def test_bounded_where_cel_loops() -> None:
    """The API server refuses rules whose cost it cannot bound."""
    model = SCHEMA["properties"]["spec"]["properties"]["model"]["properties"]
    assert model["uri"]["maxLength"]
    assert model["mirrors"]["maxItems"]
    assert SCHEMA["properties"]["spec"]["properties"]["template"]["properties"]["labels"]["maxProperties"]


def test_checked_in_files_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--root", str(ROOT)]) == 0, capsys.readouterr().err


def test_a_stale_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert "make generate" in capsys.readouterr().err
    assert main(["--root", str(tmp_path)]) == 0
    assert main(["--check", "--root", str(tmp_path)]) == 0
