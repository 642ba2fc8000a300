"""Greedy output is transformers', token for token in float32, for every architecture and whatever runs beside a request."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from fixtures.reference import assert_greedy, random_prompts, reference_logits, reference_model
from fixtures.smollm2 import needs_smollm2, smollm2_reference
from fixtures.tiny_models import TINY_MODELS, VOCAB_SIZE, smollm2_gguf, tiny_model
from kubeinfer import LLM, SamplingParams

# Around the block size (16 or 32), around the sliding windows (16), one token, and long enough for every rope scaling.
LENGTHS = [1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 130, 160, 200]
NUM_PROMPTS = 51
PROMPTS = random_prompts(NUM_PROMPTS, LENGTHS, VOCAB_SIZE)
SOME = PROMPTS[::2]  # still one and more of every length
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)

# One model of each kind of attention; the others differ in their weights' layout or their rotary table only.
VARIED = ["llama", "mistral", "qwen2-sliding", "qwen3", "opt", "llama-yarn"]


def engine(name: str, **options) -> LLM:
    options = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 32 << 20} | options
    return LLM(str(tiny_model(name)), **options)


def outputs(llm: LLM, prompts=PROMPTS, params=GREEDY, **kwargs) -> list[list[int]]:
    return [list(r.outputs[0].token_ids) for r in llm.generate(prompts, params, use_tqdm=False, **kwargs)]


_plain: dict[str, list[list[int]]] = {}


def plain(name: str) -> list[list[int]]:
    """Outputs of ``PROMPTS`` in one ordinary batch, checked against transformers."""
    if name not in _plain:
        with engine(name) as llm:
            got = outputs(llm)
            llm._client.check_integrity()
        model = reference_model(tiny_model(name))
        ties = assert_greedy(model, PROMPTS, got, name)
        assert ties <= 2, f"{name}: {ties} ties in {NUM_PROMPTS} prompts"
        _plain[name] = got
    return _plain[name]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_greedy_equals_transformers(name):
    got = plain(name)
    assert all(len(tokens) == GREEDY.max_tokens for tokens in got)
    # Outputs that repeat one token would prove little.
    assert sum(len(set(tokens)) for tokens in got) / len(got) > 5


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_transformers_own_decoding_agrees(name):
    """The reference above is one pass; a few prompts through generate(), with transformers' cache and its stopping."""
    model = reference_model(tiny_model(name))
    params = SamplingParams(temperature=0.0, max_tokens=40)
    prompts = PROMPTS[3:9]
    with engine(name) as llm:
        got = outputs(llm, prompts, params)
    for prompt, tokens in zip(prompts, got):
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=40,
        )[0, len(prompt) :]  # fmt: skip
        assert tokens == expected.tolist()


@pytest.mark.parametrize("layout", ["sharded", "bin", "bin-sharded"])
@pytest.mark.parametrize("name", ["llama-tied", "opt"])
def test_every_checkpoint_layout(name, layout):
    with LLM(
        str(tiny_model(name, layout=layout)),
        dtype="float32",
        max_model_len=256,
        kv_cache_memory_bytes=8 << 20,
    ) as llm:
        assert outputs(llm, PROMPTS[:12]) == plain(name)[:12]


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_num_seqs": 1}, id="one-at-a-time"),
        pytest.param({"max_num_seqs": 5, "max_num_batched_tokens": 16, "block_size": 8}, id="small-chunks"),
        pytest.param(
            {"max_num_batched_tokens": 96, "long_prefill_token_threshold": 24}, id="long-prefill-threshold"
        ),
        pytest.param({"enable_chunked_prefill": False, "enable_prefix_caching": False}, id="whole-prompts"),
    ],
)
def test_batches_and_chunks_do_not_change_outputs(name, options):
    count = 12 if options.get("max_num_seqs") == 1 else len(SOME)
    with engine(name, **options) as llm:
        assert outputs(llm, SOME[:count]) == plain(name)[::2][:count]
        llm._client.check_integrity()


@pytest.mark.parametrize("name", VARIED)
def test_preemption_does_not_change_outputs(name):
    with engine(name, block_size=8, num_gpu_blocks_override=34, max_num_batched_tokens=64) as llm:
        core = llm._client.core
        assert outputs(llm, SOME) == plain(name)[::2]
        assert core.scheduler.stats().num_preemptions > 5
        assert core.scheduler.stats().kv_cache_usage == 0
        core.check_integrity()


