"""Python's garbage collector, and long lists of token ids.

A full collection visits every element of every list there is: of some hundred long prompts that takes as long as several steps, and
it finds nothing, as nothing here refers to itself.
"""

from __future__ import annotations

import gc
from types import TracebackType


class Unvisited:
    """Within, what exists is not visited by the collector; afterwards it is again.

    Where the process has set objects aside itself (``gc.freeze``) nothing is changed: they could not be told from ours.
    """

    def __init__(self) -> None:
        self._ours = False

    def __enter__(self) -> Unvisited:
        self._ours = gc.get_freeze_count() == 0
        self.extend()
        return self

    def extend(self) -> None:
        """What was made since then too."""
        if self._ours:
            gc.freeze()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            gc.unfreeze()
