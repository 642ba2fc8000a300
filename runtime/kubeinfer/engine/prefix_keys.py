"""Keys of full blocks: a hash chain, so that a block's key covers its own tokens and all before it."""

from __future__ import annotations

from array import array
from hashlib import sha256

from kubeinfer.engine.request import Request


class PrefixKeys:
    """Extends requests' keys. What a request has in common with the one before it is not hashed again.

    Most requests of an application begin with the same thousands of tokens, and come one after the other.
    """

    def __init__(self, block_size: int):
        self._block_size = block_size
        # Of the request whose first blocks were hashed last: its salt, tokens (8 bytes each) and keys.
        self._salt: str | None = None
        self._tokens = b""
        self._keys: list[bytes] = []

    def extend(self, request: Request, num_blocks: int) -> None:
        """Compute the keys of the request's first ``num_blocks`` blocks (all their tokens must be known)."""
        keys, size = request.block_hashes, self._block_size
        begin = len(keys)
        if num_blocks <= begin:
            return
        salt = request.engine_request.cache_salt
        tokens = array("q", request.token_ids[begin * size : num_blocks * size]).tobytes()
        step = 8 * size
        if not begin:
            keys += self._keys[: self._blocks_in_common(salt, tokens, step)]
            self._salt, self._tokens, self._keys = salt, tokens, keys
        parent = keys[-1] if keys else (salt or "").encode()
        for at in range((len(keys) - begin) * step, len(tokens), step):
            parent = sha256(parent + tokens[at : at + step]).digest()
            keys.append(parent)

    def _blocks_in_common(self, salt: str | None, tokens: bytes, step: int) -> int:
        if salt != self._salt:
            return 0
        low, high = 0, min(len(tokens), len(self._tokens)) // step
        while low < high:
            middle = (low + high + 1) // 2
            if tokens[low * step : middle * step] == self._tokens[low * step : middle * step]:
                low = middle
            else:
                high = middle - 1
        return low
