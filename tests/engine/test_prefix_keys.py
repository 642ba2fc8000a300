"""Keys of blocks are what their definition says, whatever was hashed before."""

from __future__ import annotations

from array import array
from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from kubeinfer.engine.messages import EngineRequest
from kubeinfer.engine.prefix_keys import PrefixKeys
from kubeinfer.engine.request import Request
from kubeinfer.sampling_params import SamplingParams


def request_of(tokens: list[int], salt: str | None) -> Request:
    given = EngineRequest(
        request_id="r",
        prompt_token_ids=tokens,
        params=SamplingParams(),
        seed=0,
        max_tokens=9,
        cache_salt=salt,
    )
    return Request(given, 0, 10**6)


def by_definition(tokens: list[int], salt: str | None, block_size: int, count: int) -> list[bytes]:
    keys, parent = [], (salt or "").encode()
    for i in range(count):
        parent = sha256(parent + array("q", tokens[i * block_size : (i + 1) * block_size]).tobytes()).digest()
        keys.append(parent)
    return keys


# Prompts that share beginnings of any length, as few different ids make them.
PROMPTS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), max_size=40), st.sampled_from([None, "a", "b"]), st.integers(0, 9)),
    max_size=8,
)


@given(PROMPTS, st.integers(1, 5))
def test_keys_are_the_chain_over_blocks(
    prompts: list[tuple[list[int], str | None, int]], block_size: int
) -> None:
    keys = PrefixKeys(block_size)
    for tokens, salt, more in prompts:
        request = request_of(tokens, salt)
        full = len(tokens) // block_size
        keys.extend(request, full // 2)
        assert request.block_hashes == by_definition(tokens, salt, block_size, full // 2)
        keys.extend(request, full)
        keys.extend(request, full // 2)  # never fewer
        assert request.block_hashes == by_definition(tokens, salt, block_size, full)
        # What it samples later makes keys too, which are no other's.
        request.token_ids += [1] * more
        full = len(request.token_ids) // block_size
        keys.extend(request, full)
        assert request.block_hashes == by_definition(request.token_ids, salt, block_size, full)


def test_a_long_beginning_in_common_is_hashed_once() -> None:
    keys = PrefixKeys(16)
    first, second, third = (request_of([7] * 1600 + [i] * 160, None) for i in range(3))
    for request in (first, second, third):
        keys.extend(request, 110)
    assert first.block_hashes[:100] == second.block_hashes[:100] == third.block_hashes[:100]
    assert all(a is b for a, b in zip(first.block_hashes[:100], third.block_hashes[:100], strict=True))
    assert len({first.block_hashes[-1], second.block_hashes[-1], third.block_hashes[-1]}) == 3
