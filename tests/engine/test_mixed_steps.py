"""Captured steps with prompts: which shape is picked, how its inputs are padded, and that padding changes no token.

On a CPU the shapes' own code runs, not captured.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.tiny_models import tiny_model
from kubeinfer.engine.client import make_client
from kubeinfer.engine.messages import EngineRequest
from kubeinfer.engine.plan import StepPlan
from kubeinfer.options import EngineOptions
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.worker.mixed_graph import CHUNKS, ROWS, MixedGraphs
from kubeinfer.worker.model_runner import ModelRunner
from kubeinfer.worker.shared_prefix import SharedBlocks
from kubeinfer.worker.tables import RowTables

CPU = torch.device("cpu")
BLOCK = 16


def graphs_of(max_rows: int, max_tokens: int, tables: RowTables | None = None) -> MixedGraphs:
    """Shapes without a model."""
    tables = tables or RowTables(max_rows, 160, CPU)
    return MixedGraphs(None, tables, [], None, 8, torch.float32, BLOCK, max_rows, max_tokens)


@given(
    st.integers(1, 300), st.integers(2, 4096), st.integers(0, 300), st.integers(1, 2100), st.integers(0, 10)
)
def test_the_smallest_shape_that_holds_a_step_is_picked(
    max_rows: int, max_tokens: int, decodes: int, chunk_tokens: int, chunks: int
) -> None:
    picked = graphs_of(max_rows, max_tokens).pick(decodes, chunk_tokens, chunks)
    sizes = {(min(rows, max_tokens), min(most, max_rows)) for most in ROWS for rows in ROWS[most]}
    possible = [
        (rows, most) for rows, most in sizes if rows > most >= decodes and rows >= decodes + chunk_tokens
    ]
    if not possible or not 1 <= chunks <= CHUNKS:
        assert picked is None
    else:
        assert picked == min(possible)[::-1]


def test_a_shape_has_room_for_its_decodes_and_a_chunk() -> None:
    """Otherwise its decodes' attention would reach past its tokens."""
    assert all(rows > decodes for decodes, sizes in ROWS.items() for rows in sizes)
    assert all(list(sizes) == sorted(set(sizes)) for sizes in ROWS.values())
    assert sum(len(sizes) for sizes in ROWS.values()) <= 52


