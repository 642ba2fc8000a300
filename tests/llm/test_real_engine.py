"""LLM and AsyncLLM over the real engine with tiny models: text, stops, aborts, equality of the two."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from fixtures.smollm2 import needs_smollm2
from fixtures.tiny_models import computing_nan, smollm2_gguf, tiny_model
from kubeinfer import LLM, SamplingParams
from kubeinfer.async_llm import AsyncLLM
from kubeinfer.errors import KubeinferError
from kubeinfer.options import EngineOptions

PROMPTS = ["Hello, my name is", "The capital of France is", "你好，请介绍一下", "Once upon a time"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
OPTIONS = {"device": "cpu", "dtype": "float32", "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **OPTIONS) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(folder: Path) -> AsyncIterator[AsyncLLM]:
    made = await asyncio.to_thread(AsyncLLM, EngineOptions(model=str(folder), **OPTIONS))
    yield made
    made.shutdown()


def test_text_of_the_tokens(llm: LLM) -> None:
    for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False):
        assert len(out.outputs[0].token_ids) == 24
        whole = llm.get_tokenizer().decode(
            [*out.prompt_token_ids, *out.outputs[0].token_ids], skip_special_tokens=True
        )
        assert whole == str(out.prompt) + out.outputs[0].text


NOTHING_LEFT = SamplingParams(allowed_token_ids=[7], stop_token_ids=[7], min_tokens=3, max_tokens=5)


def test_a_request_that_leaves_no_token_fails_by_name_and_alone(llm: LLM) -> None:
    with pytest.raises(
        KubeinferError, match=r"no token has a score.* min_tokens of the request leave no token$"
    ):
        llm.generate(PROMPTS[:2], [NOTHING_LEFT, GREEDY], use_tqdm=False)
    assert len(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 24


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_that_computes_nan_says_so(folder: Path, tmp_path: Path, temperature: float) -> None:
    """And not the text of token 0."""
    broken = computing_nan(folder, tmp_path)
    params = SamplingParams(temperature=temperature, max_tokens=4, top_p=0.9)
    with (
        LLM(str(broken), **OPTIONS) as made,
        pytest.raises(KubeinferError, match=r"the model computed NaN, .*\(--dtype bfloat16 has none\)$"),
    ):
        made.generate(PROMPTS, params, use_tqdm=False)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_stream_ends_with_why_there_is_no_token(served: AsyncLLM) -> None:
    with pytest.raises(KubeinferError, match="no token has a score"):
        async for _ in served.generate(PROMPTS[0], NOTHING_LEFT, "none-left"):
            pass


def test_a_stop_string_gives_the_text_before_it(llm: LLM) -> None:
    plain = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for out in plain:
        text = out.outputs[0].text
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=stop)
        cut = llm.generate(str(out.prompt), params, use_tqdm=False)[0].outputs[0]
        assert cut.text == text[: text.index(stop)]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
        assert cut.token_ids == out.outputs[0].token_ids[: len(cut.token_ids)]
    assert llm.generate(PROMPTS, GREEDY, use_tqdm=False)[0].outputs[0].text == plain[0].outputs[0].text


def test_seeds_decide_what_is_drawn(llm: LLM) -> None:
    hot = SamplingParams(temperature=1.5, seed=11, max_tokens=16, n=2, ignore_eos=True)
    first, second = (llm.generate(PROMPTS[:1], hot, use_tqdm=False)[0].outputs for _ in range(2))
    assert [out.token_ids for out in first] == [out.token_ids for out in second]
    assert first[0].token_ids != first[1].token_ids


def test_bad_words_do_not_appear(llm: LLM) -> None:
    plain = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0]
    piece = llm.get_tokenizer().decode([plain.token_ids[3]]).strip()
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, bad_words=[piece])
    changed = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0]
    assert plain.token_ids[3] not in changed.token_ids


def test_logprobs_of_prompt_and_output(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    out = llm.generate(PROMPTS[1], params, use_tqdm=False)[0]
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    assert len(out.prompt_logprobs) == len(out.prompt_token_ids)
    for token_id, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:]):
        assert entry is not None
        assert token_id in entry
    for token_id, entry in zip(out.outputs[0].token_ids, out.outputs[0].logprobs or []):
        assert len(entry) == 3
        best = max(entry, key=lambda key: entry[key].logprob)
        assert (token_id, entry[token_id].rank) == (best, 1)
        assert entry[token_id].decoded_token == llm.get_tokenizer().decode([token_id])


@pytest.mark.asyncio(loop_scope="module")
async def test_streams_equal_the_offline_outputs(llm: LLM, served: AsyncLLM) -> None:
    expected = {out.prompt: out.outputs[0] for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)}

    async def read(prompt: str) -> tuple[str, list[int]]:
        text, ids = "", []
        async for part in served.generate(prompt, GREEDY, prompt):
            for out in part.outputs:
                text += out.text
                ids += out.token_ids
        return text, ids

    for prompt, (text, ids) in zip(PROMPTS, await asyncio.gather(*map(read, PROMPTS))):
        assert (text, ids) == (expected[prompt].text, expected[prompt].token_ids)


@pytest.mark.asyncio(loop_scope="module")
async def test_leaving_a_stream_frees_the_engine(served: AsyncLLM) -> None:
    streams = [
        await served.submit("Hello", SamplingParams(max_tokens=400, ignore_eos=True), str(at))
        for at in range(6)
    ]
    for stream in streams:
        await anext(stream)
        stream.close()
    async for _ in served.generate("a", SamplingParams(max_tokens=4, ignore_eos=True), "last"):
        pass
    await served._client.check_integrity()  # type: ignore[attr-defined]
    async for _ in served.generate("a", SamplingParams(max_tokens=4, ignore_eos=True), "after"):
        pass
    assert served.stats.num_running == 0
    assert served.stats.kv_cache_usage == 0
    assert served.death_reason is None


@needs_smollm2
def test_smollm2_knows_the_capital_of_france() -> None:
    path = smollm2_gguf()
    with LLM(str(path), device="cpu", max_model_len=512, kv_cache_memory_bytes=128 << 20) as llm:
        prompt = "The capital of France is"
        out = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)[0].outputs[
            0
        ]
        assert out.text.startswith(" Paris")
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        out = llm.chat(chat, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)[0].outputs[0]
        assert "Paris" in out.text
        assert out.finish_reason == "stop"


@pytest.mark.asyncio(loop_scope="module")
async def test_readers_that_leave_at_random_leak_nothing(served: AsyncLLM) -> None:
    draw = random.Random(5)

    async def one(at: int) -> int:
        params = SamplingParams(
            max_tokens=draw.randrange(1, 60),
            n=draw.choice([1, 1, 2]),
            stop=draw.choice([None, "e", "the"]),
            ignore_eos=True,
        )
        leave_after = draw.choice([0, 1, 3, 1000])
        await asyncio.sleep(draw.random() * 0.5)
        stream = await served.submit("Hello " * draw.randrange(1, 60), params, f"r{at}")
        seen = 0
        try:
            async for part in stream:
                seen += sum(len(out.token_ids) for out in part.outputs)
                if seen > leave_after:
                    break
        finally:
            stream.close()
        return seen

    await asyncio.gather(*(one(at) for at in range(150)))
    assert served.num_unfinished == 0
    assert served._output.num_unfinished == 0
    async for _ in served.generate("a", SamplingParams(max_tokens=2, ignore_eos=True), "last"):
        pass
    await served._client.check_integrity()  # type: ignore[attr-defined]
    async for _ in served.generate("a", SamplingParams(max_tokens=2, ignore_eos=True), "after"):
        pass
    assert (served.stats.num_running, served.stats.num_waiting, served.stats.kv_cache_usage) == (0, 0, 0)
