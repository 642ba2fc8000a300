"""Blocks of the KV cache: who holds which, and which prefix each full block stands for.

Automatic prefix caching by keys of full blocks (`kubeinfer.engine.prefix_keys`): equal keys mean equal prefixes (paged KV
cache: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention"). With host
blocks there is a second tier: blocks evicted from the device are kept there and brought back. Plain integers; no device is
touched here.
"""

from __future__ import annotations

from collections.abc import Iterable

from kubeinfer.engine.free_list import FreeList
from kubeinfer.engine.host_tier import HostTier
from kubeinfer.engine.prefix_keys import PrefixKeys
from kubeinfer.engine.request import Request

DUMMY_BLOCK = 0  # never given to a request: padding rows of a captured graph point at it


class KVCacheManager:
    """Gives blocks to requests and takes them back. Block 0 is the dummy block.

    ``num_host_blocks`` blocks of host memory keep what is evicted. ``copies_out`` (device block, host block) and
    ``copies_in`` (host block, device block) gather what the next step's plan must copy: first out, then in, both before
    the step itself. More than ``max_copies_in`` blocks come in at once only where nobody waits for it.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        num_host_blocks: int = 0,
        max_copies_in: int = 2**31,
    ):
        if num_blocks < 2:
            raise ValueError("the KV cache needs at least two blocks (one is the dummy block).")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._refs = [0] * num_blocks
        self._keys = PrefixKeys(block_size)
        self._key: list[bytes | None] = [None] * num_blocks  # of a block that is in _cached
        self._cached: dict[bytes, int] = {}
        self._free = FreeList(num_blocks)
        self._free.remove(DUMMY_BLOCK)
        self.max_copies_in = max_copies_in
        self._host = HostTier(num_host_blocks if enable_prefix_caching else 0)
        self.copies_out: list[tuple[int, int]] = []
        self.copies_in: list[tuple[int, int]] = []
        self.prefix_queries = 0  # tokens looked up
        self.prefix_hits = 0  # tokens found
        self.host_hits = 0  # tokens of prefix_hits that were brought back from the host
        self.num_copied_out = 0  # blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def usage(self) -> float:
        """Share of blocks that requests hold, 0 to 1."""
        return 1.0 - len(self._free) / self.num_usable

    @property
    def host_usage(self) -> float:
        """Share of host blocks that keep a prefix, 0 to 1."""
        return len(self._host) / self._host.num_blocks if self._host.num_blocks else 0.0

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, request: Request) -> list[int]:
        """Cached blocks of the longest known prefix; at least one token is always left to compute.

        A block that only the host has stands as ``~host block``, a negative number.
        """
        if not self.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return []
        most = (len(request.token_ids) - 1) // self.block_size
        self._keys.extend(request, most)
        found: list[int] = []
        cached, host = self._cached, self._host
        for key in request.block_hashes[:most]:
            block = cached.get(key)
            if block is None:
                in_host = host.get(key)
                if in_host is None:
                    break
                block = ~in_host
            found.append(block)
        return found

    def take_prefix(self, request: Request, blocks: list[int]) -> None:
        """Hold the cached ``blocks`` for a request that holds none yet, and count the hit."""
        request.block_ids = self._hold(request, blocks)
        request.num_registered = len(blocks)
        request.num_computed = len(blocks) * self.block_size
        if self.enable_prefix_caching:
            self.prefix_queries += len(request.token_ids)
            self.prefix_hits += request.num_computed
            # A block fetched early may have been evicted again, and fetched twice.
            self.host_hits += min(request.num_fetched, len(blocks)) * self.block_size
            request.num_fetched = 0

    def exceeds_copies(self, blocks: list[int]) -> bool:
        """Whether bringing in all of ``blocks`` makes the next step wait for too many copies."""
        count = sum(1 for block in blocks if block < 0)
        return count > 0 and len(self.copies_in) + count > self.max_copies_in

    def prefetch(self, request: Request, blocks: list[int]) -> None:
        """Bring in as many of ``blocks`` as the next step may wait for; nobody holds them yet."""
        room = self.max_copies_in - len(self.copies_in)
        part = []
        for block in blocks:
            if block < 0:
                if room <= 0:
                    break
                room -= 1
            part.append(block)
        self._give_back(self._hold(request, part))

    def _hold(self, request: Request, blocks: list[int]) -> list[int]:
        """``blocks``, which begin the request, held once more; the host's are brought in to blocks of the device."""
        # All are held before the first block is evicted to make room: it must not be one of them.
        for block in blocks:
            if block < 0:
                self._host.hold(~block)
            else:
                if self._refs[block] == 0:
                    self._free.remove(block)
                self._refs[block] += 1
        held = []
        for i, block in enumerate(blocks):
            if block < 0:
                block = self._bring_in(~block, request.block_hashes[i])
                request.num_fetched += 1
            held.append(block)
        return held

    def _bring_in(self, host_block: int, key: bytes) -> int:
        """A device block that gets ``host_block``'s content before the next step."""
        block = self._take_free()
        self._cached[key] = block
        self._key[block] = key
        self.copies_in.append((host_block, block))
        return block

    def _take_free(self) -> int:
        """The block that was freed first, now held once. Its prefix, if it has one, moves to the host."""
        block = self._free.pop_left()
        key = self._key[block]
        if key is not None:
            del self._cached[key]
            self._key[block] = None
            host_block = self._host.put(key)
            if host_block is not None:
                self.copies_out.append((block, host_block))
        self._refs[block] = 1
        return block

    def take_copies(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """``copies_out`` and ``copies_in`` for the plan that is being made; later ones belong to the next plan."""
        copies = self.copies_out, self.copies_in
        if copies[0] or copies[1]:
            self.copies_out, self.copies_in = [], []
            self._host.end_step()
            self.num_copied_out += len(copies[0])
        return copies

    def count_free(self, blocks: list[int]) -> int:
        """How many blocks leave the free list when a request takes ``blocks``: those nobody holds, and one a host block."""
        return sum(1 for block in blocks if block < 0 or block in self._free)

    def allocate(self, request: Request, num_tokens: int) -> list[int] | None:
        """Blocks to append so that ``num_tokens`` tokens fit, or None if there are not enough (nothing changes then)."""
        need = -(-num_tokens // self.block_size) - len(request.block_ids)
        if need <= 0:
            return []
        if need > len(self._free):
            return None
        new = [self._take_free() for _ in range(need)]
        request.block_ids.extend(new)
        return new

    def register_full_blocks(self, request: Request, num_computed: int) -> None:
        """Put blocks whose tokens are all known and computed (or being computed) into the prefix cache.

        A later row of the same step may hit them: each layer writes all keys and values before it attends.
        """
        full = min(num_computed, len(request.token_ids)) // self.block_size
        if not self.enable_prefix_caching or full <= request.num_registered:
            return
        self._keys.extend(request, full)
        for i in range(request.num_registered, full):
            key, block = request.block_hashes[i], request.block_ids[i]
            if key not in self._cached:
                self._cached[key] = block
                self._key[block] = key
        request.num_registered = full

    def free(self, request: Request) -> None:
        """Give all blocks back."""
        self._give_back(request.block_ids)
        request.block_ids = []
        request.num_registered = 0

    def _give_back(self, blocks: list[int]) -> None:
        """The last first, so that a shared beginning is evicted last."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free.append(block)

    def forget(self, request: Request) -> None:
        """Take what the request computed out of the prefix cache, the host's too: it is good for nobody."""
        for key in request.block_hashes:
            block = self._cached.pop(key, None)
            if block is not None:
                self._key[block] = None
            self._host.forget(key)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, the host's too; blocks in use stay with their requests."""
        for key, block in self._cached.items():
            if self._key[block] == key:
                self._key[block] = None
        self._cached.clear()
        self._host.clear()

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Recompute every invariant from the requests that hold blocks; raise AssertionError where one is broken."""
        refs = [0] * self.num_blocks
        for request in requests:
            held = request.block_ids
            if len(set(held)) != len(held):
                raise AssertionError(f"request {request.request_id} holds a block twice")
            if request.num_registered > len(held):
                raise AssertionError(f"request {request.request_id} registered blocks it does not hold")
            for block in held:
                refs[block] += 1
        if refs[DUMMY_BLOCK]:
            raise AssertionError("the dummy block was given to a request")
        if refs != self._refs:
            wrong = next(i for i in range(self.num_blocks) if refs[i] != self._refs[i])
            raise AssertionError(f"block {wrong} is held {refs[wrong]} times but counted {self._refs[wrong]}")
        free = list(self._free)
        if len(free) != len(self._free) or len(set(free)) != len(free):
            raise AssertionError("the free list is damaged")
        if set(free) != {b for b in range(1, self.num_blocks) if refs[b] == 0}:
            raise AssertionError("free blocks and held blocks do not make up the cache")
        for key, block in self._cached.items():
            if self._key[block] != key:
                raise AssertionError(f"cached block {block} does not know its key")
        if sum(k is not None for k in self._key) != len(self._cached):
            raise AssertionError("a block has a key that the cache does not know")
        self._host.check_integrity()
        targets = [host for _, host in self.copies_out]
        if len(set(targets)) != len(targets):
            raise AssertionError("two blocks are copied to one host block in one step")