@pytest.mark.parametrize("name", VARIED)
def test_prefix_hits_do_not_change_outputs(name):
    """Prompts again, cut short, and grown by their outputs: all meet blocks in the cache."""
    expected = plain(name)[::2]
    with engine(name, block_size=8, max_num_batched_tokens=512) as llm:
        assert outputs(llm, SOME) == expected
        again = llm.generate(SOME, GREEDY, use_tqdm=False)
        assert [list(r.outputs[0].token_ids) for r in again] == expected
        hits = [r.num_cached_tokens for r in again]
        assert [hit for hit, prompt in zip(hits, SOME)] == [(len(p) - 1) // 8 * 8 for p in SOME]
        grown = [prompt + tokens[:12] for prompt, tokens in zip(SOME, expected)]
        assert [tokens[:8] for tokens in outputs(llm, grown)] == [tokens[12:] for tokens in expected]
        # a beginning in common with a cached prompt, then another way on
        forks = [[*prompt[: len(prompt) // 2], 5, 9] for prompt in SOME]
        forked = outputs(llm, forks)
        llm._client.check_integrity()
    model = reference_model(tiny_model(name))
    assert_greedy(model, forks, forked, f"{name}, fork")


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_order_priority_and_company_do_not_change_outputs(name):
    """Shuffled, by priority, with sampled requests of other lengths between, under a small budget and a small cache."""
    rng = random.Random(7)
    order = list(range(NUM_PROMPTS))
    rng.shuffle(order)
    company = random_prompts(NUM_PROMPTS, [3, 40, 90], VOCAB_SIZE, seed=8)
    prompts = [prompt for index in order for prompt in (PROMPTS[index], company[index])]
    params = [
        p
        for index in order
        for p in (GREEDY, SamplingParams(temperature=1.5, seed=index, max_tokens=1 + index % 24))
    ]
    with engine(
        name, block_size=16, num_gpu_blocks_override=20, max_num_batched_tokens=80, max_num_seqs=12,
        scheduling_policy="priority",
    ) as llm:  # fmt: skip
        got = outputs(llm, prompts, params, priority=[rng.randrange(4) for _ in prompts])[::2]
        llm._client.check_integrity()
    assert got == [plain(name)[index] for index in order]


def test_salted_requests_share_nothing():
    """Equal prompts hit each other's blocks only under the same salt."""
    from kubeinfer.engine.messages import EngineRequest

    with engine("llama", block_size=8) as llm:
        client = llm._client
        hits = []
        for index, salt in enumerate([None, "a", "a", "b", None]):
            client.add_requests(
                [
                    EngineRequest(
                        request_id=f"r{index}", prompt_token_ids=PROMPTS[11], params=GREEDY, seed=0, max_tokens=4,
                        cache_salt=salt,
                    )
                ]
            )  # fmt: skip
            first = next(o for o in _drain(client) if o.request_id == f"r{index}")
            hits.append(first.num_cached_tokens)
    assert hits == [0, 0, 56, 0, 56]


def _drain(client) -> Iterator:
    found = []
    while client.has_unfinished_requests():
        found += client.step().outputs
    return found


def _prompt_logprobs(llm: LLM, prompts: list[list[int]]) -> list[torch.Tensor]:
    """float32 [tokens - 1, vocabulary] a prompt: log-probabilities after each token but the last."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1)
    found = []
    for result in llm.generate(prompts, params, use_tqdm=False):
        rows = result.prompt_logprobs
        assert rows[0] is None
        assert len(rows) == len(result.prompt_token_ids)
        table = torch.full((len(rows) - 1, VOCAB_SIZE), float("nan"))
        for index, row in enumerate(rows[1:]):
            for token, entry in row.items():
                table[index, token] = entry.logprob
        assert not table.isnan().any()
        found.append(table)
    return found


@pytest.mark.parametrize("name", TINY_MODELS)
def test_bfloat16_logits_are_as_near_as_transformers_own(name):
    """Against float32 of the same (bfloat16) weights, our rounding errs no more than transformers' does."""
    folder = tiny_model(name, dtype="bfloat16")
    exact, rounded = reference_model(folder), reference_model(folder, "bfloat16")
    prompts = [p for p in PROMPTS if 15 <= len(p) <= 100][:4]
    with LLM(
        str(folder), dtype="bfloat16", max_model_len=256, kv_cache_memory_bytes=8 << 20, max_logprobs=-1,
        max_num_batched_tokens=128,
    ) as llm:  # fmt: skip
        ours = torch.cat(_prompt_logprobs(llm, prompts))
    truth = torch.cat([reference_logits(exact, p)[:-1].log_softmax(-1) for p in prompts])
    theirs = torch.cat([reference_logits(rounded, p)[:-1].log_softmax(-1) for p in prompts])
    our_error, their_error = (ours - truth).abs(), (theirs - truth).abs()
    assert our_error.mean() <= 1.15 * their_error.mean() + 1e-3
    assert our_error.quantile(0.99) <= 1.3 * their_error.quantile(0.99) + 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "opt", "qwen3"])
def test_float32_logits_equal_transformers(name):
    prompts = [p for p in PROMPTS if len(p) >= 2][:6]
    with engine(name, max_logprobs=-1, max_num_batched_tokens=70, max_num_seqs=8) as llm:
        ours = _prompt_logprobs(llm, prompts)
    model = reference_model(tiny_model(name))
    for prompt, table in zip(prompts, ours):
        expected = reference_logits(model, prompt)[:-1].log_softmax(-1)
        torch.testing.assert_close(table, expected, rtol=0, atol=5e-4)


SUBJECTS = [
    "the sea", "a train", "winter", "bread", "the moon", "a bridge", "music", "a garden", "light", "rivers",
    "a clock", "paper", "the wind", "salt", "a library", "glass", "maps", "tea", "the stars", "wool",
    "a harbour", "iron", "rain", "a violin", "honey",
]  # fmt: skip


@needs_smollm2
@pytest.mark.timeout(600)  # the reference is read from the GGUF file once, slowly, and kept
def test_smollm2_answers_as_transformers_does():
    """The real model from its GGUF file: 50 prompts, float32, chat and plain."""
    path = smollm2_gguf()
    with LLM(str(path), dtype="float32", max_model_len=512, kv_cache_memory_bytes=128 << 20) as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [tokenizer.encode(f"In one sentence, {subject} is") for subject in SUBJECTS]
        for subject in SUBJECTS:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": f"Tell me about {subject}."}],
                tokenize=False,
                add_generation_prompt=True,
            )
            prompts.append(tokenizer.encode(text, add_special_tokens=False))
        params = SamplingParams(temperature=0.0, max_tokens=8)
        got = outputs(llm, prompts, params)
    model = reference_model(smollm2_reference())
    ties = assert_greedy(model, prompts, got, "SmolLM2")
    assert len(prompts) == 50
    assert ties <= 1
    assert len({tuple(tokens) for tokens in got}) > 25