@st.composite
def plans(draw: st.DrawFn) -> tuple[StepPlan, RowTables]:
    """A step of some decodes and chunks of random rows, and tables that know them."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    max_rows = draw(st.sampled_from([9, 40, 200]))
    tables = RowTables(max_rows, 40, CPU)
    tables.block_table[:max_rows] = np.arange(1, 40 * max_rows + 1).reshape(max_rows, 40)
    decodes = draw(st.integers(0, max_rows - 1))
    chunks = draw(st.integers(1, min(CHUNKS, max_rows - decodes)))
    rows = rng.sample(range(max_rows), decodes + chunks)
    lengths = [1] * decodes + [rng.randint(1, rng.choice([1, 20, 250])) for _ in range(chunks)]
    starts = [rng.randrange(0, 640 - n) for n in lengths]
    for row in rows:
        tables.tokens[row] = np.array([rng.randrange(1000) for _ in range(640)], np.int32)
    sampled = [i for i in range(len(rows)) if i < decodes or rng.random() < 0.6]
    return StepPlan(1, rows, starts, lengths, decodes, sampled, [], [], []), tables


@settings(deadline=None)
@given(plans())
def test_a_padded_steps_inputs_are_the_eager_steps(case: tuple[StepPlan, RowTables]) -> None:
    plan, tables = case
    graphs = graphs_of(tables.spare_row, 2048, tables)
    decodes, chunks = plan.num_decodes, len(plan.rows) - plan.num_decodes
    key = graphs.pick(decodes, sum(plan.num_tokens[decodes:]), chunks)
    assert key is not None
    shape = graphs._shapes[key]
    rows, starts = np.array(plan.rows, np.int32), np.array(plan.starts, np.int32)
    buffer = np.full(shape.packing.size, -7, np.int32)  # whatever the memory held before
    real = graphs._fill(shape, buffer, plan, rows, starts)
    got = shape.packing.host_views(buffer)
    runner: Any = SimpleNamespace(tables=tables, block_size=BLOCK)
    want = ModelRunner._host_inputs(runner, plan, rows, starts)

    total = len(want["ids"])
    ends = want["query_start"][1:]
    for name, padding in (("ids", 0), ("positions", 0), ("slots", -1)):
        expected = want[name].copy()
        if name == "ids":
            expected[:decodes] = -1
        assert got[name][:total].tolist() == expected.tolist(), name
        assert set(got[name][total:].tolist()) <= {padding}, name
    seqs = np.arange(len(rows))
    places = np.where(seqs < decodes, seqs, seqs + shape.decodes - decodes)
    unused = np.setdiff1d(np.arange(shape.decodes + CHUNKS), places)
    for name, expected, padding in (
        ("rows", rows, tables.spare_row), ("seq_lens", want["seq_lens"], 0), ("last", ends - 1, 0)
    ):  # fmt: skip
        assert got[name][places].tolist() == expected.tolist(), name
        assert set(got[name][unused].tolist()) <= {padding}, name
    lengths = np.diff(got["query_start"])
    assert got["query_start"][0] == 0
    assert (got["query_start"][places + 1] == ends).all()
    assert lengths[places].tolist() == plan.num_tokens
    assert not lengths[unused].any()
    assert real.tolist() == places[plan.sampled].tolist()
    stored = {int(i): int(r) for i, r in enumerate(got["store_rows"]) if r != tables.spare_row}
    assert stored == {int(places[i]): plan.rows[i] for i in plan.sampled}


def test_what_decodes_share_is_of_the_step_at_hand() -> None:
    tables = RowTables(128, 40, CPU)
    graphs = MixedGraphs(None, tables, [], None, 8, torch.float32, BLOCK, 128, 512, shares_prefixes=True)
    shape = graphs._shapes[120, 192]
    assert "members" not in graphs._shapes[56, 192].fields
    tables.tokens[40] = np.arange(30, dtype=np.int32)
    plan = StepPlan(1, list(range(41)), [300] * 40 + [0], [1] * 40 + [30], 40, list(range(41)), [], [], [])
    rows, starts = np.arange(41, dtype=np.int32), np.array(plan.starts, np.int32)
    buffer = np.full(shape.packing.size, 5, np.int32)
    group = np.arange(3, 30)
    for shared in (SharedBlocks(group, 256), None):
        graphs._fill(shape, buffer, plan, rows, starts, shared)
        fields = shape.packing.host_views(buffer)
        of_all = shared is not None
        assert fields["members"].tolist() == (group.tolist() if of_all else []) + [-1] * (
            93 if of_all else 120
        )
        assert np.flatnonzero(fields["shared_tokens"]).tolist() == (group.tolist() if of_all else [])
        assert set(fields["shared_tokens"]) == ({0, 256} if of_all else {0})


@dataclass
class Traffic:
    """Requests that come in bursts beside those that run, so that steps have decodes and several chunks."""

    max_num_seqs: int
    options: dict[str, Any] = field(default_factory=dict)
    steps: list[tuple[int, int, int]] = field(default_factory=list)  # padded: decodes, chunks, sampled chunks

    def run(self, name: str, padded: bool) -> dict[str, Any]:
        client: Any = make_client(
            EngineOptions(
                model=str(tiny_model(name)), device="cpu", dtype="float32", kv_cache_memory_bytes=2**24,
                max_num_seqs=self.max_num_seqs, max_model_len=256, **self.options,
            )
        )  # fmt: skip
        worker = client.core.executor.worker
        runner: ModelRunner = worker.runner
        if padded:
            runner.mixed_graphs = MixedGraphs(
                runner.model, runner.tables, runner.kv_caches, None, runner.model.config.vocab_size, torch.float32,
                runner.block_size, self.max_num_seqs, worker.max_tokens,
            )  # fmt: skip
            replay = runner.mixed_graphs.replay

            def noted(key: tuple[int, int], plan: StepPlan, *args: Any) -> Any:
                d = plan.num_decodes
                self.steps.append((d, len(plan.rows) - d, len(plan.sampled) - d))
                return replay(key, plan, *args)

            runner.mixed_graphs.replay = noted  # type: ignore[assignment, method-assign]
        rng = random.Random(5)
        kinds: list[dict[str, Any]] = [
            {}, {}, {"temperature": 0.9, "top_p": 0.9}, {"temperature": 1.1, "top_k": 30, "logprobs": 2},
            {"logprobs": 1}, {"repetition_penalty": 1.3}, {"temperature": 0.7, "presence_penalty": 0.4},
        ]  # fmt: skip
        found: dict[str, Any] = {}
        number = 0
        while number < 60 or client.has_unfinished_requests():
            if number < 60 and (rng.random() < 0.4 or not client.has_unfinished_requests()):
                for _ in range(rng.choice([1, 1, 2, 3, 5])):
                    prompt = [rng.randrange(5, 500) for _ in range(rng.choice([1, 5, 17, 60, 140]))]
                    count = rng.randrange(1, 20)
                    params = {"temperature": 0.0, "seed": number, **kinds[number % len(kinds)]}
                    sampling = SamplingParams(max_tokens=count, ignore_eos=True, **params)
                    request = EngineRequest(
                        request_id=str(number), prompt_token_ids=prompt, params=sampling, seed=number, max_tokens=count
                    )  # fmt: skip
                    client.add_requests([request])
                    number += 1
            for output in client.step().outputs:
                found.setdefault(output.request_id, []).append((output.new_token_ids, output.logprobs))
        client.core.check_integrity()
        client.shutdown()
        return found


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "opt"])
@pytest.mark.parametrize(
    "traffic",
    [
        Traffic(16),
        Traffic(60, {"max_num_batched_tokens": 200, "enable_prefix_caching": False}),
        Traffic(20, {"max_num_batched_tokens": 70, "num_gpu_blocks_override": 90, "block_size": 16}),
    ],
    ids=["whole prompts", "parts of prompts", "a small cache"],
)
def test_bursts_of_prompts_get_the_same_tokens_from_padded_steps(name: str, traffic: Traffic) -> None:
    traffic.steps.clear()
    want, got = traffic.run(name, False), traffic.run(name, True)
    assert len(traffic.steps) > 10
    assert any(d and c > 1 for d, c, _ in traffic.steps)  # several prompts beside decodes
    assert traffic.options.get("max_num_batched_tokens") is None or any(
        s < c for _, c, s in traffic.steps
    )  # a prompt's part
    assert got.keys() == want.keys()
    for request in want:
        assert [t for t, _ in got[request]] == [t for t, _ in want[request]], request
        for (_, ours), (_, theirs) in zip(got[request], want[request]):
            assert (ours is None) == (theirs is None)
            for a, b in zip(ours or (), theirs or ()):
                assert a.token_ids == b.token_ids
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
