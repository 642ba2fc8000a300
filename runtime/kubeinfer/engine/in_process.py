"""An engine core in the caller's own process, driven by the caller's loop."""

from __future__ import annotations

from kubeinfer.engine.client import EngineClient
from kubeinfer.engine.core import make_core
from kubeinfer.engine.messages import EngineOutputs, EngineRequest
from kubeinfer.options import EngineOptions


class InProcessClient(EngineClient):
    """Direct calls into an :class:`EngineCore`."""

    def __init__(self, options: EngineOptions):
        self.core = make_core(options)
        self.info = self.core.info

    def add_requests(self, requests: list[EngineRequest]) -> None:
        self.core.add_requests(requests)

    def abort_requests(self, request_ids: list[str]) -> None:
        self.core.abort_requests(request_ids)

    def step(self) -> EngineOutputs:
        return self.core.step()

    def has_unfinished_requests(self) -> bool:
        return self.core.has_work()

    def reset_prefix_cache(self) -> None:
        self.core.reset_prefix_cache()

    def check_integrity(self) -> None:
        self.core.check_integrity()

    def shutdown(self) -> None:
        self.core.shutdown()
