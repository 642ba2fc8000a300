"""What this API server serves and this operator may do: asked of the server, never guessed from a version."""

from __future__ import annotations

from dataclasses import dataclass

from kubeinfer_operator.kube import CLASSES, NODES, Kube, KubeError


@dataclass(frozen=True, slots=True)
class Capabilities:
    """``disruption_budgets``: policy/v1 is served. ``storage_classes``, ``nodes``: they may be listed."""

    disruption_budgets: bool = True
    storage_classes: bool = True
    nodes: bool = True


async def discover(kube: Kube) -> Capabilities:
    """Ask the server once, at start."""
    groups = await kube.api_groups()
    may = {}
    for kind in (CLASSES, NODES):
        try:
            await kube.list(kind, cached=True, limit=1)
            may[kind.kind] = True
        except KubeError as error:
            if error.status != 403:
                raise
            may[kind.kind] = False
    return Capabilities("policy/v1" in groups, may["StorageClass"], may["Node"])
