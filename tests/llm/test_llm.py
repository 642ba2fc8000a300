"""LLM over an engine that replays tokens: what it asks of the engine, what it gives back, how it ends."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kubeinfer import LLM, SamplingParams
from kubeinfer.errors import EngineDeadError, KubeinferError, NotSupportedError, OptionError, RequestError
from kubeinfer.options import EngineOptions
from kubeinfer.text.tokenizer import from_folder
from llm.scripted import Script, ScriptedClient, echo

Make = Callable[..., tuple[LLM, ScriptedClient]]


@pytest.fixture
def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    def build(script: Script = echo, **options: Any) -> tuple[LLM, ScriptedClient]:
        client = ScriptedClient(script)
        monkeypatch.setattr("kubeinfer.llm.make_client", lambda _options: client)
        return LLM(str(folder), **options), client

    return build


def test_generate_gives_outputs_in_order(make: Make) -> None:
    llm, _ = make()
    outputs = llm.generate(["Hello", "The capital"], SamplingParams(max_tokens=4), use_tqdm=False)
    assert [out.prompt for out in outputs] == ["Hello", "The capital"]
    for out in outputs:
        assert out.finished
        assert out.outputs[0].token_ids == (out.prompt_token_ids * 20)[:4]
        assert out.outputs[0].finish_reason == "length"
        decoded = llm.get_tokenizer().decode([*out.prompt_token_ids, *out.outputs[0].token_ids])
        assert decoded == out.prompt + out.outputs[0].text


@pytest.mark.parametrize("prompts", ["Hello", [5, 6, 7], {"prompt": "Hello"}, {"prompt_token_ids": [5, 6]}])
def test_a_single_prompt_of_any_form(make: Make, prompts: Any) -> None:
    llm, client = make()
    outputs = llm.generate(prompts, use_tqdm=False)
    assert len(outputs) == len(client.replay.seen) == 1


def test_lists_of_prompts_of_any_form(make: Make) -> None:
    llm, client = make()
    llm.generate([[5, 6], [7]], use_tqdm=False)
    llm.generate(["a", {"prompt_token_ids": [9]}, [8]], use_tqdm=False)
    assert [request.prompt_token_ids for request in client.replay.seen[:2]] == [[5, 6], [7]]
    assert [request.prompt_token_ids for request in client.replay.seen[3:]] == [[9], [8]]
    assert llm.generate([], use_tqdm=False) == []


def test_sampling_params_one_for_all_or_one_each(make: Make) -> None:
    llm, _ = make()
    each = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)]
    lengths = [len(out.outputs[0].token_ids) for out in llm.generate(["a", "b"], each, use_tqdm=False)]
    assert lengths == [2, 3]
    with pytest.raises(RequestError, match="1 entries for 2 prompts"):
        llm.generate(["a", "b"], each[:1], use_tqdm=False)
    with pytest.raises(RequestError, match="priority has 1"):
        llm.generate(["a", "b"], use_tqdm=False, priority=[1])


def test_default_sampling_params_are_the_model_s(make: Make) -> None:
    llm, client = make()
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_k=20)
    llm.generate("a", use_tqdm=False)
    assert client.replay.seen[0].params.temperature == 0.6
    assert client.replay.seen[0].eos_token_ids == [1, 3]
    plain, _ = make(generation_config="vllm", override_generation_config={"top_p": 0.5})
    assert plain.get_default_sampling_params() == SamplingParams(top_p=0.5)


def test_seeds_repeat_from_one_engine_to_the_next(make: Make) -> None:
    seeds = []
    for _ in range(2):
        llm, client = make(seed=3)
        llm.generate(["a", "b"], use_tqdm=False)
        seeds.append([request.seed for request in client.replay.seen])
    assert seeds[0] == seeds[1]
    assert seeds[0][0] != seeds[0][1]


def test_n_outputs(make: Make) -> None:
    llm, client = make()
    out = llm.generate("Hello", SamplingParams(n=3, max_tokens=2), use_tqdm=False)[0]
    assert [one.index for one in out.outputs] == [0, 1, 2]
    assert len({request.seed for request in client.replay.seen}) == 3


def test_stop_strings_abort_in_the_engine(make: Make, folder: Path) -> None:
    ids = from_folder(folder).encode("ab END cd")
    llm, client = make(lambda request: ids)
    out = llm.generate("x", SamplingParams(max_tokens=50, stop=["END"]), use_tqdm=False)[0].outputs[0]
    assert (out.text, out.finish_reason, out.stop_reason) == ("ab ", "stop", "END")
    assert client.replay.aborted == ["0"]
    assert not client.replay.running


def test_logprobs_and_no_text_where_none_is_wanted(make: Make) -> None:
    llm, _ = make()
    params = SamplingParams(max_tokens=3, logprobs=0, prompt_logprobs=0)
    out = llm.generate("Hello", params, use_tqdm=False)[0]
    assert len(out.outputs[0].logprobs or []) == 3
    assert out.outputs[0].cumulative_logprob == pytest.approx(-1.5)
    assert len(out.prompt_logprobs or []) == len(out.prompt_token_ids)
    quiet = llm.generate("Hello", SamplingParams(max_tokens=3, detokenize=False), use_tqdm=False)[0]
    assert quiet.outputs[0].text == ""
    assert len(quiet.outputs[0].token_ids) == 3


def test_chat_single_and_batch(make: Make) -> None:
    llm, client = make()
    chat = [{"role": "user", "content": "Hi"}]
    out = llm.chat(chat, SamplingParams(max_tokens=1), use_tqdm=False)
    assert out[0].prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert client.replay.seen[0].prompt_token_ids[0] == 2
    many = llm.chat([chat, chat], use_tqdm=False, chat_template="{{ messages[0].content }}!")
    assert [one.prompt for one in many] == ["Hi!", "Hi!"]
    more = [*chat, {"role": "assistant", "content": "Hello th"}]
    kept = llm.chat(more, use_tqdm=False, add_generation_prompt=False, continue_final_message=True)
    assert str(kept[0].prompt).endswith("Hello th")
    with pytest.raises(RequestError, match="image_url"):
        llm.chat([{"role": "user", "content": [{"type": "image_url"}]}], use_tqdm=False)


def test_the_tutorials_way_to_a_chat_prompt(make: Make) -> None:
    llm, _ = make()
    tokenizer = llm.get_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], tokenize=False, add_generation_prompt=True
    )
    out = llm.generate([text], SamplingParams(max_tokens=2), use_tqdm=False)[0]
    assert out.prompt_token_ids == tokenizer(text).input_ids
    assert llm.get_tokenizer() is tokenizer


def test_the_progress_bar(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    llm, _ = make()
    llm.generate(["Hello", "World"], SamplingParams(max_tokens=4))
    shown = capsys.readouterr().err
    assert re.search(
        r"Processed prompts: 100%\|.*\| 2/2 \[.*, est\. speed input: \d+\.\d\d toks/s, output: \d+\.\d\d toks/s\]",
        shown,
    )
    llm.generate(["Hello"], use_tqdm=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EngineDeadError("died"), ValueError("bug")])
def test_a_broken_off_call_leaves_the_engine_clean(make: Make, error: BaseException) -> None:
    llm, client = make()
    client.fail_at = (2, error)
    with pytest.raises(type(error)):
        llm.generate(["Hello", "World"], SamplingParams(max_tokens=10, n=2), use_tqdm=False)
    assert not client.replay.running
    assert llm._output.num_unfinished == 0
    client.fail_at = None
    assert len(llm.generate(["again"], use_tqdm=False)) == 1


def test_ctrl_c_waits_for_the_step_to_end(make: Make) -> None:
    llm, client = make()
    step = client.replay.step
    ended: list[int] = []

    def interrupted() -> Any:
        if client.replay.steps == 2:
            signal.raise_signal(signal.SIGINT)
        outputs = step()
        ended.append(client.replay.steps)
        return outputs

    client.replay.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Hello"], SamplingParams(max_tokens=10), use_tqdm=False)
    assert ended == [1, 2, 3]
    assert client.replay.aborted == ["0"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_calls_from_several_threads_wait_for_each_other(make: Make) -> None:
    llm, _ = make()
    params = SamplingParams(max_tokens=20)
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(llm.generate, [[5 + at]] * 3, params, False) for at in range(12)]
    for at, call in enumerate(calls):
        assert [out.outputs[0].token_ids for out in call.result()] == [[5 + at] * 20] * 3


@pytest.mark.parametrize(("policy", "known"), [("fcfs", [2, 5, 5]), ("priority", [5, 5, 5])])
def test_the_engine_begins_with_some_of_many(
    make: Make, monkeypatch: pytest.MonkeyPatch, policy: str, known: list[int]
) -> None:
    """It gets the others while a device has its first step; to choose by priority it must know all."""
    monkeypatch.setattr("kubeinfer.llm._AT_FIRST", 2)
    llm, client = make(scheduling_policy=policy)
    step = client.replay.step
    seen: list[int] = []

    def counted() -> Any:
        seen.append(len(client.replay.seen))
        return step()

    client.replay.step = counted  # type: ignore[method-assign]
    outputs = llm.generate([[5 + at] for at in range(5)], SamplingParams(max_tokens=2), use_tqdm=False)
    assert [out.outputs[0].token_ids for out in outputs] == [[5 + at] * 2 for at in range(5)]
    assert seen == known[: len(seen)]
    assert len(seen) == (3 if policy == "fcfs" else 2)


def test_a_prompt_that_cannot_be_served_starts_nothing(make: Make) -> None:
    llm, client = make()
    with pytest.raises(RequestError, match="max_model_len"):
        llm.generate(["fine", [5] * 200], use_tqdm=False)
    assert client.replay.seen == []
    assert llm._output.num_unfinished == 0


def test_an_engine_that_forgets_a_request_is_noticed(make: Make) -> None:
    llm, client = make()
    client.replay.add = lambda requests: None  # type: ignore[method-assign]
    with pytest.raises(KubeinferError, match="no work left"):
        llm.generate(["a"], use_tqdm=False)


def test_pooling_is_refused_clearly(make: Make, folder: Path) -> None:
    llm, _ = make()
    with pytest.raises(NotSupportedError, match="does not support Embeddings API"):
        llm.embed(["a"])
    for call in (llm.encode, llm.classify, llm.score, llm.reward):
        with pytest.raises(NotSupportedError, match="--runner pooling"):
            call("a")
    with pytest.raises(NotSupportedError, match="pooling"):
        LLM(str(folder), runner="pooling")
    with pytest.raises(NotSupportedError, match="reward"):
        LLM(str(folder), convert="reward")


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda llm: llm.generate(["a", "b"], priority=[0, None]), "priority must be integers"),
        (lambda llm: llm.generate("a", priority=[1]), "scheduling_policy"),
        (lambda llm: llm.generate(b"abc"), "not bytes"),
        (lambda llm: llm.generate(None), "not NoneType"),
        (lambda llm: llm.generate(5), "not int"),
        (
            lambda llm: llm.chat([{"role": "user", "content": "a"}], tools=[{"type": "function"}]),
            "no place for tools",
        ),
        (lambda llm: llm.generate("a", {"max_tokens": 3}), "sampling_params must be"),
        (lambda llm: llm.generate(["a", "b"], [SamplingParams(), None]), "sampling_params must be"),
        (lambda llm: llm.chat({"role": "user", "content": "a"}), "messages must be"),
        (lambda llm: llm.generate("a", lora_request=object()), "LoRA"),
        (lambda llm: llm.chat([{"role": "user", "content": "a"}], lora_request=object()), "LoRA"),
        (lambda llm: SamplingParams(stop=5), "wrong type"),
        (lambda llm: SamplingParams(logit_bias={7: "x"}), "wrong type"),
        (lambda llm: SamplingParams(stop_token_ids=5), "wrong type"),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(make: Make, call: Callable[[LLM], object], what: str) -> None:
    llm, client = make()
    with pytest.raises(RequestError, match=what):
        call(llm)
    assert client.replay.seen == []
    assert llm.generate("a", use_tqdm=False, lora_request=None)


def test_lora_and_numpys_numbers(make: Make, folder: Path) -> None:
    with pytest.raises(NotSupportedError, match="LoRA"):
        LLM(str(folder), enable_lora=True)
    make(enable_lora=False)
    assert SamplingParams(temperature=np.float32(0.5)).temperature == 0.5


@pytest.mark.parametrize("overrides", [{"temprature": 1}, {"temperature": -1}, {"temperature": "hot"}])
def test_defaults_that_no_request_could_have(make: Make, overrides: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="override_generation_config"):
        make(override_generation_config=overrides)


def test_keywords_are_options(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = make(
        dtype="half", gpu_memory_utilization=0.85, max_num_seqs=128, swap_space=4, enforce_eager=True
    )
    assert llm.options == EngineOptions(
        model=llm.options.model,
        dtype="half",
        gpu_memory_utilization=0.85,
        max_num_seqs=128,
        swap_space=4,
        enforce_eager=True,
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_modl_len'"):
        make(max_modl_len=3)
    with pytest.raises(OptionError, match="gpu_memory_utilization"):
        make(gpu_memory_utilization=2)
    monkeypatch.setenv("KUBEINFER_TARGET_DEVICE", "cpu")
    assert make()[0].options.device == "cpu"
    assert make(device="cuda")[0].options.device == "cuda"


def test_the_end(make: Make) -> None:
    llm, client = make()
    llm.reset_prefix_cache()
    assert client.resets == 1
    with llm as inner:
        assert inner is llm
    llm.shutdown()
    assert client.closed == 1
    with pytest.raises(KubeinferError, match="shut down"):
        llm.generate("a", use_tqdm=False)
