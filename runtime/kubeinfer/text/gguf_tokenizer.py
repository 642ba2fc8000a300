"""A ``tokenizers.Tokenizer`` built from the vocabulary that a GGUF file carries.

``tokenizer.ggml.model`` names the kind (``gpt2``: byte-level BPE; ``llama``: SentencePiece BPE with scores) and
``tokenizer.ggml.pre`` how text is split before BPE. The split rules are the models' own, as published in their
tokenizer.json files and kept by llama.cpp under the names used here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from kubeinfer.errors import ModelLoadError
from kubeinfer.weights.readers import read_gguf

logger = logging.getLogger(__name__)

# Values of tokenizer.ggml.token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Names that llama.cpp gives to one and the same rule.
_REGEX_RULES = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe", "chatglm-bpe"), _LLAMA3
    ),
    **dict.fromkeys(("glm4", "pixtral"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    "tekken": _TEKKEN,
}
_DIGIT_RULES = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_GPT2_RULES = ("default", "gpt-2", "gpt2", "phi-2", "olmo", "jais", "mpt")
# Files from before tokenizer.ggml.pre: what the architecture's models use.
_OLD_FILES = {"qwen2": "qwen2", "qwen2moe": "qwen2", "qwen3": "qwen2"}
_IGNORE_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken", "pixtral")


@dataclass
class GgufTokenizer:
    """A GGUF file's tokenizer: ``backend``, the special tokens by their role, and the chat templates by name."""

    backend: Tokenizer
    special_tokens: dict[str, str] = field(default_factory=dict)
    eos_token_ids: list[int] = field(default_factory=list)
    chat_templates: dict[str, str] = field(default_factory=dict)


def load_gguf_tokenizer(path: str | Path) -> GgufTokenizer:
    """Read ``path``. Raises :class:`ModelLoadError` where it holds no tokenizer, or one of an unknown kind."""
    meta = read_gguf(Path(path)).metadata
    tokens = meta.get("tokenizer.ggml.tokens")
    kind = meta.get("tokenizer.ggml.model")
    if not tokens or kind is None:
        raise ModelLoadError(f"{path} holds no tokenizer; name the original model's folder with --tokenizer.")
    if kind == "gpt2":
        backend = _byte_level(meta, tokens, path)
    elif kind == "llama":
        backend = _sentencepiece(meta, tokens, path)
    else:
        raise ModelLoadError(
            f"{path}: tokenizer kind {kind!r} of GGUF is not supported (supported: gpt2, llama); "
            "name the original model's folder with --tokenizer."
        )
    _add_special_tokens(backend, meta, tokens)
    special = _special_tokens(meta, tokens)
    _set_post_processor(backend, meta, special, kind)
    eos = [
        int(meta[key])
        for key in (
            "tokenizer.ggml.eos_token_id",
            "tokenizer.ggml.eot_token_id",
            "tokenizer.ggml.eom_token_id",
        )
        if key in meta and 0 <= int(meta[key]) < len(tokens)
    ]
    templates = {"default": meta["tokenizer.chat_template"]} if "tokenizer.chat_template" in meta else {}
    for name in meta.get("tokenizer.chat_templates", []):
        if (text := meta.get(f"tokenizer.chat_template.{name}")) is not None:
            templates[name] = text
    return GgufTokenizer(backend, special, list(dict.fromkeys(eos)), templates)


def _byte_level(meta: dict[str, Any], tokens: list[str], path: str | Path) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("tokenizer.ggml.merges", [])]
    if not merges:
        raise ModelLoadError(
            f"{path} holds a BPE vocabulary without merges; name the tokenizer's folder with --tokenizer."
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    rule = meta.get("tokenizer.ggml.pre") or _OLD_FILES.get(str(meta.get("general.architecture")), "default")
    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=merges,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=rule in _IGNORE_MERGES,
        )
    )
    add_space = bool(meta.get("tokenizer.ggml.add_space_prefix", False))
    if rule in _REGEX_RULES:
        steps = [
            pre_tokenizers.Split(Regex(_REGEX_RULES[rule]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=add_space, use_regex=False),
        ]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=add_space, use_regex=True)]
        if rule in _DIGIT_RULES:
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        elif rule not in _GPT2_RULES:
            logger.warning(
                "%s: tokenizer.ggml.pre %r is not known, text is split by GPT-2's rule; if answers look wrong, "
                "name the original model's folder with --tokenizer.", path, rule,
            )  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if _REGEX_RULES.get(rule) is _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(meta: dict[str, Any], tokens: list[str], path: str | Path) -> Tokenizer:
    scores = meta.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ModelLoadError(
            f"{path} holds a SentencePiece vocabulary without scores; name the tokenizer's folder with --tokenizer."
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    types = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == _UNKNOWN), None)
    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges_of_scores(tokens, scores, types),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    if meta.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(steps)
    tail: list[Any] = [decoders.Strip(" ", 1, 0)] if len(steps) == 2 else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    return backend


def _merges_of_scores(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose joint piece scores best: as merges, pieces in order of score."""
    vocab = {
        token: index for index, token in enumerate(tokens) if types[index] not in (_CONTROL, _UNKNOWN, _BYTE)
    }
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, index in vocab.items():
        if types[index] in (_USER_DEFINED, _UNUSED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for _, _, _, left, right in ranked]


def _add_special_tokens(backend: Tokenizer, meta: dict[str, Any], tokens: list[str]) -> None:
    types = meta.get("tokenizer.ggml.token_type", [])
    ends = {
        meta.get(f"tokenizer.ggml.{role}_token_id")
        for role in ("bos", "eos", "eot", "eom", "padding", "unknown")
    }
    added = []
    for index, kind in enumerate(types):
        if kind in (_CONTROL, _UNKNOWN) or (kind == _USER_DEFINED and index in ends):
            added.append(AddedToken(tokens[index], special=True, normalized=False))
        elif kind == _USER_DEFINED:
            added.append(AddedToken(tokens[index], special=False, normalized=False))
    backend.add_tokens(added)
    backend.add_special_tokens([token for token in added if token.special])


def _special_tokens(meta: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    roles = {
        "bos_token": "bos",
        "eos_token": "eos",
        "unk_token": "unknown",
        "pad_token": "padding",
        "sep_token": "seperator",
    }
    special = {}
    for role, key in roles.items():
        index = meta.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and 0 <= int(index) < len(tokens):
            special[role] = tokens[int(index)]
    return special


def _set_post_processor(backend: Tokenizer, meta: dict[str, Any], special: dict[str, str], kind: str) -> None:
    add_bos = bool(
        meta.get(
            "tokenizer.ggml.add_bos_token",
            kind == "llama" or meta.get("tokenizer.ggml.pre") in ("llama3", "llama-v3", "llama-bpe"),
        )
    )
    add_eos = bool(meta.get("tokenizer.ggml.add_eos_token", False))
    bos = special.get("bos_token") if add_bos else None
    eos = special.get("eos_token") if add_eos else None
    if bos is None and eos is None:
        return
    single = " ".join(part for part in (bos, "$A", eos) if part)
    pair = " ".join(part for part in (bos, "$A", eos, "$B", eos) if part)
    used = {token: backend.token_to_id(token) for token in (bos, eos) if token}
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(used.items())
    )
