"""Which decode rows of a step share a prefix, so that attention reads it once for all of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kubeinfer.worker.tables import RowTables

# When a pass of its own over the shared blocks pays. The pass takes 5 to 8 us in each layer whatever it finds, so captured
# decode steps without it exist too; a group of rows is worth it only if reading its prefix once saves a layer
# MIN_SAVED_BYTES (about 10 us at the speed of the L2 cache). Few rows leave a tile of the tensor cores mostly empty, and a
# short prefix leaves programs with next to no work.
MIN_BATCH = 32
MIN_MEMBERS = 16
MIN_TOKENS = 128
MIN_SAVED_BYTES = 48 << 20


class SharedBlocks(NamedTuple):
    """A group of a step's decode rows: their indices within the step, and how many leading tokens they share."""

    members: NDArray[np.int64]
    tokens: int

    def fill(self, members: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
        """Write this to the host's side of a `kubeinfer.kernels.shared_prefix.SharedPrefix`."""
        count = len(self.members)
        members[:count], members[count:] = self.members, -1
        tokens.fill(0)
        tokens[self.members] = self.tokens


NOTHING_SHARED = SharedBlocks(np.empty(0, np.int64), 0)


class SharedPrefixFinder:
    """Finds the group of decode rows whose common blocks are best read once.

    Prefix caching is what makes rows hold the same blocks: two tables with the same id in the same place hold the same
    tokens from the first block up to there (`kubeinfer.engine.kv_cache`). So one column of the tables says who belongs
    together, and how far they do is a binary search.
    """

    def __init__(self, tables: RowTables, block_size: int, bytes_per_token: int):
        """``bytes_per_token``: of one layer's keys and values on this rank."""
        self.tables = tables
        self.block_size = block_size
        self.bytes_per_token = bytes_per_token
        self.min_batch = MIN_BATCH
        self.min_members = MIN_MEMBERS
        self.min_tokens = MIN_TOKENS
        self.min_saved_bytes = MIN_SAVED_BYTES
        self.steps_shared = 0
        self._rows: NDArray[np.int32] | None = None
        self._version = -1
        self._found: SharedBlocks | None = None

    def find(self, rows: NDArray[np.int32], starts: NDArray[np.int32]) -> SharedBlocks | None:
        """The group of a step's decode rows, ``None`` if none is worth it.

        Args:
            rows: rows of the tables.
            starts: int32, position of each row's query token.
        """
        if len(rows) < self.min_batch:
            return None
        # Tables only grow, and what a row appends is its own: the same rows share the same blocks a step later.
        if self._rows is None or self._version != self.tables.version or not np.array_equal(rows, self._rows):
            self._rows, self._version = rows.copy(), self.tables.version
            self._found = self._search(rows, starts)
        if self._found is not None:
            self.steps_shared += 1
        return self._found

    def _search(self, rows: NDArray[np.int32], starts: NDArray[np.int32]) -> SharedBlocks | None:
        table, size = self.tables.block_table, self.block_size
        full = starts // size  # blocks before the one that the query is written to
        best: SharedBlocks | None = None
        most = self.min_saved_bytes
        depth = max(1, self.min_tokens // size)
        while True:
            deep = np.flatnonzero(full >= depth)
            if len(deep) < self.min_members:
                return best
            column = table[rows[deep], depth - 1]
            ids, counts = np.unique(column, return_counts=True)
            largest = int(counts.argmax())
            if counts[largest] < self.min_members:
                return best  # no group is larger further on
            group = deep[column == ids[largest]]
            common = self._common(rows[group], depth, int(full[group].min()))
            saved = (len(group) - 1) * common * size * self.bytes_per_token
            if saved >= most:
                best, most = SharedBlocks(group, common * size), saved
            # Fewer rows may share more: look past where this group ends, and far enough to be done in a few rounds.
            depth = max(common + 1, 2 * depth)

    def _common(self, rows: NDArray[np.int32], low: int, high: int) -> int:
        """How many leading blocks ``rows`` have in common: at least ``low``, at most ``high``."""
        table = self.tables.block_table
        while low < high:
            middle = (low + high + 1) // 2
            column = table[rows, middle - 1]
            if (column == column[0]).all():
                low = middle
            else:
                high = middle - 1
        return low
