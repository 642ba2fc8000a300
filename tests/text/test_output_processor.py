"""The engine's tokens become the outputs that users read, whole or as deltas."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeinfer.engine.messages import EngineOutput, TokenLogprobs
from kubeinfer.outputs import RequestOutput
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.text.input_processor import InputProcessor, ProcessedRequest
from kubeinfer.text.output_processor import OutputProcessor
from text.small_tokenizers import byte_level


def request(name: str = "r", **params: Any) -> ProcessedRequest:
    tokenizer = byte_level()
    inputs = InputProcessor(tokenizer, max_model_len=1000, vocab_size=tokenizer.vocab_size)
    return inputs.process("Hi", SamplingParams(**params), name)


def outputs(
    ids: list[int], reason: str | None = "length", name: str = "r", step: int = 1
) -> list[EngineOutput]:
    made = [EngineOutput(name, ids[at : at + step]) for at in range(0, len(ids), step)]
    if reason is not None:
        made[-1].finish_reason = reason
    return made


def joined(parts: list[RequestOutput], index: int = 0) -> tuple[str, list[int]]:
    mine = [out for part in parts for out in part.outputs if out.index == index]
    return "".join(out.text for out in mine), [token_id for out in mine for token_id in out.token_ids]


def stream(
    processor: OutputProcessor, state: Any, outs: list[EngineOutput], take_every: int = 1
) -> list[RequestOutput]:
    parts = []
    for at, out in enumerate(outs):
        processor.process([out], float(at + 1))
        if at % take_every == 0 or state.unfinished == 0:
            parts.append(state.take())
        if state.unfinished == 0:
            break
    return parts


@given(data=st.data(), step=st.integers(1, 4), every=st.integers(1, 5), stops=st.booleans())
@settings(deadline=None, max_examples=150)
def test_deltas_add_up_to_the_whole(data: st.DataObject, step: int, every: int, stops: bool) -> None:
    ids = data.draw(st.lists(st.integers(4, byte_level().vocab_size - 1), min_size=1, max_size=40))
    params: dict[str, Any] = {"stop": ["a", "th", "好"]} if stops else {}
    whole, deltas = OutputProcessor(byte_level(), False), OutputProcessor(byte_level(), True)
    collected = whole.add(request(**params))
    streamed = deltas.add(request(**params))
    whole.process(outputs(ids, step=step), 0.0)
    parts = stream(deltas, streamed, outputs(ids, step=step), every)
    out = collected.whole().outputs[0]
    assert joined(parts) == (out.text, out.token_ids)
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].outputs[0].finish_reason == out.finish_reason
    assert parts[-1].outputs[0].stop_reason == out.stop_reason
    if not stops:
        assert byte_level().decode([*parts[0].prompt_token_ids, *ids]) == "Hi" + out.text
    assert whole.num_unfinished == deltas.num_unfinished == 0


def test_a_stop_string_aborts_in_the_engine_and_later_tokens_are_dropped() -> None:
    processor = OutputProcessor(byte_level(), True)
    state = processor.add(request(stop="END"))
    ids = byte_level().encode("ab END cd", add_special_tokens=False)
    aborts = [name for out in outputs(ids, None) for name in processor.process([out], 1.0)[1]]
    assert aborts == ["r"]
    part = state.take()
    assert (part.outputs[0].text, part.outputs[0].finish_reason, part.outputs[0].stop_reason) == (
        "ab ",
        "stop",
        "END",
    )
    assert part.finished
    assert processor.process(outputs(ids), 1.0) == ([], [])


def test_a_stop_string_in_the_engine_s_last_output_needs_no_abort() -> None:
    processor = OutputProcessor(byte_level(), False)
    state = processor.add(request(stop="END"))
    touched, aborts = processor.process(outputs(byte_level().encode("ab END"), "length", step=100), 1.0)
    assert (touched, aborts) == ([state], [])
    assert state.whole().outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("streaming", [False, True])
def test_end_of_sequence_token_is_in_the_ids_and_not_in_the_text(streaming: bool) -> None:
    processor = OutputProcessor(byte_level(), streaming)
    state = processor.add(request(skip_special_tokens=False))
    ids = [*byte_level().encode("ab"), byte_level().eos_token_id or 0]
    processor.process([EngineOutput("r", ids, "stop")], 1.0)
    out = (state.take() if streaming else state.whole()).outputs[0]
    assert (out.text, out.token_ids, out.finish_reason, out.stop_reason) == ("ab", ids, "stop", None)


def test_n_outputs_finish_one_by_one() -> None:
    processor = OutputProcessor(byte_level(), True)
    state = processor.add(request(n=2))
    ids = byte_level().encode("xyz")
    processor.process(outputs(ids, "length", "r#1"), 1.0)
    first = state.take()
    assert [out.index for out in first.outputs] == [1]
    assert first.outputs[0].finish_reason == "length"
    assert not first.finished
    assert state.engine_ids() == ["r#0"]
    processor.process(outputs(ids[:1], "stop", "r#0"), 2.0)
    last = state.take()
    assert ([out.index for out in last.outputs], last.finished) == ([0], True)


@pytest.mark.parametrize("streaming", [False, True])
def test_logprobs_with_the_tokens_text(streaming: bool) -> None:
    processor = OutputProcessor(byte_level(), streaming)
    state = processor.add(request(logprobs=2, prompt_logprobs=1))
    x, y, z = (byte_level().encode(char)[0] for char in "xyz")
    prompt = [None, TokenLogprobs([x, y], [-3.0, -0.5], 4)]
    processor.process(
        [EngineOutput("r", [x], None, None, [TokenLogprobs([x, x, y], [-0.1, -0.1, -2.5], 1)], prompt, 16)],
        1.0,
    )
    parts = [state.take()] if streaming else []
    processor.process(
        [EngineOutput("r", [z], "length", None, [TokenLogprobs([z, x, y], [-4.0, -0.2, -1.0], 7)])], 2.0
    )
    parts.append(state.take() if streaming else state.whole())
    logprobs = [entry for part in parts for entry in part.outputs[0].logprobs or []]
    assert [list(entry) for entry in logprobs] == [[x, y], [z, x, y]]
    assert [(lp.logprob, lp.rank, lp.decoded_token) for lp in logprobs[1].values()] == [
        (-4.0, 7, "z"),
        (-0.2, 1, "x"),
        (-1.0, 2, "y"),
    ]
    assert logprobs[0][x].rank == 1
    assert parts[-1].outputs[0].cumulative_logprob == pytest.approx(-4.1)
    assert parts[0].num_cached_tokens == 16
    assert parts[0].prompt_logprobs is not None
    assert parts[0].prompt_logprobs[0] is None
    second = parts[0].prompt_logprobs[1]
    assert second is not None
    assert [(lp.rank, lp.decoded_token) for lp in second.values()] == [(4, "x"), (1, "y")]
    if streaming:
        assert parts[1].prompt_logprobs is None


def test_logprobs_stop_where_a_stop_string_does() -> None:
    processor = OutputProcessor(byte_level(), False)
    state = processor.add(request(logprobs=0, stop="y"))
    ids = byte_level().encode("xyz")
    assert len(ids) == 3
    processor.process([EngineOutput("r", ids, None, None, [TokenLogprobs([i], [-1.0], 1) for i in ids])], 1.0)
    out = state.whole().outputs[0]
    assert (out.text, len(out.token_ids), len(out.logprobs or []), out.cumulative_logprob) == (
        "x",
        2,
        2,
        -2.0,
    )


def test_without_detokenize_there_is_no_text() -> None:
    for streaming in (False, True):
        processor = OutputProcessor(byte_level(), streaming)
        state = processor.add(request(detokenize=False, logprobs=0))
        processor.process([EngineOutput("r", [9], "length", None, [TokenLogprobs([9], [-1.0], 1)])], 1.0)
        out = (state.take() if streaming else state.whole()).outputs[0]
        assert (out.text, out.token_ids) == ("", [9])
        assert out.logprobs is not None
        assert out.logprobs[0][9].decoded_token is None
        assert state.samples[0].detokenizer is None


def test_times_of_a_request() -> None:
    processor = OutputProcessor(byte_level(), True)
    state = processor.add(request())
    processor.process([EngineOutput("r", [9], scheduled_time=0.5)], 1.0)
    processor.process([EngineOutput("r", [9])], 1.25)
    processor.process([EngineOutput("r", [9], "length")], 1.75)
    assert (state.scheduled_time, state.first_token_time, state.last_token_time) == (0.5, 1.0, 1.75)
    assert list(state.inter_token_times) == [0.25, 0.5]
    assert state.num_output_tokens == 3


def test_removed_requests_are_forgotten() -> None:
    processor = OutputProcessor(byte_level(), True)
    state = processor.add(request(n=2))
    processor.process(outputs([9], "stop", "r#0"), 1.0)
    assert processor.remove(state) == ["r#1"]
    assert processor.num_unfinished == 0
    assert [sample.finish_reason for sample in state.samples] == ["stop", "abort"]
    assert processor.remove(state) == []
    assert processor.process(outputs([9], None, "r#1"), 1.0) == ([], [])


def test_ids_in_flight_are_not_given_twice() -> None:
    processor = OutputProcessor(byte_level(), True)
    processor.add(request())
    with pytest.raises(ValueError, match="in flight"):
        processor.add(request())
    assert processor.num_unfinished == 1


def test_an_engine_error_is_kept() -> None:
    processor = OutputProcessor(byte_level(), True)
    state = processor.add(request())
    processor.process([EngineOutput("r", [], "error", error="broke")], 1.0)
    assert state.error == "broke"
    assert state.take().outputs[0].finish_reason == "error"
