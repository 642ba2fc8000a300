"""Every field of SamplingParams, against transformers' logits: exactly where the outcome is certain, else by statistics."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from fixtures.reference import random_prompts, reference_logits, reference_model
from fixtures.tiny_models import BOS, EOS, IM_START, VOCAB_SIZE, tiny_model
from kubeinfer import LLM, SamplingParams
from kubeinfer.errors import NotSupportedError, RequestError

PROMPTS = random_prompts(12, [3, 9, 17, 33, 40, 64], VOCAB_SIZE, seed=3)
NEVER = float("-inf")
MODEL = "llama"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with make() as llm:
        yield llm
        llm._client.check_integrity()


def make(**options) -> LLM:
    options = {
        "dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 32 << 20, "max_logprobs": -1,
    } | options  # fmt: skip
    return LLM(str(tiny_model(MODEL)), **options)


@pytest.fixture(scope="module")
def model():
    return reference_model(tiny_model(MODEL))


def greedy(**fields) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 16, "ignore_eos": True} | fields))


def run(llm: LLM, prompts, params) -> list:
    return llm.generate(prompts, params, use_tqdm=False)


def tokens(result) -> list[int]:
    return list(result.outputs[0].token_ids)


Edit = Callable[[torch.Tensor, list[int], list[int]], None]


def assert_greedy_after(model, prompt: list[int], output: list[int], edit: Edit) -> None:
    """Each token of ``output`` has the largest logit once ``edit(logits, prompt, output so far)`` has changed them."""
    logits = reference_logits(model, [*prompt, *output[:-1]])[len(prompt) - 1 :]
    for index, token in enumerate(output):
        line = logits[index].clone()
        edit(line, prompt, output[:index])
        assert line.max() - line[token] < 1e-4, f"output token {index} is {token}, not {int(line.argmax())}"


def in_company(llm: LLM, params: SamplingParams) -> list:
    """The results of ``PROMPTS`` under ``params``, with plain and sampled requests between them in the batch."""
    prompts, all_params = [], []
    for index, prompt in enumerate(PROMPTS):
        prompts += [prompt, PROMPTS[-index], prompt]
        all_params += [params, greedy(), SamplingParams(temperature=1.0, seed=index, top_p=0.9, max_tokens=9)]
    return run(llm, prompts, all_params)[::3]


# ---- edits of the logits, greedy: exact ----


@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"),
    [(1.3, 0.0, 0.0), (0.7, 0.0, 0.0), (1.0, 1.5, 0.0), (1.0, 0.0, 2.0), (1.0, -1.0, -0.5), (1.2, 0.7, 0.4)],
)
def test_penalties(llm, model, repetition, frequency, presence):
    def edit(line, prompt, output):
        for token in {*prompt, *output}:
            line[token] = line[token] / repetition if line[token] > 0 else line[token] * repetition
        for token, count in Counter(output).items():
            line[token] -= frequency * count + presence

    params = greedy(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence, max_tokens=24
    )
    results = in_company(llm, params)
    plain = [tokens(r) for r in run(llm, PROMPTS, greedy(max_tokens=24))]
    assert [tokens(r) for r in results] != plain
    for prompt, result in zip(PROMPTS, results):
        assert_greedy_after(model, prompt, tokens(result), edit)


def test_penalties_survive_preemption(model):
    params = greedy(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, max_tokens=30)
    with make() as llm:
        expected = [tokens(r) for r in run(llm, PROMPTS, params)]
    with make(block_size=8, num_gpu_blocks_override=34, max_num_batched_tokens=32, max_num_seqs=12) as small:
        assert [tokens(r) for r in run(small, PROMPTS, params)] == expected
        assert small._client.core.scheduler.stats().num_preemptions > 3


def test_logit_bias(llm, model):
    bias = {7: 4.0, 100: -3.5, 333: 6.25, 40: -100.0}

    def edit(line, prompt, output):
        for token, value in bias.items():
            line[token] += value

    for prompt, result in zip(PROMPTS, in_company(llm, greedy(logit_bias=bias))):
        assert_greedy_after(model, prompt, tokens(result), edit)
    forced = run(llm, PROMPTS[:2], greedy(logit_bias={250: 100.0}, max_tokens=3))
    assert [tokens(r) for r in forced] == [[250] * 3] * 2


def test_allowed_token_ids(llm, model):
    allowed = [5, 17, 200, 201, 202, 444]

    def edit(line, prompt, output):
        keep = line[allowed].clone()
        line[:] = NEVER
        line[allowed] = keep

    for prompt, result in zip(PROMPTS, in_company(llm, greedy(allowed_token_ids=allowed))):
        assert set(tokens(result)) <= set(allowed)
        assert_greedy_after(model, prompt, tokens(result), edit)
    sampled = run(
        llm, PROMPTS, SamplingParams(temperature=3.0, seed=1, max_tokens=20, allowed_token_ids=allowed)
    )
    assert {t for r in sampled for t in tokens(r)} <= set(allowed)


def test_min_tokens_holds_back_every_end(llm, model):
    """Neither EOS nor a stop token is sampled before min_tokens, and either ends the output after that."""
    bias = {EOS: 60.0, 77: 30.0}

    def edit(line, prompt, output):
        line[EOS] += 60.0
        line[77] += 30.0
        if len(output) < 6:
            line[[EOS, 77]] = NEVER

    params = greedy(ignore_eos=False, min_tokens=6, stop_token_ids=[77], logit_bias=bias, max_tokens=20)
    for prompt, result in zip(PROMPTS, in_company(llm, params)):
        output = tokens(result)
        assert len(output) == 7
        assert result.outputs[0].finish_reason == "stop"
        assert_greedy_after(model, prompt, output, edit)


def _two_letters(llm: LLM) -> tuple[list[int], str]:
    """Ids of single letters, and two of the letters that the tokenizer does not merge."""
    tokenizer = llm.get_tokenizer()
    letters = {c: tokenizer.encode(c, add_special_tokens=False)[0] for c in "abcdefgh"}
    for word in ("gb", "bd", "db", "gd", "fb", "bg"):
        if tokenizer.encode(word, add_special_tokens=False) == [letters[word[0]], letters[word[1]]]:
            return list(letters.values()), word
    raise AssertionError("the tokenizer merges every pair")


def test_bad_words_of_one_and_of_several_tokens(llm, model):
    ids, pair = _two_letters(llm)
    tokenizer = llm.get_tokenizer()
    single = "a"
    params = greedy(allowed_token_ids=ids, max_tokens=40, repetition_penalty=1.05)
    before = "".join(r.outputs[0].text for r in run(llm, PROMPTS, params))
    assert pair in before
    assert single in before
    banned = tokenizer.encode(pair, add_special_tokens=False)
    one = tokenizer.encode(single, add_special_tokens=False)[0]

    def edit(line, prompt, output):
        keep = line[ids].clone()
        line[:] = NEVER
        line[ids] = keep
        line[one] = NEVER
        if output and output[-1] == banned[0]:
            line[banned[1]] = NEVER
        for token in {*prompt, *output}:
            line[token] = line[token] / 1.05 if line[token] > 0 else line[token] * 1.05

    params = greedy(allowed_token_ids=ids, max_tokens=40, repetition_penalty=1.05, bad_words=[pair, single])
    for prompt, result in zip(PROMPTS, in_company(llm, params)):
        text = result.outputs[0].text
        assert len(tokens(result)) == 40
        assert pair not in text
        assert single not in text
        assert_greedy_after(model, prompt, tokens(result), edit)


# ---- ends ----


def test_ends(llm):
    end = greedy(ignore_eos=False, logit_bias={EOS: 100.0})
    output = run(llm, PROMPTS[:1], end)[0].outputs[0]
    assert (list(output.token_ids), output.finish_reason, output.stop_reason) == ([EOS], "stop", None)
    output = run(llm, PROMPTS[:1], greedy(logit_bias={EOS: 100.0}))[0].outputs[0]
    assert (list(output.token_ids), output.finish_reason) == ([EOS] * 16, "length")
    whole = tokens(run(llm, PROMPTS[:1], greedy())[0])
    stop = whole[5]
    output = run(llm, PROMPTS[:1], greedy(stop_token_ids=[500, stop]))[0].outputs[0]
    assert list(output.token_ids) == whole[: whole.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_outputs_end_at_the_models_length(llm):
    prompt = random_prompts(1, [200], VOCAB_SIZE)[0]
    output = run(llm, [prompt], greedy(max_tokens=None))[0].outputs[0]
    assert len(output.token_ids) == 256 - 200
    assert output.finish_reason == "length"


def test_stop_strings(llm):
    ids, _ = _two_letters(llm)
    prompt = ["Once upon a time"]
    params = greedy(allowed_token_ids=ids, max_tokens=30, repetition_penalty=1.05)
    text = run(llm, prompt, params)[0].outputs[0].text
    stop = text[9:12]
    cut = text.index(stop)
    for include in (False, True):
        params = greedy(
            allowed_token_ids=ids, max_tokens=30, repetition_penalty=1.05, stop=["zzz", stop],
            include_stop_str_in_output=include,
        )  # fmt: skip
        output = run(llm, prompt, params)[0].outputs[0]
        assert output.text == text[: cut + (3 if include else 0)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert len(output.token_ids) == cut + 3
    assert llm._client.core.scheduler.stats().kv_cache_usage == 0


def test_special_tokens_and_text(llm):
    bias = {IM_START: 100.0}
    shown, hidden, none = run(
        llm,
        PROMPTS[:1] * 3,
        [
            greedy(max_tokens=2, logit_bias=bias, skip_special_tokens=False),
            greedy(max_tokens=2, logit_bias=bias),
            greedy(max_tokens=2, logit_bias=bias, detokenize=False),
        ],
    )
    assert shown.outputs[0].text == "<|im_start|>" * 2
    assert (hidden.outputs[0].text, none.outputs[0].text) == ("", "")
    assert tokens(shown) == tokens(hidden) == tokens(none) == [IM_START] * 2


def test_truncate_prompt_tokens(llm):
    long = random_prompts(1, [300], VOCAB_SIZE)[0]
    short, longest = run(
        llm,
        [long, long],
        [greedy(truncate_prompt_tokens=20), greedy(truncate_prompt_tokens=-1, max_tokens=16)],
    )
    assert short.prompt_token_ids == long[-20:]
    assert longest.prompt_token_ids == long[-240:]
    assert tokens(short) == tokens(run(llm, [long[-20:]], greedy())[0])


# ---- log-probabilities ----


@pytest.mark.parametrize("count", [0, 1, 5, -1])
def test_logprobs(llm, model, count):
    """Of the model's own distribution, before temperature, penalties and bias."""
    params = SamplingParams(
        temperature=2.0, seed=5, max_tokens=6, logprobs=count, repetition_penalty=1.4, logit_bias={9: 3.0},
        ignore_eos=True,
    )  # fmt: skip
    for prompt, result in zip(PROMPTS, in_company(llm, params)):
        output = result.outputs[0]
        expected = reference_logits(model, [*prompt, *output.token_ids[:-1]])[len(prompt) - 1 :].log_softmax(
            -1
        )
        assert len(output.logprobs) == 6
        total = 0.0
        for line, token, entries in zip(expected, output.token_ids, output.logprobs):
            best = line.topk(count if count > 0 else 0 if count == 0 else VOCAB_SIZE)
            assert set(entries) == {token, *best.indices.tolist()}
            for key, entry in entries.items():
                assert entry.logprob == pytest.approx(line[key].item(), abs=5e-4)
                assert abs(entry.rank - 1 - int((line > line[key]).sum())) <= 1
            assert next(iter(entries)) == token
            total += line[token].item()
        assert output.cumulative_logprob == pytest.approx(total, abs=3e-3)


