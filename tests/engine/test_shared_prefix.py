"""Which decode rows share a prefix: found right, and right to use, in the real engine."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fixtures.tiny_models import tiny_model
from kubeinfer.engine.client import make_client
from kubeinfer.engine.messages import EngineRequest
from kubeinfer.engine.plan import NewRow, StepPlan
from kubeinfer.kernels.attention import paged_attention
from kubeinfer.kernels.shared_prefix import SharedPrefix, prefix_attention_reference
from kubeinfer.layers import attention
from kubeinfer.options import EngineOptions
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.worker.shared_prefix import SharedPrefixFinder
from kubeinfer.worker.tables import RowTables

SIZE = 16


def finder(rows: list[list[int]], **thresholds: int) -> SharedPrefixFinder:
    """Over tables that hold the block ids of ``rows``."""
    tables = RowTables(len(rows), max(len(ids) for ids in rows) + 1, torch.device("cpu"))
    for i, ids in enumerate(rows):
        tables.block_table[i, : len(ids)] = ids
    found = SharedPrefixFinder(tables, SIZE, bytes_per_token=1)
    settings = {"min_batch": 4, "min_members": 2, "min_tokens": 2 * SIZE, "min_saved_bytes": 1, **thresholds}
    for name, value in settings.items():
        setattr(found, name, value)
    return found


def blocks(path: list[int], fresh: Any, own: int) -> list[int]:
    return [*path, *(next(fresh) for _ in range(own))]


def starts_of(rows: list[list[int]], inside: int = 3) -> Any:
    """Every row's query is in its last block."""
    return np.array([(len(ids) - 1) * SIZE + inside for ids in rows], np.int32)


def test_the_common_blocks_of_all_rows() -> None:
    fresh = iter(range(100, 10**6))
    rows = [blocks([7, 3, 9, 4, 8], fresh, 1 + i % 3) for i in range(6)]
    found = finder(rows).find(np.arange(6, dtype=np.int32), starts_of(rows))
    assert found is not None
    assert found.members.tolist() == list(range(6))
    assert found.tokens == 5 * SIZE


def test_members_are_indices_of_the_step_not_rows_of_the_tables() -> None:
    fresh = iter(range(100, 10**6))
    rows = [blocks([7, 3, 9] if i % 2 else [], fresh, 4) for i in range(8)]
    order = np.array([6, 1, 3, 0, 7], np.int32)
    found = finder(rows).find(order, starts_of(rows)[order])
    assert found is not None
    assert found.members.tolist() == [1, 2, 4]
    members, tokens = np.full(5, -1, np.int32), np.zeros(5, np.int32)
    found.fill(members, tokens)
    assert members.tolist() == [1, 2, 4, -1, -1]
    assert tokens.tolist() == [0, 48, 48, 0, 48]


def test_rows_that_share_little_do_not_spoil_what_others_share() -> None:
    """A chat template's first blocks are common to all, a system prompt to some."""
    fresh = iter(range(100, 10**6))
    system = [1, 2, *range(30, 70)]
    rows = [blocks(system, fresh, 2) for _ in range(9)] + [blocks([1, 2], fresh, 50) for _ in range(3)]
    found = finder(rows).find(np.arange(12, dtype=np.int32), starts_of(rows))
    assert found is not None
    assert found.members.tolist() == list(range(9))
    assert found.tokens == len(system) * SIZE


def test_the_group_that_saves_most_is_taken() -> None:
    fresh = iter(range(100, 10**6))
    many = [blocks([1, 2, 3], fresh, 1) for _ in range(8)]
    long = [blocks(list(range(20, 60)), fresh, 1) for _ in range(4)]
    found = finder(many + long).find(np.arange(12, dtype=np.int32), starts_of(many + long))
    assert found is not None
    assert found.members.tolist() == [8, 9, 10, 11]
    assert found.tokens == 40 * SIZE


def test_the_block_that_a_query_is_written_to_is_nobodys_prefix() -> None:
    fresh = iter(range(100, 10**6))
    rows = [blocks([1, 2, 3], fresh, 1) for _ in range(5)]
    starts = np.full(5, 3 * SIZE, np.int32)
    found = finder(rows).find(np.arange(5, dtype=np.int32), starts)
    assert found is not None
    assert found.tokens == 3 * SIZE


@pytest.mark.parametrize(
    "thresholds",
    [{"min_batch": 7}, {"min_members": 7}, {"min_tokens": 4 * SIZE}, {"min_saved_bytes": 5 * 3 * SIZE + 1}],
)
def test_what_does_not_pay_is_left(thresholds: dict[str, int]) -> None:
    fresh = iter(range(100, 10**6))
    rows = [blocks([1, 2, 3], fresh, 2) for _ in range(6)]
    assert finder(rows).find(np.arange(6, dtype=np.int32), starts_of(rows)) is not None
    assert finder(rows, **thresholds).find(np.arange(6, dtype=np.int32), starts_of(rows)) is None


def test_the_same_rows_are_not_searched_again_until_one_is_anothers() -> None:
    fresh = iter(range(100, 10**6))
    rows = [blocks([1, 2, 3], fresh, 2) for _ in range(6)]
    searching = finder(rows)
    order, starts = np.arange(6, dtype=np.int32), starts_of(rows)
    first = searching.find(order, starts)
    assert searching.find(order.copy(), starts + 1) is first
    assert searching.find(order[:5], starts[:5]) is not first
    again = searching.find(order, starts)
    new = NewRow(2, [5] * 40, 40, SamplingParams(), 0, [501, 502, 503], [], 64)
    searching.tables.apply(StepPlan(0, [], [], [], 0, [], [new], [], []))
    found = searching.find(order, starts)
    assert found is not again
    assert found is not None
    assert found.members.tolist() == [0, 1, 3, 4, 5]


