"""Prompts and parameters are checked before the engine sees them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeinfer.errors import RequestError
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.text.input_processor import InputProcessor, default_sampling_params, spread_seed
from text.small_tokenizers import byte_level, sentencepiece_like

LIMIT = 32


def processor(**changes: Any) -> InputProcessor:
    tokenizer = changes.pop("tokenizer", byte_level())
    values: dict[str, Any] = {
        "max_model_len": LIMIT,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_ids": [5, 0],
    }
    return InputProcessor(tokenizer, **{**values, **changes})


def ids_of(prompt: Any, **options: Any) -> list[int]:
    return processor(**options).process(prompt, SamplingParams(), "r").prompt_token_ids


def test_every_form_of_a_prompt() -> None:
    ids = byte_level().encode("Hello")
    assert ids_of("Hello") == ids
    assert ids_of({"prompt": "Hello"}) == ids
    assert ids_of({"prompt_token_ids": ids}) == ids
    assert ids_of(ids) == ids
    request = processor().process({"prompt": "Hello", "prompt_token_ids": [7]}, SamplingParams(), "r")
    assert (request.prompt, request.prompt_token_ids) == ("Hello", [7])
    salted = processor().process({"prompt": "Hello", "cache_salt": "s"}, SamplingParams(), "r")
    assert salted.engine_requests[0].cache_salt == "s"


def test_special_tokens_are_added_unless_told_otherwise() -> None:
    from tokenizers import processors

    tokenizer = sentencepiece_like.__wrapped__()  # one of its own, to be changed
    tokenizer._backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    assert ids_of("hello", tokenizer=tokenizer)[0] == 1
    assert ids_of({"prompt": "hello", "add_special_tokens": False}, tokenizer=tokenizer)[0] != 1


@pytest.mark.parametrize(
    ("prompt", "param", "words"),
    [
        ("", "prompt", "empty"),
        ([], "prompt", "empty"),
        ("Hello " * 40, "prompt", "maximum context length is 32"),
        ([4] * LIMIT, "prompt", "has 32 tokens"),
        ([4, 100_000], "prompt", "token id 100000"),
        ([-1], "prompt", "token id -1"),
        ([1.5], "prompt_token_ids", "integers"),
        (["5"], "prompt_token_ids", "integers"),
        ([2**70], "prompt", "token id 1180591620717411303424"),
        (3, "prompt", "int"),
        ({}, "prompt", "prompt or prompt_token_ids"),
        ({"prompt": 3}, "prompt", "string"),
        ({"prompt_token_ids": "ab"}, "prompt_token_ids", "list"),
        ({"prompt": "a", "multi_modal_data": {}}, "multi_modal_data", "not supported"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt", "non-empty"),
        ("\ud800", "prompt", "surrogate"),
    ],
)
def test_prompts_that_cannot_be_served(prompt: Any, param: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        processor().process(prompt, SamplingParams(), "r")
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"allowed_token_ids": [3, 9999]}, "allowed_token_ids"),
        ({"logit_bias": {9999: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"truncate_prompt_tokens": LIMIT + 1}, "truncate_prompt_tokens"),
    ],
)
def test_parameters_that_cannot_be_served(params: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        processor().process("Hello", SamplingParams(**params), "r")
    assert caught.value.param == param


def test_max_tokens_fits_the_room_left() -> None:
    for asked, expected in ((None, LIMIT - 3), (5, 5), (1000, LIMIT - 3)):
        request = processor().process([4, 5, 6], SamplingParams(max_tokens=asked), "r")
        assert request.engine_requests[0].max_tokens == expected
    assert processor().process([4] * (LIMIT - 1), SamplingParams(), "r").engine_requests[0].max_tokens == 1


def test_ids_of_a_tokenizer_that_is_larger_than_the_model() -> None:
    small = processor(vocab_size=300)
    assert small.process("a", SamplingParams(), "r").prompt_token_ids
    with pytest.raises(RequestError, match="0 to 299"):
        small.process("The quick brown fox", SamplingParams(), "r")


def test_truncation_keeps_the_end() -> None:
    ids = list(range(4, 4 + LIMIT * 2))
    kept = processor().process(ids, SamplingParams(truncate_prompt_tokens=5), "r")
    assert kept.prompt_token_ids == ids[-5:]
    kept = processor().process(ids, SamplingParams(truncate_prompt_tokens=-1, max_tokens=10), "r")
    assert kept.prompt_token_ids == ids[-(LIMIT - 10) :]
    assert kept.engine_requests[0].max_tokens == 10
    kept = processor().process(ids, SamplingParams(truncate_prompt_tokens=-1, max_tokens=None), "r")
    assert len(kept.prompt_token_ids) == LIMIT - 1


def test_n_outputs_have_ids_and_seeds_of_their_own() -> None:
    request = processor().process("Hello", SamplingParams(n=3, seed=7), "r")
    assert [r.request_id for r in request.engine_requests] == ["r#0", "r#1", "r#2"]
    seeds = [r.seed for r in request.engine_requests]
    assert seeds == [spread_seed(7, index) for index in range(3)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    single = processor().process("Hello", SamplingParams(seed=7), "r")
    assert [(r.request_id, r.seed) for r in single.engine_requests] == [("r", 7)]


def test_seeds_of_requests_that_bring_none() -> None:
    drawn = {processor().process("a", SamplingParams(), "r").engine_requests[0].seed for _ in range(20)}
    assert len(drawn) == 20
    first, second = processor(base_seed=0), processor(base_seed=0)
    one = [first.process("a", SamplingParams(), "r").engine_requests[0].seed for _ in range(5)]
    two = [second.process("a", SamplingParams(), "r").engine_requests[0].seed for _ in range(5)]
    assert one == two
    assert len(set(one)) == 5
    assert all(
        0 <= spread_seed(seed, index) < 2**63 for seed in (-(2**63), -1, 0, 2**63 - 1) for index in range(4)
    )


def test_end_tokens_of_model_and_tokenizer() -> None:
    request = processor(eos_token_ids=[7, 0, 7]).process("a", SamplingParams(), "r")
    assert request.engine_requests[0].eos_token_ids == [7, byte_level().eos_token_id]


def test_bad_words_at_the_beginning_and_after_a_space() -> None:
    tokenizer = byte_level()
    request = processor().process("a", SamplingParams(bad_words=["the", " fox"]), "r")
    found = request.engine_requests[0].params.bad_words_token_ids
    assert found is not None
    texts = {tokenizer.decode(ids) for ids in found}
    assert {"the", " the", "fox"} <= texts
    assert request.params.bad_words_token_ids is None  # the caller's own object stays as it is


def test_the_whole_vocabulary_as_logprobs_where_allowed() -> None:
    size = byte_level().vocab_size
    request = processor(max_logprobs=-1).process("a", SamplingParams(logprobs=-1), "r")
    assert request.engine_requests[0].params.logprobs == size


def test_stop_tokens_of_another_model_do_no_harm() -> None:
    request = processor().process("a", SamplingParams(stop_token_ids=[151329, 7]), "r")
    assert request.engine_requests[0].params.stop_token_ids == [7]


def test_changed_parameters_are_checked_again() -> None:
    params = SamplingParams()
    params.temperature = -1
    with pytest.raises(RequestError, match="temperature"):
        processor().process("a", params, "r")


def test_a_batch_is_what_its_prompts_are_one_by_one() -> None:
    prompts: list[Any] = ["Hello", [4, 5], "world 你好", {"prompt": "x"}]
    params = [SamplingParams(seed=index) for index in range(4)]
    batch = processor(by_priority=True).process_batch(prompts, params, ["0", "1", "2", "3"], [3, 2, 1, 0])
    for index, request in enumerate(batch):
        alone = processor().process(prompts[index], params[index], str(index))
        assert request.prompt_token_ids == alone.prompt_token_ids
        assert request.prompt == alone.prompt
        assert request.engine_requests[0].priority == 3 - index
    with pytest.raises(RequestError, match="surrogate"):
        processor().process_batch(["a", "\ud800", "b"], [SamplingParams()] * 3, ["0", "1", "2"])
    with pytest.raises(RequestError, match="empty"):
        processor().process_batch(["a", "", "b"], [SamplingParams()] * 3, ["0", "1", "2"])


def test_defaults_of_the_generation_config() -> None:
    config = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "max_new_tokens": 64,
        "do_sample": True,
        "eos_token_id": [1],
    }
    assert default_sampling_params(config) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "max_tokens": 64,
    }
    assert default_sampling_params({}) == {}


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = processor()
    monkeypatch.setattr(inputs.tokenizer, "encode", lambda *args: pytest.fail("tokenized"))
    with pytest.raises(RequestError, match="tokens at the least") as caught:
        inputs.process("word " * 1_000_000, SamplingParams(), "r")
    assert caught.value.param == "prompt"


@given(text=st.text(max_size=60), copies=st.integers(1, 60))
@settings(deadline=None, max_examples=100)
def test_the_least_number_of_tokens_is_never_too_high(text: str, copies: int) -> None:
    for tokenizer in (byte_level(), sentencepiece_like()):
        whole = text * copies
        try:
            ids = tokenizer.encode(whole, add_special_tokens=False)
        except TypeError:
            continue  # a lone surrogate
        assert tokenizer.least_tokens(whole) <= len(ids)
