"""The second tier of the prefix cache: which host block keeps which evicted prefix block.

A block that the device's tier evicts moves here under the same key, and comes back when a prompt reaches it. What was
brought back stays here too, so that evicting it again copies nothing. Plain integers, as in ``kv_cache``; the copies
themselves are the worker's.
"""

from __future__ import annotations

from kubeinfer.engine.free_list import FreeList


class HostTier:
    """Host blocks by key, the least recently used one given up first.

    A step copies out before it copies in, and all its copies may run at once: a host block that the step reads or writes
    is therefore *held*, given to nobody else, until :meth:`end_step`.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._lru = FreeList(num_blocks)  # all blocks that are not held; those never used stand first
        self._held: list[int] = []
        self._key: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._cached)

    def get(self, key: bytes) -> int | None:
        return self._cached.get(key)

    def hold(self, block: int) -> None:
        """Keep ``block`` as it is for the rest of this step; it then counts as just used."""
        if block in self._lru:
            self._lru.remove(block)
            self._held.append(block)

    def put(self, key: bytes) -> int | None:
        """The host block to copy ``key``'s block to; None if it is here already or every block is held."""
        known = self._cached.get(key)
        if known is not None:
            if known in self._lru:
                self._lru.remove(known)
                self._lru.append(known)
            return None
        if not len(self._lru):
            return None
        block = self._lru.pop_left()
        self._held.append(block)
        old = self._key[block]
        if old is not None:
            del self._cached[old]
        self._key[block] = key
        self._cached[key] = block
        return block

    def end_step(self) -> None:
        """The step is planned: what it held may be given up by the steps after it."""
        for block in self._held:
            self._lru.append(block)
        self._held.clear()

    def forget(self, key: bytes) -> None:
        """Keep nothing under ``key``."""
        block = self._cached.pop(key, None)
        if block is not None:
            self._key[block] = None

    def clear(self) -> None:
        """Forget every block."""
        self._cached.clear()
        self._key = [None] * self.num_blocks

    def check_integrity(self) -> None:
        """Recompute every invariant; raise AssertionError where one is broken."""
        blocks = [*self._lru, *self._held]
        if sorted(blocks) != list(range(self.num_blocks)) or len(self._lru) + len(self._held) != len(blocks):
            raise AssertionError("a host block was lost or is listed twice")
        for key, block in self._cached.items():
            if self._key[block] != key:
                raise AssertionError(f"host block {block} does not know its key")
        if sum(k is not None for k in self._key) != len(self._cached):
            raise AssertionError("a host block has a key that the host tier does not know")
