"""What is given out token by token adds up to the whole, for any ids and any tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.smollm2 import needs_smollm2
from fixtures.tiny_models import smollm2_gguf
from kubeinfer.text.token_decoder import ByteDecoder, WindowDecoder
from kubeinfer.text.tokenizer import Tokenizer, from_gguf
from text.small_tokenizers import byte_level, sentencepiece_like, slow, word_piece

ids_below = lambda size: st.lists(st.integers(0, size - 1), max_size=60)  # noqa: E731
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def in_pieces(
    tokenizer: Tokenizer, ids: Sequence[int], skip: bool, prompt: Sequence[int] = (), step: int = 1
) -> str:
    stream = tokenizer.stream(prompt, skip_special_tokens=skip)
    parts = [stream.push(ids[at : at + step]) for at in range(0, len(ids), step)]
    return "".join(parts) + stream.finish()


@given(data=st.data(), skip=st.booleans(), step=st.integers(1, 5))
@settings(deadline=None, max_examples=300)
def test_byte_level_pieces_add_up_to_the_library_s_own_decode(
    data: st.DataObject, skip: bool, step: int
) -> None:
    tokenizer = byte_level()
    ids = data.draw(ids_below(tokenizer.vocab_size))
    assert isinstance(tokenizer.decoder, ByteDecoder)
    expected = tokenizer._backend.decode(ids, skip_special_tokens=skip)  # type: ignore[union-attr]
    assert in_pieces(tokenizer, ids, skip, step=step) == expected
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@given(data=st.data(), step=st.integers(1, 5))
@settings(deadline=None, max_examples=200)
def test_pieces_after_a_prompt_continue_its_text(data: st.DataObject, step: int) -> None:
    tokenizer = byte_level()
    prompt = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=10))
    ids = data.draw(ids_below(tokenizer.vocab_size))
    whole = tokenizer.decode([*prompt, *ids])
    # A code point that the prompt leaves open belongs to what follows.
    text = in_pieces(tokenizer, ids, True, prompt, step)
    assert whole.endswith(text)
    assert tokenizer.decode(prompt).rstrip("\ufffd") in (
        whole[: len(whole) - len(text)],
        whole[: len(whole) - len(text)].rstrip("\ufffd"),
    )


@given(data=st.data(), skip=st.booleans(), step=st.integers(1, 5))
@settings(deadline=None, max_examples=300)
def test_byte_fallback_pieces_add_up(data: st.DataObject, skip: bool, step: int) -> None:
    tokenizer = sentencepiece_like()
    assert isinstance(tokenizer.decoder, ByteDecoder)
    ids = data.draw(ids_below(tokenizer.vocab_size))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert in_pieces(tokenizer, ids, skip, step=step) == whole
    expected = tokenizer._backend.decode(ids, skip_special_tokens=skip)  # type: ignore[union-attr]
    if (
        "\ufffd" not in expected
    ):  # the library spoils a whole run of bytes for one wrong byte; here only that byte
        assert whole == expected


@given(text=TEXTS, skip=st.booleans())
@settings(deadline=None, max_examples=200)
def test_any_text_comes_back(text: str, skip: bool) -> None:
    for tokenizer in (byte_level(), sentencepiece_like()):
        if any(special in text for special in ("<", ">", "▁")):
            continue
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert in_pieces(tokenizer, ids, skip) == text


@given(data=st.data(), step=st.integers(1, 3))
@settings(deadline=None, max_examples=200)
def test_window_decoder_adds_up_for_word_pieces(data: st.DataObject, step: int) -> None:
    tokenizer = word_piece()
    assert isinstance(tokenizer.decoder, WindowDecoder)
    ids = data.draw(ids_below(tokenizer.vocab_size))
    assert in_pieces(tokenizer, ids, True, step=step) == tokenizer.decode(ids)


@given(text=TEXTS)
@settings(deadline=None, max_examples=100)
def test_window_decoder_adds_up_for_a_slow_tokenizer(text: str) -> None:
    tokenizer = slow()
    ids = [byte + 3 for byte in text.encode()]
    assert in_pieces(tokenizer, ids, True) == text


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like, slow])
def test_nothing_of_a_code_point_shows_before_it_is_whole(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    ids = tokenizer.encode("ab🙂c", add_special_tokens=False)
    if tokenizer.name == "slow":
        ids = [byte + 3 for byte in "ab🙂c".encode()]
    prompt = tokenizer.encode("x", add_special_tokens=False) if tokenizer.name != "slow" else [123]
    stream = tokenizer.stream(prompt)
    shown = [stream.push([token_id]) for token_id in ids]
    assert "".join(shown).strip() == "ab🙂c"
    assert all("\ufffd" not in part for part in shown)


def test_a_leading_space_is_kept_after_a_prompt_and_cut_without_one() -> None:
    tokenizer = sentencepiece_like()
    hello = tokenizer.token_to_id("▁hello")
    bos = tokenizer.token_to_id("<s>")
    world = tokenizer.token_to_id("▁world")
    assert hello is not None
    assert bos is not None
    assert world is not None
    assert in_pieces(tokenizer, [hello, world], True) == "hello world"
    assert in_pieces(tokenizer, [hello, world], True, prompt=[bos]) == "hello world"
    assert in_pieces(tokenizer, [world], True, prompt=[bos, hello]) == " world"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a<|im_end|>b<tool call>", add_special_tokens=False)
    assert in_pieces(tokenizer, ids, True) == "ab<tool call>"
    assert in_pieces(tokenizer, ids, False) == "a<|im_end|>b<tool call>"


def test_spaces_between_special_tokens_can_be_left_out() -> None:
    tokenizer = word_piece()
    cls, sep, hello = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "hello"))
    ids = [hello, cls, sep, hello]
    for spaces, expected in ((True, "hello [CLS] [SEP] hello"), (False, "hello [CLS][SEP] hello")):
        stream = tokenizer.stream([], False, spaces)
        assert (
            "".join(stream.push([token_id]) for token_id in ids if token_id is not None) + stream.finish()
            == expected
        )


def test_single_pieces() -> None:
    tokenizer = byte_level()
    smile = tokenizer.encode("🙂", add_special_tokens=False)
    assert b"".join(tokenizer.piece_bytes(token_id) for token_id in smile) == "🙂".encode()
    assert tokenizer.piece(smile[0]).startswith("\ufffd")
    the = tokenizer.encode(" the", add_special_tokens=False)
    assert tokenizer.piece(the[0]).startswith(" ")
    spm = sentencepiece_like()
    assert spm.piece(spm.token_to_id("▁hello") or 0) == " hello"
    assert spm.piece_bytes(spm.token_to_id("<0xE4>") or 0) == b"\xe4"


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    tokenizer = byte_level()
    assert in_pieces(tokenizer, [*tokenizer.encode("ab"), 10**6], True) == "ab"


@needs_smollm2
def test_smollm2_random_ids_and_cost() -> None:
    import random

    path = smollm2_gguf()
    assert path is not None
    tokenizer = from_gguf(path)
    draw = random.Random(1)
    ids = [draw.randrange(tokenizer.vocab_size) for _ in range(20_000)]
    assert in_pieces(tokenizer, ids, True) == tokenizer._backend.decode(ids)  # type: ignore[union-attr]
    stream = tokenizer.stream([])
    start = time.process_time()
    for token_id in ids:
        stream.push((token_id,))
    assert (time.process_time() - start) / len(ids) < 15e-6


def test_cost_a_token_does_not_grow_with_the_text() -> None:
    """A text of open code points only is the worst case: nothing can be given out for long."""
    tokenizer = slow()
    stream = tokenizer.stream([])
    first: list[float] = []
    for at in range(2000):
        start = time.process_time()
        stream.push([0xF0 + 3])
        first.append(time.process_time() - start)
        if at == 1999:
            early, late = sorted(first[100:600])[250], sorted(first[1500:])[250]
            assert late < 5 * early + 1e-4
