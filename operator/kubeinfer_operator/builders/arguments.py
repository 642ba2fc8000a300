"""From ``spec.engine`` to the flags of ``kubeinfer serve``: the same for a pod and for ``kubeinfer up``."""

from __future__ import annotations

import itertools
import json
from typing import Any

from kubeinfer_operator import names
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec


def engine_values(spec: InferenceModelSpec) -> dict[str, Any]:
    """Options of ``spec.engine`` that are given, by their Python names, and those that follow from the resources."""
    values: dict[str, Any] = spec.engine.model_dump(exclude_none=True)
    count = spec.resources.count
    if count > 1 and "tensor_parallel_size" not in values and "pipeline_parallel_size" not in values:
        values["tensor_parallel_size"] = count
    values["device"] = "cuda" if spec.resources.device == "gpu" else "cpu"
    return values


def flags(values: dict[str, Any]) -> list[str]:
    """Command-line flags in a stable order: ``--name value``, ``--name`` and ``--no-name`` for switches."""
    out: list[str] = []
    for name in sorted(values):
        value = values[name]
        flag = "--" + name.replace("_", "-")
        if value is True:
            out.append(flag)
        elif value is False:
            out.append("--no-" + name.replace("_", "-"))
        elif isinstance(value, dict):
            out += [flag, json.dumps(value, sort_keys=True, separators=(",", ":"))]
        elif isinstance(value, list):
            out += [flag, *map(str, value)]
        else:
            out += [flag, str(value)]
    return out


def served_names(name: str, spec: InferenceModelSpec) -> list[str]:
    """Names of the model in the OpenAI API."""
    return list(spec.served_names) or [name]


def names_in(arguments: list[str]) -> list[str]:
    """The names that :func:`serve_arguments` has written into ``arguments``."""
    words = arguments[arguments.index("--served-model-name") + 1 :]
    return list(itertools.takewhile(lambda word: not word.startswith("--"), words))


def serve_arguments(
    name: str, spec: InferenceModelSpec, path: str, *, host: str | None = None, port: int = names.RUNTIME_PORT
) -> list[str]:
    """Arguments of ``kubeinfer serve`` for model ``name`` whose weights lie at ``path``."""
    values = engine_values(spec)
    values["port"] = port
    values["shutdown_timeout"] = float(spec.rollout.drain_timeout)
    values["served_model_name"] = served_names(name, spec)
    if host is not None:
        values["host"] = host
    return [path, *flags(values)]
