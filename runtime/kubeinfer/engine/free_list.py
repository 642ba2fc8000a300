"""An ordered list of block ids with O(1) operations."""

from __future__ import annotations

from collections.abc import Iterator


class FreeList:
    """Least-recently-freed order over block ids, O(1) for every operation (a doubly linked list in two arrays)."""

    def __init__(self, num_blocks: int):
        self._head = num_blocks  # sentinel
        self._next = [*list(range(1, num_blocks + 1)), 0]
        self._prev = [num_blocks, *range(num_blocks)]
        self._in = bytearray(b"\x01" * num_blocks)
        self._count = num_blocks

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block: int) -> bool:
        return bool(self._in[block])

    def remove(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before
        self._in[block] = 0
        self._count -= 1

    def pop_left(self) -> int:
        block = self._next[self._head]
        self.remove(block)
        return block

    def append(self, block: int) -> None:
        last = self._prev[self._head]
        self._next[last] = block
        self._prev[block] = last
        self._next[block] = self._head
        self._prev[self._head] = block
        self._in[block] = 1
        self._count += 1

    def __iter__(self) -> Iterator[int]:
        block = self._next[self._head]
        while block != self._head:
            yield block
            block = self._next[block]
