"""Small tokenizers of each kind, made here: byte-level BPE, SentencePiece-like with byte fallback, WordPiece, slow."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from kubeinfer.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's a fine day, isn't it?",
    "Numbers: 1 22 333 4444, spaces    and\ttabs\nand lines.",
    "你好，请介绍一下你自己。今天天气怎么样？ こんにちは、世界。",
    "Smile 🙂 and 👩‍👩‍👧 family, café, naïve, Straße.",
]
BYTE_SPECIALS = ["<|end|>", "<|im_start|>", "<|im_end|>"]


@lru_cache
def byte_level() -> Tokenizer:
    """Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) with a few merges, so that code points fall apart often."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=BYTE_SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    return Tokenizer(backend=backend, special_tokens={"eos_token": "<|end|>"}, name="byte-level")


@lru_cache
def sentencepiece_like() -> Tokenizer:
    """As Llama 2's: words begin with a mark, unknown characters fall back to bytes, the first space is cut."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [
        "▁",
        "▁the",
        "▁a",
        "h",
        "e",
        "l",
        "o",
        "▁hello",
        "w",
        "r",
        "d",
        "▁world",
        "你",
        "好",
        ".",
        ",",
        "1",
        "s",
    ]
    vocab = {piece: index for index, piece in enumerate([*pieces, *words, "he", "ll", "hell", "hello"])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello")]
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend=backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}, name="spm")


@lru_cache
def word_piece() -> Tokenizer:
    """A decoder whose text depends on neighbours (spaces between words, ``##`` joins)."""
    words = ["[UNK]", "[CLS]", "[SEP]", "hello", "world", "##s", "##ing", "run", "the", "a", "."]
    backend = Backend(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    return Tokenizer(backend=backend, name="word-piece")


def slow_bytes() -> Any:
    """A tokenizer of transformers that is Python code (ByT5: ids are bytes plus three)."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


@lru_cache
def slow() -> Tokenizer:
    hf = slow_bytes()
    return Tokenizer(backend=None, hf=hf, special_tokens={"eos_token": "</s>"}, name="slow")