@given(st.data())
def test_what_is_found_is_shared(data: st.DataObject) -> None:
    """Random trees of prefixes."""
    fresh = iter(range(1, 10**6))
    paths: list[list[int]] = [[]]
    for _ in range(data.draw(st.integers(1, 6))):
        parent = data.draw(st.sampled_from(paths))
        paths.append(blocks(parent, fresh, data.draw(st.integers(1, 9))))
    rows = [
        blocks(data.draw(st.sampled_from(paths)), fresh, data.draw(st.integers(1, 4)))
        for _ in range(data.draw(st.integers(4, 24)))
    ]
    starts = starts_of(rows, data.draw(st.integers(0, SIZE - 1)))
    found = finder(rows).find(np.arange(len(rows), dtype=np.int32), starts)
    depth = 2
    pairs = [ids[:depth] for ids, start in zip(rows, starts) if start >= depth * SIZE]
    if found is None:
        assert all(pairs.count(pair) == 1 for pair in pairs)
        return
    assert found.tokens % SIZE == 0
    assert found.tokens >= depth * SIZE
    assert len(found.members) >= 2
    common = {tuple(rows[i][: found.tokens // SIZE]) for i in found.members}
    assert len(common) == 1
    assert all(starts[i] >= found.tokens for i in found.members)
    left = [i for i in range(len(rows)) if i not in found.members and starts[i] >= found.tokens]
    assert all(tuple(rows[i][: found.tokens // SIZE]) not in common for i in left)


def attention_in_two_parts(calls: list[int]) -> Any:
    """`paged_attention` that takes a step's shared prefix at its word: members read the first member's blocks for it."""

    def attend(
        q: Tensor, cache: Tensor, query_start: Tensor, seq_lens: Tensor, table: Tensor, out: Tensor, **options: Any
    ) -> Tensor:  # fmt: skip
        shared: SharedPrefix | None = options.pop("shared")
        paged_attention(q, cache, query_start, seq_lens, table, out, **options)
        if shared is None:
            return out
        assert len(shared.members) == options["num_decodes"]
        prefix, prefix_lse = prefix_attention_reference(q, cache, table, shared, scale=options["scale"])
        for row in shared.members[shared.members >= 0].tolist():
            start, end = int(shared.tokens[row]), int(seq_lens[row])
            assert 0 < start < end
            slots = torch.arange(start, end)
            pages = cache[:, table[row, slots // SIZE].long(), :, slots % SIZE]  # [own, 2, Hk, D]
            k, v = pages.repeat_interleave(q.shape[1] // cache.shape[2], 2).unbind(1)
            logits = torch.einsum("hd,mhd->hm", q[row], k) * options["scale"]
            own_lse = logits.logsumexp(-1) * 1.4426950408889634
            own = torch.einsum("hm,mhd->hd", logits.softmax(-1), v)
            weight = torch.sigmoid((prefix_lse[row] - own_lse) / 1.4426950408889634)[:, None]
            joined = prefix[row] * weight + own * (1 - weight)
            torch.testing.assert_close(joined, out[row], atol=1e-5, rtol=1e-4)
            out[row] = joined
            calls.append(start)
        return out

    return attend


@pytest.mark.parametrize("small", [False, True])
def test_members_of_real_steps_hold_the_same_prefix(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU engine, told by its real scheduler and tables who shares what; ``small``: with preemptions."""
    calls: list[int] = []
    options: dict[str, Any] = {"num_gpu_blocks_override": 24, "max_model_len": 128} if small else {}
    rng = random.Random(3)
    prefix = [rng.randrange(5, 500) for _ in range(70)]
    prompts = [prefix + [rng.randrange(5, 500) for _ in range(rng.randrange(1, 20))] for _ in range(9)]
    prompts[4:6] = [[rng.randrange(5, 500) for _ in range(40)] for _ in range(2)]

    def generate(shares: bool) -> list[list[int]]:
        client = make_client(
            EngineOptions(
                model=str(tiny_model("llama")), device="cpu", dtype="float32", max_num_seqs=8, block_size=SIZE, **options
            )
        )  # fmt: skip
        runner = client.core.executor.worker.runner  # type: ignore[attr-defined]
        if shares:
            monkeypatch.setattr(attention, "paged_attention", attention_in_two_parts(calls))
            found = SharedPrefixFinder(runner.tables, SIZE, bytes_per_token=1)
            found.min_batch, found.min_members, found.min_tokens, found.min_saved_bytes = 3, 2, 32, 1
            runner.shared_prefixes = found
        tokens: dict[str, list[int]] = {}
        for batch in (prompts[:1], prompts):
            for i, prompt in enumerate(batch):
                params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
                request = EngineRequest(
                    request_id=f"{len(batch)} {i}",
                    prompt_token_ids=prompt,
                    params=params,
                    seed=0,
                    max_tokens=20,
                )
                client.add_requests([request])
            while client.has_unfinished_requests():
                for output in client.step().outputs:
                    tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
        client.core.check_integrity()  # type: ignore[attr-defined]
        if small:
            assert client.core.scheduler.num_preemptions > 0  # type: ignore[attr-defined]
        client.shutdown()
        return [tokens[name] for name in sorted(tokens)]

    expected = generate(False)
    assert generate(True) == expected
    assert calls
    assert set(calls) == {64}
