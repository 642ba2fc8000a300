"""Stop strings: found across token boundaries, nothing shown that later turns out to be part of one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeinfer.sampling_params import SamplingParams
from kubeinfer.text.detokenizer import Detokenizer, StopStrings
from text.small_tokenizers import byte_level, sentencepiece_like

SMALL = st.text("abc", min_size=0, max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """By brute force: where the text, read character by character, first ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return end - len(stop), stop
    return None


@given(text=SMALL, stops=STOPS, cuts=st.lists(st.integers(1, 4), max_size=30), include=st.booleans())
@settings(deadline=None, max_examples=500)
def test_stop_strings_against_brute_force(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    finder = StopStrings(stops, include)
    shown = ""
    rest = text
    for cut in [*cuts, len(text)]:
        shown += finder.push(rest[:cut])
        rest = rest[cut:]
        if finder.matched is not None:
            break
    else:
        shown += finder.finish()
    expected = first_stop(text, stops)
    if expected is None:
        assert finder.matched is None
        assert shown == text
    else:
        at, stop = expected
        assert finder.matched == stop
        assert shown == (text[: at + len(stop)] if include else text[:at])


@given(text=SMALL, stops=STOPS)
@settings(deadline=None, max_examples=300)
def test_no_more_is_held_back_than_needed(text: str, stops: list[str]) -> None:
    finder = StopStrings(stops, False)
    shown = ""
    for at, char in enumerate(text):
        shown += finder.push(char)
        if finder.matched is not None:
            return
        held = text[len(shown) : at + 1]
        assert text[: at + 1] == shown + held
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def run(
    ids: list[int], params: SamplingParams, step: int = 1, stopped: bool = False
) -> tuple[str, int, str | None]:
    detokenizer = Detokenizer(byte_level(), [4], params)
    text, used = "", 0
    for at in range(0, len(ids), step):
        part = ids[at : at + step]
        last = at + step >= len(ids)
        new, count = detokenizer.finish(part, stopped) if last else detokenizer.push(part)
        text += new
        used += count
        if detokenizer.stop_string is not None:
            break
    return text, used, detokenizer.stop_string


@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_a_stop_string_over_several_tokens_ends_the_sequence_at_its_last_token(step: int) -> None:
    ids = byte_level().encode("Hello. 用户: next", add_special_tokens=False)
    text, used, stop = run(ids, SamplingParams(stop=["用户:", "助手:"]), step)
    assert text == "Hello. "
    assert stop == "用户:"
    assert byte_level().decode(ids[:used]) == "Hello. 用户:"


def test_a_stop_string_inside_a_token_cuts_the_token() -> None:
    ids = byte_level().encode("The quick brown", add_special_tokens=False)
    text, used, stop = run(ids, SamplingParams(stop="ic"))
    assert (text, stop) == ("The qu", "ic")
    assert byte_level().decode(ids[:used]).startswith("The quic")


def test_include_stop_str_in_output() -> None:
    ids = byte_level().encode("ab END cd", add_special_tokens=False)
    assert run(ids, SamplingParams(stop="END", include_stop_str_in_output=True))[0] == "ab END"


def test_held_back_text_is_given_out_at_the_end() -> None:
    ids = byte_level().encode("ab EN", add_special_tokens=False)
    assert run(ids, SamplingParams(stop="END")) == ("ab EN", len(ids), None)


def test_min_tokens_lets_early_stop_strings_pass() -> None:
    ids = byte_level().encode("xxyxxy", add_special_tokens=False)
    assert len(ids) == 6
    assert run(ids, SamplingParams(stop="y"))[:2] == ("xx", 3)
    assert run(ids, SamplingParams(stop="y", min_tokens=4))[:2] == ("xxyxx", 6)
    # One that begins before min_tokens and ends after it counts.
    assert run(ids, SamplingParams(stop="yxx", min_tokens=4))[:2] == ("xx", 5)
    # As in vLLM, one that ends with the last of min_tokens does not.
    assert run(ids, SamplingParams(stop="yxx", min_tokens=5))[:2] == ("xxyxxy", 6)


def test_the_token_that_ended_a_sequence_is_not_text_unless_asked_for() -> None:
    ids = byte_level().encode("ab", add_special_tokens=False)
    end = byte_level().token_to_id("<tool call>")
    assert end is not None
    assert run([*ids, end], SamplingParams(), stopped=True)[0] == "ab"
    assert run([*ids, end], SamplingParams(), stopped=False)[0] == "ab<tool call>"
    assert (
        run([*ids, end], SamplingParams(include_stop_str_in_output=True), stopped=True)[0] == "ab<tool call>"
    )


def test_an_open_code_point_shows_as_replacement_at_the_end() -> None:
    ids = byte_level().encode("a🙂", add_special_tokens=False)
    assert run(ids[:-1], SamplingParams())[0] == "a\ufffd"


def test_stop_strings_with_byte_fallback() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer.encode("hello 世界.", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, [1], SamplingParams(stop="界"))
    text = ""
    for token_id in ids:
        text += detokenizer.push([token_id])[0]
        if detokenizer.stop_string:
            break
    assert text == "hello 世"
