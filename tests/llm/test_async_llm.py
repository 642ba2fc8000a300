"""AsyncLLM over an engine that replays tokens: deltas, back-pressure, aborts, death."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from kubeinfer.async_llm import AsyncLLM, RequestRecord
from kubeinfer.engine.messages import EngineStats
from kubeinfer.errors import EngineDeadError, ModelLoadError, QueueFullError, RequestError
from kubeinfer.options import EngineOptions
from kubeinfer.outputs import RequestOutput
from kubeinfer.sampling_params import SamplingParams
from llm.scripted import Script, ScriptedAsyncClient, echo

Make = Callable[..., tuple[AsyncLLM, ScriptedAsyncClient]]
LONG = SamplingParams(max_tokens=100)


@pytest.fixture
def make(folder: Path) -> Make:
    def build(script: Script = echo, **options: Any) -> tuple[AsyncLLM, ScriptedAsyncClient]:
        client = ScriptedAsyncClient(script)
        return AsyncLLM(EngineOptions(model=str(folder)), client, **options), client

    return build


async def collect(llm: AsyncLLM, prompt: Any, params: SamplingParams, name: str = "r") -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt, params, name)]


def text_of(parts: list[RequestOutput], index: int = 0) -> str:
    return "".join(out.text for part in parts for out in part.outputs if out.index == index)


def ids_of(parts: list[RequestOutput], index: int = 0) -> list[int]:
    return [token for part in parts for out in part.outputs if out.index == index for token in out.token_ids]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_deltas_add_up(make: Make) -> None:
    llm, _ = make()
    parts = await collect(llm, "Hello 你好", SamplingParams(max_tokens=12, prompt_logprobs=0))
    prompt = llm.tokenizer.encode("Hello 你好")
    assert ids_of(parts) == (prompt * 20)[:12]
    assert llm.tokenizer.decode([*prompt, *ids_of(parts)]) == "Hello 你好" + text_of(parts)
    assert parts[0].prompt_token_ids == prompt
    assert parts[0].prompt == "Hello 你好"
    assert len(parts[0].prompt_logprobs or []) == len(prompt)
    assert all(part.prompt_logprobs is None for part in parts[1:])
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].outputs[0].finish_reason == "length"
    assert llm.num_unfinished == 0


async def test_many_streams_at_once(make: Make) -> None:
    llm, _ = make()
    prompts = [[5 + index, 6, 7] for index in range(50)]
    params = SamplingParams(max_tokens=20, n=2)
    results = await asyncio.gather(
        *(collect(llm, prompt, params, str(at)) for at, prompt in enumerate(prompts))
    )
    for prompt, parts in zip(prompts, results):
        assert ids_of(parts, 0) == ids_of(parts, 1) == (prompt * 20)[:20]
        assert sum(part.finished for part in parts) == 1


async def test_first_tokens_come_ahead_of_the_running_streams(make: Make) -> None:
    llm, client = make()
    arrived: list[str] = []

    came = arrived.append

    async def read(name: str) -> None:
        async for _ in llm.generate([5, 6, 7], LONG, name):
            came(name)

    client.allow(2)
    names = [f"running {index}" for index in range(70)]
    tasks = [asyncio.create_task(read(name)) for name in names]
    await settle()
    assert sorted(arrived) == sorted([*names, *names])
    arrived.clear()
    tasks.append(asyncio.create_task(read("new")))
    await settle()
    client.allow(1)
    await settle()
    assert arrived == ["new", *names]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_slow_reader_gets_merged_deltas(make: Make) -> None:
    llm, client = make()
    async with aclosing(llm.generate("Hello", SamplingParams(max_tokens=30), "slow")) as slow:
        first = await anext(slow)
        fast = await collect(llm, "Hello", SamplingParams(max_tokens=60), "fast")
        rest = [part async for part in slow]
    assert len(fast) > 50
    assert len(rest) == 1  # all that came meanwhile, in one
    assert len(first.outputs[0].token_ids) + len(rest[0].outputs[0].token_ids) == 30
    assert client.replay.aborted == []


async def test_a_stop_string_ends_the_stream_and_the_engine_s_work(make: Make) -> None:
    llm, client = make()
    params = SamplingParams(max_tokens=100, stop="wor", n=2)
    parts = await collect(llm, "ab world", params)
    assert text_of(parts) == text_of(parts, 1) == "ab "
    assert parts[-1].finished
    assert {out.stop_reason for part in parts for out in part.outputs if out.finish_reason} == {"wor"}
    await settle()
    assert sorted(client.replay.aborted) == ["r#0", "r#1"]


async def test_leaving_early_aborts_at_once(make: Make) -> None:
    llm, client = make()
    generator = llm.generate("Hello", LONG, "r")
    await anext(generator)
    await generator.aclose()
    await settle()
    assert client.replay.aborted == ["r"]
    assert not client.replay.running
    assert llm.num_unfinished == 0


async def test_cancelling_the_reader_aborts(make: Make) -> None:
    llm, client = make()
    client.allow(3)
    task = asyncio.create_task(collect(llm, "Hello", LONG))
    await settle()
    assert llm.num_unfinished == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settle()
    assert client.replay.aborted == ["r"]
    assert llm.num_unfinished == 0


async def test_abort_by_id_and_of_all_end_the_streams(make: Make) -> None:
    llm, client = make()
    client.allow(2)
    tasks = [asyncio.create_task(collect(llm, "Hello", LONG, name)) for name in "abc"]
    await settle()
    await llm.abort("b")
    await llm.abort("unknown")
    parts = await tasks[1]
    assert parts[-1].finished
    assert parts[-1].outputs[0].finish_reason == "abort"
    assert llm.num_unfinished == 2
    await llm.abort_all()
    for task in (tasks[0], tasks[2]):
        assert (await task)[-1].outputs[0].finish_reason == "abort"
    await settle()
    assert sorted(client.replay.aborted) == ["a", "b", "c"]


async def test_requests_that_cannot_be_served_never_reach_the_engine(make: Make) -> None:
    llm, client = make()
    with pytest.raises(RequestError, match="max_model_len"):
        await collect(llm, [5] * 500, LONG)
    with pytest.raises(RequestError, match="max_model_len"):
        await collect(llm, "ab " * 2000, LONG)  # tokenized in a thread
    stream = await llm.submit("Hello", LONG, "same")
    with pytest.raises(RequestError, match="in use"):
        await llm.submit("Hello", LONG, "same")
    with pytest.raises(RequestError, match="in use"):
        await llm.submit("Hello", SamplingParams(n=2), "same")
    stream.close()
    stream.close()
    assert [request.request_id for request in client.replay.seen] == ["same"]
    assert llm.num_unfinished == 0
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_the_queue_is_bounded(make: Make) -> None:
    llm, client = make(max_waiting_requests=2)
    client.allow(0)
    streams = [await llm.submit("Hello", LONG, name) for name in "ab"]
    with pytest.raises(QueueFullError, match="max_waiting_requests") as caught:
        await llm.submit("Hello", LONG, "c")
    assert caught.value.retry_after >= 1
    streams[0].close()
    (await llm.submit("Hello", LONG, "c")).close()
    streams[1].close()


async def test_long_prompts_do_not_hold_up_the_event_loop(make: Make) -> None:
    llm, _ = make()
    text = "The quick brown fox jumps over the lazy dog. " * 40_000
    params = SamplingParams(max_tokens=1, truncate_prompt_tokens=50)
    task = asyncio.create_task(collect(llm, text, params))
    turns = 0
    while not task.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert (await task)[-1].finished
    assert turns > 20


async def test_death_of_the_engine_reaches_every_stream(make: Make) -> None:
    llm, client = make()
    records: list[RequestRecord] = []
    llm.on_request_finished = records.append
    client.allow(2)
    tasks = [asyncio.create_task(collect(llm, "Hello", LONG, name)) for name in "ab"]
    unread = await llm.submit("Hello", LONG, "c")
    await settle()
    client.die("out of memory")
    for task in tasks:
        with pytest.raises(EngineDeadError, match="out of memory"):
            await task
    with pytest.raises(EngineDeadError, match="out of memory"):
        await anext(unread)
    with pytest.raises(EngineDeadError, match="out of memory"):
        await collect(llm, "Hello", LONG)
    assert llm.death_reason == "out of memory"
    assert llm.num_unfinished == 0
    assert [record.finish_reason for record in records] == ["error"] * 3


async def test_a_fault_while_taking_in_outputs_is_a_death_with_a_cause(make: Make) -> None:
    llm, _ = make()

    def broken(stats: EngineStats) -> None:
        raise RuntimeError("hook broke")

    llm.on_stats = broken
    with pytest.raises(EngineDeadError, match="RuntimeError: hook broke"):
        await collect(llm, "Hello", LONG)


async def test_hooks_see_stats_and_finished_requests(make: Make) -> None:
    llm, _ = make()
    stats: list[EngineStats] = []
    records: list[RequestRecord] = []
    llm.on_stats = stats.append
    llm.on_request_finished = records.append
    await collect(llm, "Hello", SamplingParams(max_tokens=5, n=2), "x")
    assert [record.request_id for record in records] == ["x"]
    record = records[0]
    assert record.finish_reasons == ["length", "length"]
    assert (record.num_prompt_tokens, record.num_output_tokens) == (len(llm.tokenizer.encode("Hello")), 10)
    assert record.arrival_time <= record.scheduled_time
    assert record.first_token_time <= record.last_token_time <= record.finished_time
    assert len(record.inter_token_times) == 8
    assert all(seconds >= 0 for seconds in record.inter_token_times)
    assert stats[-1] == llm.stats
    assert llm.stats.num_steps >= 5


async def test_prompt_priority_and_salt_reach_the_engine(make: Make) -> None:
    llm, client = make()
    llm.input_processor._by_priority = True
    async for _ in llm.generate("Hello", SamplingParams(max_tokens=1), "r", priority=3, cache_salt="s"):
        pass
    request = client.replay.seen[0]
    assert (request.priority, request.cache_salt) == (3, "s")
    assert request.eos_token_ids == [1, 3]
    assert llm.default_sampling_params == {"temperature": 0.6, "top_k": 20}


async def test_shutdown_ends_streams_and_the_engine(make: Make) -> None:
    llm, client = make()
    client.allow(1)
    task = asyncio.create_task(collect(llm, "Hello", LONG))
    await settle()
    await llm.reset_prefix_cache()
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        await task
    assert (client.closed, client.resets) == (1, 1)


def test_a_tokenizer_that_cannot_be_loaded_stops_the_engine(folder: Path, tmp_path: Path) -> None:
    client = ScriptedAsyncClient()
    with pytest.raises(ModelLoadError):
        AsyncLLM(EngineOptions(model=str(folder), tokenizer=str(tmp_path)), client)
    assert client.closed == 1
