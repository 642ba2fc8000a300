"""What a reconcile asks for: writes, questions, and when to look again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.conditions import Finding
from kubeinfer_operator.hub import Question
from kubeinfer_operator.kube import Kind, Manifest


@dataclass(frozen=True, slots=True)
class Apply:
    """Server-side apply; skipped where the object is so already."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Delete:
    kind: Kind
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Annotate:
    """Merge patch of an object's metadata: labels, annotations, owner references."""

    kind: Kind
    namespace: str
    name: str
    metadata: dict[str, Any]


Action = Apply | Delete | Annotate


@dataclass(frozen=True, slots=True)
class Follow:
    """Read the end of a container's log and take the progress from it."""

    namespace: str
    pod: str
    container: str


@dataclass
class Outcome:
    """Collected by the stages. ``spec``: None where it cannot be understood; ``again``: seconds until a look without a reason (None: only events wake)."""

    actions: list[Action] = field(default_factory=list)
    spec: InferenceModelSpec | None = None
    findings: list[Finding] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)
    follow: Follow | None = None
    probe: str | None = None
    probe_names: tuple[str, ...] = ()
    token_needed: bool = False
    again: float | None = None

    def look_again(self, seconds: float) -> None:
        self.again = seconds if self.again is None else min(self.again, seconds)
