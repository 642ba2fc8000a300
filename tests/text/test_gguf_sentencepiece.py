"""A SentencePiece model, written into a GGUF file as llama.cpp's converter does, tokenizes as SentencePiece does."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeinfer.text.tokenizer import Tokenizer, from_gguf
from text.small_tokenizers import CORPUS


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    types = []
    for index in range(spm.vocab_size()):
        kind = gguf.TokenType.NORMAL
        if spm.is_unknown(index):
            kind = gguf.TokenType.UNKNOWN
        elif spm.is_control(index):
            kind = gguf.TokenType.CONTROL
        elif spm.is_byte(index):
            kind = gguf.TokenType.BYTE
        types.append(kind)
    path: Path = tmp_path_factory.mktemp("gguf") / "spm.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([spm.id_to_piece(index) for index in range(spm.vocab_size())])
    writer.add_token_scores([spm.get_score(index) for index in range(spm.vocab_size())])
    writer.add_token_types(types)
    writer.add_bos_token_id(spm.bos_id())
    writer.add_eos_token_id(spm.eos_id())
    writer.add_unk_token_id(spm.unk_id())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return spm, from_gguf(path)


def check(pair: tuple[Any, Tokenizer], text: str) -> None:
    spm, ours = pair
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == spm.encode(text)
    assert ours.decode(ids) == spm.decode(ids) == text


@pytest.mark.parametrize(
    "text", [*CORPUS, "a  b   c", " lead", "trail ", "\n\n\t", "12345", "ж🙂ж", "the the the quick quick"]
)
def test_texts(pair: tuple[Any, Tokenizer], text: str) -> None:
    check(pair, text)


@given(text=st.text(st.sampled_from("The quickbrown fx1你好🙂 \n.,'"), min_size=1, max_size=40))
@settings(deadline=None, max_examples=300)
def test_any_text(pair: tuple[Any, Tokenizer], text: str) -> None:
    check(pair, text)
