"""Text to token ids and back, whatever the tokenizer is made of.

A folder with a byte-level ``tokenizer.json`` and a GGUF file are read with the ``tokenizers`` library alone, which
takes a tenth of a second; everything else goes through transformers' ``AutoTokenizer``, which takes some seconds to
import (it brings torch). :meth:`Tokenizer.to_transformers` gives a transformers tokenizer in either case.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from kubeinfer.errors import ModelLoadError, OptionError
from kubeinfer.options import EngineOptions
from kubeinfer.text.gguf_tokenizer import load_gguf_tokenizer
from kubeinfer.text.token_decoder import DecodeStream, TokenDecoder, WindowDecoder, decoder_for

ChatTemplates = dict[str, str]  # by name; "default" is the one used when none is named

# Characters from which on a text is tokenized by the call that lets other threads run (encode() holds the GIL).
LONG_TEXT = 2048

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# One of these is in every folder that holds a tokenizer.
_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "tekken.json", "*.model")
_SMALLEST = 16  # tokens; below it a vocabulary file must be missing
# Classes that add nothing to what a byte-level tokenizer.json says.
_PLAIN_CLASSES = {
    "PreTrainedTokenizer",
    "TokenizersBackend",
    "Qwen2Tokenizer",
    "GPT2Tokenizer",
    "LlamaTokenizer",
    "GPTNeoXTokenizer",
}


class Tokenizer:
    """One model's tokenizer.

    ``special_tokens`` maps roles (``bos_token``...) to their text, ``all_special_ids`` are the ids that
    ``skip_special_tokens`` skips, ``eos_token_ids`` end a sequence, ``vocab_size`` is the highest id plus one.
    """

    def __init__(
        self,
        *,
        backend: Backend | None,
        hf: Any = None,
        special_tokens: dict[str, str] | None = None,
        chat_templates: ChatTemplates | None = None,
        eos_token_ids: list[int] | None = None,
        name: str = "",
    ):
        if backend is None and hf is None:
            raise ValueError("either backend or hf must be given")
        self.name = name
        self.special_tokens = special_tokens or {}
        self.chat_templates = chat_templates or {}
        self._backend = backend
        self._hf = hf
        # A model's own class may do more to a text than its backend does.
        self._encode_hf = backend is None or not (
            hf is None or type(hf).__module__.startswith("transformers.")
        )
        self._most_characters: int | None = None
        self.decoder: TokenDecoder
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
            self.decoder = decoder_for(backend)
            added = backend.get_added_tokens_decoder()
            self.all_special_ids = frozenset(i for i, token in added.items() if token.special)
            self.vocab_size = max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        else:
            self.all_special_ids = frozenset(hf.all_special_ids)
            self.vocab_size = len(hf)

            def decode(ids: list[int], skip_special_tokens: bool) -> str:
                return str(
                    hf.decode(
                        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
                    )
                )

            self.decoder = WindowDecoder(decode, self.all_special_ids)
        self.bos_token_id = self._role_id("bos_token")
        self.eos_token_id = self._role_id("eos_token")
        ends = [*(eos_token_ids or []), *([] if self.eos_token_id is None else [self.eos_token_id])]
        self.eos_token_ids: list[int] = list(dict.fromkeys(ends))

    def _role_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.token_to_id(token)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, None where there is none."""
        if self._backend is not None:
            return self._backend.token_to_id(token)
        index = self._hf.convert_tokens_to_ids(token)
        return index if isinstance(index, int) and self._hf.convert_ids_to_tokens(index) == token else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written in the text are recognised."""
        if self._backend is not None and not self._encode_hf:
            if len(text) > LONG_TEXT:
                return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return list(self._hf.encode(text, add_special_tokens=add_special_tokens))

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """:meth:`encode` of several texts, on all cores where the tokenizer can."""
        if self._backend is not None and not self._encode_hf:
            batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in batch]
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence, equal to what :meth:`stream` gives piece by piece without a prompt."""
        return self.decoder.decode(ids, skip_special_tokens)

    def stream(
        self,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> DecodeStream:
        """A decoder of what follows ``prompt_token_ids``, token by token."""
        return self.decoder.stream(prompt_token_ids, skip_special_tokens, spaces_between_special_tokens)

    def piece(self, token_id: int) -> str:
        """The text of one token (part of a code point shows as U+FFFD)."""
        return self.decoder.piece(token_id)

    def piece_bytes(self, token_id: int) -> bytes:
        """The bytes of one token."""
        return self.decoder.piece_bytes(token_id)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it."""
        if self._backend is not None:
            return self._backend.id_to_token(token_id)
        token = self._hf.convert_ids_to_tokens(token_id)
        return token if isinstance(token, str) else None

    def least_tokens(self, text: str) -> int:
        """A count that no tokenization of ``text`` is below: a cheap look before an expensive one. 0: not known."""
        if self._most_characters is None:
            self._most_characters = (
                0 if self._backend is None or self._encode_hf else _most_characters(self._backend)
            )
        return -(-len(text) // self._most_characters) if self._most_characters else 0

    def to_transformers(self) -> Any:
        """A transformers tokenizer that gives the same ids and holds the chat template. Imports transformers."""
        if self._hf is None and Path(self.name).is_dir():
            from transformers import AutoTokenizer

            self._hf = AutoTokenizer.from_pretrained(self.name)
        elif self._hf is None:
            from transformers import PreTrainedTokenizerFast

            templates: Any = self.chat_templates or None
            if list(self.chat_templates) == ["default"]:
                templates = self.chat_templates["default"]
            self._hf = PreTrainedTokenizerFast(
                tokenizer_object=self._backend,
                chat_template=templates,
                name_or_path=self.name,
                **self.special_tokens,
            )
        return self._hf


def _most_characters(backend: Backend) -> int:
    """The most characters of text that one token can stand for; 0 where the normalizer may drop any number."""
    normalizer = backend.normalizer
    kind = type(normalizer).__name__
    if normalizer is not None and kind not in ("NFC", "Prepend"):
        return 0
    longest = max(map(len, backend.get_vocab(with_added_tokens=True)), default=0)
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return 0  # such a token swallows all the space beside it
    return longest * (4 if kind == "NFC" else 1)  # composition: at most a few characters become one


def load_tokenizer(options: EngineOptions, model_path: str | Path) -> Tokenizer:
    """The tokenizer that ``options`` name, or that of the model at ``model_path`` (a folder or a GGUF file).

    Raises :class:`ModelLoadError` where there is none or it needs ``trust_remote_code``.
    """
    path = Path(model_path)
    if options.tokenizer is not None:
        path = _resolve(options.tokenizer, options)
    if path.is_file() and path.suffix == ".gguf":
        return from_gguf(path)
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        raise ModelLoadError(
            f"tokenizer {path} does not exist; name a folder, a GGUF file or ORG/NAME with --tokenizer."
        )
    return from_folder(
        path, trust_remote_code=options.trust_remote_code, slow=options.tokenizer_mode == "slow"
    )


def _resolve(name: str, options: EngineOptions) -> Path:
    path = Path(name)
    if path.exists():
        return path
    from kubeinfer.weights.locate import resolve_model_path

    return resolve_model_path(
        name, revision=options.tokenizer_revision, download_dir=options.download_dir, weights=False
    )


def from_gguf(path: Path) -> Tokenizer:
    """The tokenizer inside a GGUF file."""
    gguf = load_gguf_tokenizer(path)
    return Tokenizer(
        backend=gguf.backend,
        special_tokens=gguf.special_tokens,
        chat_templates=gguf.chat_templates,
        eos_token_ids=gguf.eos_token_ids,
        name=str(path),
    )


def from_folder(path: Path, *, trust_remote_code: bool = False, slow: bool = False) -> Tokenizer:
    """The tokenizer of a model folder."""
    config = _read_json(path / "tokenizer_config.json")
    if not slow and _is_plain(path, config):
        return _from_tokenizer_json(path, config)
    return _from_transformers(path, config, trust_remote_code=trust_remote_code, slow=slow)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise ModelLoadError(f"{path} cannot be read ({exc}); download the model again.") from None
    return value if isinstance(value, dict) else {}


def _is_plain(path: Path, config: dict[str, Any]) -> bool:
    """Whether tokenizer.json alone says all that transformers would make of the folder."""
    name = str(config.get("tokenizer_class") or "")
    if not (path / "tokenizer.json").is_file() or name.removesuffix("Fast") not in _PLAIN_CLASSES:
        return False
    return not (
        config.get("auto_map")
        or config.get("add_bos_token")
        or config.get("add_eos_token")
        or config.get("fix_mistral_regex")
    )


def _from_tokenizer_json(path: Path, config: dict[str, Any]) -> Tokenizer:
    try:
        backend = Backend.from_file(str(path / "tokenizer.json"))
    except Exception as exc:  # the library raises bare Exception
        raise ModelLoadError(
            f"{path / 'tokenizer.json'} cannot be read ({exc}); download the model again."
        ) from None
    if type(backend.decoder).__name__ != "ByteLevel":
        return _from_transformers(path, config, trust_remote_code=False, slow=False)
    special = {role: text for role in _ROLES if (text := _token_text(config.get(role))) is not None}
    _add_configured_tokens(backend, config, special)
    return Tokenizer(
        backend=backend, special_tokens=special, chat_templates=_chat_templates(path, config), name=str(path)
    )


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _add_configured_tokens(backend: Backend, config: dict[str, Any], special: dict[str, str]) -> None:
    """Tokens that tokenizer_config.json names and tokenizer.json does not have as special."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder") or {}
    plain: list[AddedToken] = []
    marked: list[AddedToken] = []
    for _, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        if entry.get("content") in known or not entry.get("content"):
            continue
        flags = {
            key: bool(entry[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in entry
        }
        token = AddedToken(entry["content"], special=bool(entry.get("special")), **flags)
        (marked if token.special else plain).append(token)
    backend.add_tokens(plain)
    backend.add_special_tokens(marked)
    named = [*special.values()]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named += [
        text
        for value in (extra.values() if isinstance(extra, dict) else extra)
        if (text := _token_text(value))
    ]
    is_special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in named if text not in is_special]
    )


