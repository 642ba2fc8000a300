"""Rules that one field's schema cannot hold.

Each rule is written twice: in CEL for the API server (1.25 and later run it at apply time) and in Python for the operator
and ``kubeinfer up``, which behave alike on servers that drop CEL. A test holds the two equal on random specs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]

NAME_PATTERN = "^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"


@dataclass(frozen=True, slots=True)
class Rule:
    """``cel`` and ``holds`` say the same of ``self``: the spec with defaults filled in, as the API server stores it."""

    cel: str
    holds: Callable[[Spec], bool]
    message: str
    field: str


def _engine(spec: Spec) -> Spec:
    return spec.get("engine") or {}


def _parallel(spec: Spec) -> bool:
    engine = _engine(spec)
    if "tensorParallelSize" not in engine and "pipelineParallelSize" not in engine:
        return True
    product = engine.get("tensorParallelSize", 1) * engine.get("pipelineParallelSize", 1)
    return bool(product == spec["resources"]["count"])


def _device(spec: Spec) -> str:
    return str(spec["resources"]["device"])


def _without(spec: Spec, *names: str) -> bool:
    return not any(name in _engine(spec) for name in names)


STORAGE_KINDS = ("persistentVolumeClaim", "existingClaim", "hostPath", "ephemeral")


def _storage_count(spec: Spec) -> int:
    return sum(kind in spec["storage"] for kind in STORAGE_KINDS)


def _is_local(uri: str) -> bool:
    return uri.startswith(("pvc://", "file://"))


SPEC_RULES: tuple[Rule, ...] = (
    Rule(
        "self.resources.device == 'gpu' || self.resources.count == 1",
        lambda s: _device(s) == "gpu" or s["resources"]["count"] == 1,
        "resources.count counts GPUs: leave it out with device cpu, and set resources.requests.cpu for more cores",
        "resources.count",
    ),
    Rule(
        "(!has(self.engine.tensorParallelSize) && !has(self.engine.pipelineParallelSize)) || "
        "(has(self.engine.tensorParallelSize) ? self.engine.tensorParallelSize : 1) * "
        "(has(self.engine.pipelineParallelSize) ? self.engine.pipelineParallelSize : 1) == self.resources.count",
        _parallel,
        "engine.tensorParallelSize x engine.pipelineParallelSize must equal resources.count: change one of them, or "
        "leave both engine options out",
        "engine.tensorParallelSize",
    ),
    Rule(
        "(has(self.storage.persistentVolumeClaim) ? 1 : 0) + (has(self.storage.existingClaim) ? 1 : 0) + "
        "(has(self.storage.hostPath) ? 1 : 0) + (has(self.storage.ephemeral) ? 1 : 0) <= 1",
        lambda s: _storage_count(s) <= 1,
        "storage takes one kind: keep one of persistentVolumeClaim, existingClaim, hostPath and ephemeral",
        "storage",
    ),
    Rule(
        "!(self.model.uri.startsWith('pvc://') || self.model.uri.startsWith('file://')) || "
        "!(has(self.storage.persistentVolumeClaim) || has(self.storage.existingClaim) || has(self.storage.hostPath) || "
        "has(self.storage.ephemeral))",
        lambda s: not _is_local(s["model"]["uri"]) or _storage_count(s) == 0,
        "nothing is downloaded for pvc:// and file://: leave storage out",
        "storage",
    ),
    Rule(
        "!(self.model.uri.startsWith('pvc://') || self.model.uri.startsWith('file://')) || "
        "!(has(self.model.revision) || has(self.model.tokenSecretRef) || "
        "(has(self.model.mirrors) && self.model.mirrors.size() > 0))",
        lambda s: (
            not _is_local(s["model"]["uri"])
            or not ("revision" in s["model"] or "tokenSecretRef" in s["model"] or s["model"].get("mirrors"))
        ),
        "model.revision, model.mirrors and model.tokenSecretRef are for hubs: leave them out with pvc:// and file://",
        "model.uri",
    ),
    Rule(
        "!(self.model.uri.contains('@') && has(self.model.revision))",
        lambda s: not ("@" in s["model"]["uri"] and "revision" in s["model"]),
        "the revision is given twice: take '@REV' out of model.uri or leave model.revision out",
        "model.revision",
    ),
    Rule(
        "!has(self.autoscaling) || self.autoscaling.minReplicas <= self.autoscaling.maxReplicas",
        lambda s: (
            "autoscaling" not in s or s["autoscaling"]["minReplicas"] <= s["autoscaling"]["maxReplicas"]
        ),
        "autoscaling.minReplicas must not be above autoscaling.maxReplicas",
        "autoscaling.minReplicas",
    ),
    Rule(
        "self.resources.device == 'gpu' || !(has(self.engine.swapSpace) || has(self.engine.cpuOffloadGb) || "
        "has(self.engine.gpuMemoryUtilization) || has(self.engine.cudagraphCaptureSizes) || "
        "has(self.engine.disableCustomAllReduce))",
        lambda s: (
            _device(s) == "gpu"
            or _without(
                s,
                "swapSpace",
                "cpuOffloadGb",
                "gpuMemoryUtilization",
                "cudagraphCaptureSizes",
                "disableCustomAllReduce",
            )
        ),
        "engine.swapSpace, cpuOffloadGb, gpuMemoryUtilization, cudagraphCaptureSizes and disableCustomAllReduce have no "
        "effect on the CPU: leave them out, or set resources.device to gpu",
        "engine",
    ),
    Rule(
        "self.resources.device == 'cpu' || !has(self.engine.cpuKvcacheSpace)",
        lambda s: _device(s) == "cpu" or _without(s, "cpuKvcacheSpace"),
        "engine.cpuKvcacheSpace has no effect on a GPU: use engine.gpuMemoryUtilization or engine.kvCacheMemoryBytes",
        "engine.cpuKvcacheSpace",
    ),
    Rule(
        "!has(self.template.labels) || !self.template.labels.exists(k, k.startsWith('kubeinfer.io/') || "
        "k.startsWith('app.kubernetes.io/'))",
        lambda s: (
            not any(
                key.startswith(("kubeinfer.io/", "app.kubernetes.io/"))
                for key in s["template"].get("labels") or {}
            )
        ),
        "template.labels must not start with kubeinfer.io/ or app.kubernetes.io/: the operator sets those",
        "template.labels",
    ),
)

NAME_RULE = Rule(
    f"self.metadata.name.matches('{NAME_PATTERN}')",
    lambda o: re.match(NAME_PATTERN, o["metadata"]["name"]) is not None,
    "metadata.name becomes a Service's name: at most 40 characters, lower-case letters, digits and '-', beginning with a "
    "letter and ending with a letter or digit",
    "metadata.name",
)


def broken_rules(name: str, spec: Spec) -> list[Rule]:
    """The rules that an object breaks. ``spec`` is the JSON form with defaults and without nulls."""
    broken = [rule for rule in SPEC_RULES if not rule.holds(spec)]
    if not NAME_RULE.holds({"metadata": {"name": name}}):
        broken.insert(0, NAME_RULE)
    return broken
