"""The seam between what the cluster knows and what the gateway routes to."""

from __future__ import annotations

from abc import ABC, abstractmethod

from kubeinfer_gateway.registry import Registry


class DiscoveryError(Exception):
    """Discovery cannot start; the message says what to change."""


class Discovery(ABC):
    """Keeps a registry true: `put` and `remove` of whole models, `synced` once all that exists was seen."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    @abstractmethod
    async def run(self) -> None:
        """Runs until cancelled. Raises DiscoveryError only for what cannot mend itself."""