def _chat_templates(path: Path, config: dict[str, Any]) -> ChatTemplates:
    """Templates of a model folder: chat_template.jinja and additional_chat_templates/, else the configuration's."""
    templates: ChatTemplates = {}
    value = config.get("chat_template")
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        templates.update({str(entry["name"]): str(entry["template"]) for entry in value})
    elif not value and (legacy := _read_json(path / "chat_template.json").get("chat_template")):
        templates["default"] = str(legacy)
    try:
        if (path / "chat_template.jinja").is_file():
            templates["default"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
        for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
            templates[file.stem] = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise ModelLoadError(f"{path}: its chat template cannot be read ({exc}).") from None
    return templates


def _from_transformers(
    path: Path, config: dict[str, Any], *, trust_remote_code: bool, slow: bool
) -> Tokenizer:
    from transformers import AutoTokenizer

    if _has_remote_code(config) and not trust_remote_code:
        raise ModelLoadError(
            f"{path}: the tokenizer is Python code that came with the model; read it, then allow it with --trust-remote-code."
        )
    if not any(True for pattern in _FILES for _ in path.glob(pattern)):
        # transformers would make an empty tokenizer of nothing.
        raise ModelLoadError(
            f"{path} holds no tokenizer (no tokenizer.json, tokenizer.model or vocab.json); name one with --tokenizer."
        )
    try:
        hf = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, use_fast=not slow)
    except ImportError as exc:
        raise ModelLoadError(f"{path}: the tokenizer needs a package that is not installed: {exc}") from exc
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ModelLoadError(
            f"{path} holds no tokenizer that can be read ({reason}); name one with --tokenizer."
        ) from exc
    if len(hf) < _SMALLEST:
        raise ModelLoadError(
            f"{path} holds a tokenizer of {len(hf)} tokens: its vocabulary is missing; download the model again, or "
            "name a tokenizer with --tokenizer."
        )
    backend = None if slow else getattr(hf, "_tokenizer", None)
    special = {role: str(hf.special_tokens_map[role]) for role in _ROLES if hf.special_tokens_map.get(role)}
    template = getattr(hf, "chat_template", None)
    templates = dict(template) if isinstance(template, dict) else {"default": template} if template else {}
    return Tokenizer(
        backend=backend if isinstance(backend, Backend) else None,
        hf=hf,
        special_tokens=special,
        chat_templates=templates,
        name=str(path),
    )


def _has_remote_code(config: dict[str, Any]) -> bool:
    auto_map = config.get("auto_map")
    return bool(auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map)


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise :class:`OptionError` for a tokenizer that can produce ids that the model has no embedding for.

    Tokens that a tokenizer adds beyond the model's vocabulary and that no text produces by itself are common, so only
    a tokenizer that is larger by far is refused; single prompts are checked one by one.
    """
    if tokenizer.vocab_size > model_vocab_size + 1024:
        raise OptionError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens and the model only {model_vocab_size}: "
            "it is another model's; check --tokenizer.",
            "tokenizer",
        )