def test_no_logprobs_unless_asked_for(llm):
    output = run(llm, PROMPTS[:1], greedy())[0].outputs[0]
    assert output.logprobs is None
    assert output.cumulative_logprob is None


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 12, "max_num_seqs": 4, "block_size": 8}])
@pytest.mark.parametrize("count", [0, 3])
def test_prompt_logprobs(model, options, count):
    """Whole also where the prompt is computed in chunks, and where its beginning is in the prefix cache."""
    params = greedy(max_tokens=2, prompt_logprobs=count)
    with make(**options) as llm:
        run(llm, PROMPTS, greedy(max_tokens=1))
        results = run(llm, PROMPTS, params)
    for prompt, result in zip(PROMPTS, results):
        assert result.prompt_logprobs[0] is None
        assert len(result.prompt_logprobs) == len(prompt)
        expected = reference_logits(model, prompt[:-1]).log_softmax(-1)
        for line, token, entries in zip(expected, prompt[1:], result.prompt_logprobs[1:]):
            assert set(entries) == {token, *line.topk(count).indices.tolist()}
            assert entries[token].logprob == pytest.approx(line[token].item(), abs=5e-4)


# ---- random sampling ----


def draws(llm: LLM, count: int, **fields) -> Counter:
    """The first token of ``count`` outputs of one prompt."""
    each = 512
    params = [SamplingParams(**fields, n=each, max_tokens=1, seed=11 + i) for i in range(count // each)]
    results = run(llm, [PROMPTS[2]] * len(params), params)
    return Counter(output.token_ids[0] for result in results for output in result.outputs)


def assert_drawn_from(found: Counter, probabilities: torch.Tensor) -> None:
    """Pearson's chi-square test at about one in 100,000; rare tokens are taken together."""
    total = sum(found.values())
    expected = probabilities.double() * total
    assert all(expected[token] > 0 for token in found), "a token was drawn that should have been cut off"
    often = torch.nonzero(expected >= 8).flatten().tolist()
    pairs = [(found[token], expected[token].item()) for token in often]
    rest = total - sum(e for _, e in pairs)
    if rest > 4:
        pairs.append((total - sum(f for f, _ in pairs), rest))
    statistic = sum((f - e) ** 2 / e for f, e in pairs)
    freedom = len(pairs) - 1
    # Wilson and Hilferty's approximation of the quantile
    bound = freedom * (1 - 2 / (9 * freedom) + 4.26 * math.sqrt(2 / (9 * freedom))) ** 3
    assert len(pairs) > 3
    assert statistic < bound, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


def distribution(model, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """The distribution of the first token by the parameters' definitions, with a sort."""
    x = reference_logits(model, PROMPTS[2])[-1].double() / temperature
    probabilities = x.softmax(-1)
    probabilities[probabilities < min_p * probabilities.max()] = 0
    order = probabilities.argsort(descending=True)
    if top_k:
        probabilities[order[top_k:]] = 0
    probabilities /= probabilities.sum()
    if top_p < 1:
        before = probabilities[order].cumsum(0) - probabilities[order]
        probabilities[order[before >= top_p]] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 2.0},
        {"temperature": 4.0},
        {"temperature": 3.0, "top_k": 7},
        {"temperature": 3.0, "top_k": 200},
        {"temperature": 3.0, "top_p": 0.6},
        {"temperature": 2.0, "top_p": 0.95},
        {"temperature": 3.0, "min_p": 0.15},
        {"temperature": 3.0, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_distributions(llm, model, fields):
    found = draws(llm, 4096, **fields)
    expected = distribution(model, **fields)
    assert_drawn_from(found, expected)
    kept = int((expected > 0).sum())
    if kept <= 12:
        assert len(found) == kept


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_the_narrowest_choice_is_greedy(llm, fields):
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, seed=4, **fields)
    assert [tokens(r) for r in run(llm, PROMPTS, params)] == [
        tokens(r) for r in run(llm, PROMPTS, greedy(max_tokens=12))
    ]


def test_tokens_of_a_sequence_are_independent(llm):
    """Pairs of neighbours, and equal positions under neighbouring seeds, are as uncorrelated as they should be."""
    allowed = list(range(100, 116))
    bias = dict.fromkeys(allowed, 0.0)
    # so hot that the 16 allowed tokens are all but equally likely
    params = [
        SamplingParams(
            temperature=1e4,
            allowed_token_ids=allowed,
            logit_bias=bias,
            max_tokens=64,
            seed=s,
            ignore_eos=True,
        )
        for s in range(64)
    ]
    table = torch.tensor([tokens(r) for r in run(llm, [PROMPTS[0]] * 64, params)]) - 100
    for first, second in ((table[:, :-1], table[:, 1:]), (table[:-1], table[1:])):
        pairs = Counter((first * 16 + second).flatten().tolist())
        assert_drawn_from(pairs, torch.full((256,), 1 / 256))


def test_seeds_give_the_same_output_whatever_the_batch(llm):
    params = [
        SamplingParams(temperature=1.3, top_p=0.95, seed=100 + i, max_tokens=24) for i in range(len(PROMPTS))
    ]
    expected = [tokens(r) for r in run(llm, PROMPTS, params)]
    assert len({tuple(t) for t in expected}) == len(PROMPTS)
    alone = [tokens(run(llm, [prompt], p)[0]) for prompt, p in zip(PROMPTS[:5], params)]
    assert alone == expected[:5]
    turned = [tokens(r) for r in run(llm, PROMPTS[::-1], params[::-1])]
    assert turned[::-1] == expected
    with make(block_size=8, num_gpu_blocks_override=34, max_num_batched_tokens=24, max_num_seqs=7) as small:
        assert [tokens(r) for r in run(small, PROMPTS, params)] == expected
        assert small._client.core.scheduler.stats().num_preemptions > 0
    other = [
        SamplingParams(temperature=1.3, top_p=0.95, seed=900 + i, max_tokens=24) for i in range(len(PROMPTS))
    ]
    assert all(a != b for a, b in zip(expected, (tokens(r) for r in run(llm, PROMPTS, other))))


def test_n_outputs(llm):
    params = SamplingParams(temperature=1.5, n=5, seed=42, max_tokens=12, ignore_eos=True)
    result = run(llm, PROMPTS[:1], params)[0]
    outputs = [list(o.token_ids) for o in result.outputs]
    assert [o.index for o in result.outputs] == list(range(5))
    assert len({tuple(o) for o in outputs}) == 5
    assert [list(o.token_ids) for o in run(llm, PROMPTS[:1], params)[0].outputs] == outputs
    one = SamplingParams(temperature=1.5, seed=42, max_tokens=12, ignore_eos=True)
    assert tokens(run(llm, PROMPTS[:1], one)[0]) == outputs[0]
    same = run(llm, PROMPTS[:1], greedy(n=3))[0]
    assert len({tuple(o.token_ids) for o in same.outputs}) == 1
    mixed = run(
        llm, PROMPTS[:1], SamplingParams(temperature=1.0, n=3, max_tokens=4, prompt_logprobs=1, logprobs=1)
    )[0]
    assert len(mixed.prompt_logprobs) == len(PROMPTS[0])
    assert all(len(o.logprobs) == len(o.token_ids) for o in mixed.outputs)


def test_requests_without_a_seed():
    """Two engines of one seed give the same outputs; a request asked twice does not."""
    params = SamplingParams(temperature=1.5, max_tokens=10, ignore_eos=True)
    found = []
    for seed in (0, 0, 1):
        with make(seed=seed) as llm:
            found.append([tokens(r) for _ in range(2) for r in run(llm, PROMPTS[:2], params)])
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert found[0][:2] != found[0][2:]


# ---- defaults and refusals ----


def test_defaults_of_the_models_generation_config(tmp_path):
    folder = Path(shutil.copytree(tiny_model(MODEL), tmp_path / "model"))
    config = {
        "eos_token_id": [EOS, 300],
        "temperature": 0.25,
        "top_k": 11,
        "top_p": 0.5,
        "repetition_penalty": 1.5,
    }
    (folder / "generation_config.json").write_text(json.dumps(config))
    options = {"dtype": "float32", "kv_cache_memory_bytes": 8 << 20}
    with LLM(str(folder), **options) as llm:
        default = llm.get_default_sampling_params()
        assert (default.temperature, default.top_k, default.top_p) == (0.25, 11, 0.5)
        assert default.repetition_penalty == 1.5
        output = run(llm, PROMPTS[:1], greedy(ignore_eos=False, logit_bias={300: 100.0}))[0].outputs[0]
        assert (list(output.token_ids), output.finish_reason) == ([300], "stop")
    with LLM(str(folder), generation_config="vllm", **options) as llm:
        assert llm.get_default_sampling_params().temperature == 1.0
    with LLM(str(folder), override_generation_config={"temperature": 0.75}, **options) as llm:
        assert llm.get_default_sampling_params().temperature == 0.75
        assert llm.get_default_sampling_params().top_k == 11


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [-3]}, "stop_token_ids"),
        ({"truncate_prompt_tokens": 1000}, "truncate_prompt_tokens"),
    ],
    ids=str,
)
def test_values_that_the_model_cannot_serve_are_refused(llm, fields, param):
    with pytest.raises(RequestError) as caught:
        run(llm, PROMPTS[:1], greedy(**fields))
    assert caught.value.param == param
    assert not llm._client.has_unfinished_requests()


def test_logprobs_beyond_the_bound_are_refused():
    with make(max_logprobs=5) as llm:
        for field in ("logprobs", "prompt_logprobs"):
            for count in (6, -1):
                with pytest.raises(RequestError) as caught:
                    run(llm, PROMPTS[:1], greedy(**{field: count}))
                assert caught.value.param == field
        assert len(run(llm, PROMPTS[:1], greedy(logprobs=5))[0].outputs[0].logprobs) == 16


@pytest.mark.parametrize("field", ["structured_outputs", "guided_decoding", "logits_processors"])
def test_what_is_not_there_yet_is_refused(field):
    with pytest.raises(NotSupportedError) as caught:
        SamplingParams(**{field: {"json": {}}})
    assert caught.value.param == field


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def test_outputs_have_vllms_shape(llm):
    result = run(llm, ["Hello, my name is"], greedy(max_tokens=4))[0]
    assert result.prompt == "Hello, my name is"
    assert result.finished
    assert _is_sequence(result.prompt_token_ids)
    assert BOS not in result.prompt_token_ids
    assert result.outputs[0].finish_reason == "length"
    assert isinstance(result.outputs[0].text, str)
