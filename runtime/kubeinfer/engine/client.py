"""The way to an engine core: in this process, or in one of its own over a socket."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from kubeinfer.engine.messages import EngineInfo, EngineOutputs, EngineRequest

if TYPE_CHECKING:
    from kubeinfer.options import EngineOptions


class EngineClient(ABC):
    """A synchronous engine: the caller's own loop drives it. Used by the offline ``LLM``."""

    info: EngineInfo

    @abstractmethod
    def add_requests(self, requests: list[EngineRequest]) -> None: ...

    @abstractmethod
    def abort_requests(self, request_ids: list[str]) -> None: ...

    @abstractmethod
    def step(self) -> EngineOutputs:
        """Run until one step's outputs are there (it may be empty). Raises ``EngineDeadError``."""

    @abstractmethod
    def has_unfinished_requests(self) -> bool: ...

    @abstractmethod
    def reset_prefix_cache(self) -> None: ...

    @abstractmethod
    def shutdown(self) -> None: ...


class AsyncEngineClient(ABC):
    """An engine that runs on its own; its outputs are awaited. Used by the server."""

    info: EngineInfo

    @abstractmethod
    async def add_requests(self, requests: list[EngineRequest]) -> None: ...

    @abstractmethod
    async def abort_requests(self, request_ids: list[str]) -> None: ...

    @abstractmethod
    async def next_outputs(self) -> EngineOutputs:
        """The next message of outputs. Raises ``EngineDeadError`` (with the cause) once the core has died."""

    @property
    @abstractmethod
    def death_reason(self) -> str | None:
        """Why the core died, or None while it lives."""

    @abstractmethod
    async def reset_prefix_cache(self) -> None: ...

    @abstractmethod
    def shutdown(self) -> None: ...


def make_client(options: EngineOptions) -> EngineClient:
    """An engine in this process (rank 0 here; further ranks in processes of their own)."""
    from kubeinfer.engine.in_process import InProcessClient

    return InProcessClient(options)


def make_async_client(
    options: EngineOptions, log_format: str = "text", check: Callable[[], object] | None = None
) -> AsyncEngineClient:
    """An engine core in a process of its own. Blocks until it is ready; raises with the child's reason if it dies.

    ``check`` is called again and again meanwhile; what it raises ends the core and is raised.
    """
    from kubeinfer.engine.process_client import ProcessClient

    return ProcessClient(options, log_format, check)
