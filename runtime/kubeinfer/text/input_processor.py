"""A prompt and sampling parameters, checked and made into what the engine runs."""

from __future__ import annotations

import difflib
import logging
import secrets
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec
import numpy

from kubeinfer.engine.messages import EngineRequest
from kubeinfer.errors import ContextLengthError, OptionError, RequestError
from kubeinfer.sampling_params import INT64, SamplingParams
from kubeinfer.text.tokenizer import LONG_TEXT, Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Mapping[str, Any] | Sequence[int]

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "add_special_tokens", "cache_salt")
_FEW_IDS = 1024
_SEED_MASK = 2**63 - 1
# generation_config.json's names of the sampling parameters that it gives defaults for.
_GENERATION_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
# The sampling parameters that a generation_config can give defaults for.
DEFAULTED_PARAMS = tuple(_GENERATION_DEFAULTS.values())


@dataclass(slots=True)
class ProcessedRequest:
    """A request ready for the engine. ``engine_requests`` has one entry an output (``params.n``)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    engine_requests: list[EngineRequest]


def _defaults_in(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, RequestError | None]]:
    """Key and parameter of each default that a generation_config sets, its value, and why no request may have that."""
    for key, name in _GENERATION_DEFAULTS.items():
        if (value := config.get(key)) is None:
            continue
        wrong = None
        try:
            SamplingParams(**{name: value})
        except RequestError as exc:
            wrong = exc
        yield key, name, value, wrong


def default_sampling_params(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that a model's generation_config sets, by ``SamplingParams``' names."""
    found = {}
    for key, name, value, wrong in _defaults_in(generation_config):
        if wrong is None:
            found[name] = value
        else:  # no request is at fault for it
            logger.warning("generation_config: %s is left out: %s", key, wrong)
    return found


def check_overrides(overrides: Mapping[str, Any] | None) -> None:
    """Raises :class:`OptionError` for what ``override_generation_config`` sets without effect, or to a value that no request may have."""
    overrides = overrides or {}
    known = [*_GENERATION_DEFAULTS, "eos_token_id"]
    for key in overrides:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"what has one: {', '.join(known)}."
            raise OptionError(
                f"override_generation_config: {key!r} has no effect; {hint}", "override_generation_config"
            )
    for _, _, _, wrong in _defaults_in(overrides):
        if wrong is not None:
            raise OptionError(f"override_generation_config: {wrong}", "override_generation_config") from wrong


def spread_seed(seed: int, index: int) -> int:
    """The seed of a request's output ``index``: ``seed`` itself for the first, unrelated ones after it (splitmix64)."""
    if index == 0:
        return seed & _SEED_MASK
    x = (seed + index * 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) & _SEED_MASK


class InputProcessor:
    """Turns prompts into engine requests for one model.

    ``base_seed`` seeds requests that bring none, in the order they come (offline use); None draws one for each.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        max_logprobs: int = 20,
        by_priority: bool = False,
        base_seed: int | None = None,
    ):
        self._by_priority = by_priority
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = list(dict.fromkeys([*eos_token_ids, *tokenizer.eos_token_ids]))
        self.max_logprobs = max_logprobs
        self._base_seed = base_seed
        self._seeded = 0

    def process(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
    ) -> ProcessedRequest:
        """Check and tokenize. Raises :class:`RequestError` naming the field that cannot be served."""
        if params.truncate_prompt_tokens is None:
            self._refuse_hopeless(prompt)
        text, ids, salt = self._tokenize(prompt)
        return self.finish(
            text,
            ids,
            params,
            request_id,
            priority=priority,
            cache_salt=salt if cache_salt is None else cache_salt,
            arrival_time=arrival_time,
        )

    def process_batch(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        request_ids: Sequence[str],
        priorities: Sequence[int] | None = None,
    ) -> list[ProcessedRequest]:
        """:meth:`process` of many, with the texts tokenized together."""
        plain = [index for index, prompt in enumerate(prompts) if isinstance(prompt, str) and prompt]
        encoded: dict[int, list[int]] = {}
        if len(plain) > 1:
            try:
                encoded = dict(
                    zip(plain, self.tokenizer.encode_batch([str(prompts[index]) for index in plain]))
                )
            except (UnicodeEncodeError, TypeError):
                pass  # one of them is no text; one by one it is found
        arrival = time.time()
        result = []
        for index, prompt in enumerate(prompts):
            if index in encoded:
                text, ids, salt = str(prompt), encoded[index], None
            else:
                text, ids, salt = self._tokenize(prompt)  # type: ignore[assignment]
            result.append(
                self.finish(
                    text,
                    ids,
                    params[index],
                    request_ids[index],
                    priority=priorities[index] if priorities is not None else 0,
                    cache_salt=salt,
                    arrival_time=arrival,
                )
            )
        return result

    def is_long(self, prompt: Prompt, characters: int = LONG_TEXT) -> bool:
        """Whether tokenizing takes long enough to be worth a thread of its own."""
        if isinstance(prompt, Mapping):
            prompt = prompt.get("prompt") or ""
        return isinstance(prompt, str) and len(prompt) > characters

    def _refuse_hopeless(self, prompt: Prompt) -> None:
        """Refuse a text that cannot fit whatever its tokens are, before seconds are spent on them."""
        text = (
            prompt.get("prompt")
            if isinstance(prompt, Mapping) and "prompt_token_ids" not in prompt
            else prompt
        )
        if isinstance(text, str) and len(text) > LONG_TEXT:
            least = self.tokenizer.least_tokens(text)
            if least >= self.max_model_len:
                raise ContextLengthError(
                    f"This model's maximum context length is {self.max_model_len} tokens, prompt and output together. However, "
                    f"the prompt has {len(text)} characters, so {least} tokens at the least; shorten it, or raise max_model_len.",
                    "prompt",
                )

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int], str | None]:
        if isinstance(prompt, str):
            return prompt, self._encode(prompt, True), None
        if isinstance(prompt, Mapping):
            return self._tokenize_mapping(prompt)
        if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
            return None, self._check_ids(prompt), None
        raise RequestError(
            f"prompt must be a string, a list of token ids or an object with prompt or prompt_token_ids, "
            f"got {type(prompt).__name__}.",
            "prompt",
        )

    def _tokenize_mapping(self, prompt: Mapping[str, Any]) -> tuple[str | None, list[int], str | None]:
        for key in prompt:
            if key not in _PROMPT_KEYS:
                raise RequestError(
                    f"prompt: {key!r} is not supported; give prompt or prompt_token_ids.", str(key)
                )
        text = prompt.get("prompt")
        if text is not None and not isinstance(text, str):
            raise RequestError("prompt must be a string.", "prompt")
        salt = prompt.get("cache_salt")
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise RequestError("cache_salt must be a non-empty string.", "cache_salt")
        if (ids := prompt.get("prompt_token_ids")) is not None:
            return text, self._check_ids(ids), salt
        if text is None:
            raise RequestError("prompt must have prompt or prompt_token_ids.", "prompt")
        return text, self._encode(text, bool(prompt.get("add_special_tokens", True))), salt

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens)
        except (UnicodeEncodeError, TypeError):  # TypeError is how tokenizers says it
            raise RequestError(
                "prompt holds a lone surrogate, which is no text; send valid Unicode.", "prompt"
            ) from None

    def _check_ids(self, ids: Any) -> list[int]:
        if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
            raise RequestError("prompt_token_ids must be a list of token ids.", "prompt_token_ids")
        # Benchmarks and batch jobs bring millions of ids: no Python code runs for each of them. For a few of them numpy
        # would take longer than the rest of a request's way to the engine.
        if type(ids) is list and len(ids) <= _FEW_IDS and set(map(type, ids)) == {int}:
            low, high = min(ids), max(ids)
            if low < 0 or high >= self.vocab_size:
                self._refuse_id(low if low < 0 else high)
            return ids.copy()
        try:
            numbers = array("q", ids)
        except TypeError:
            raise RequestError("prompt_token_ids must be a list of integers.", "prompt_token_ids") from None
        except OverflowError:
            self._refuse_id(max(ids, key=abs))
        if numbers:
            values = numpy.frombuffer(numbers, dtype=numpy.int64)
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= self.vocab_size:
                self._refuse_id(low if low < 0 else high)
        return list(ids) if type(ids) is list and type(ids[0] if ids else 0) is int else numbers.tolist()

    def _refuse_id(self, token_id: int) -> NoReturn:
        raise RequestError(
            f"prompt holds the token id {token_id}, but the model's vocabulary has ids 0 to {self.vocab_size - 1}.",
            "prompt",
        )

    def finish(
        self,
        text: str | None,
        ids: list[int],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
    ) -> ProcessedRequest:
        """:meth:`process` from the token ids on."""
        self._check_params(params)
        if priority and not self._by_priority:
            raise RequestError(f"priority is {priority}, which needs scheduling_policy=priority.", "priority")
        if not INT64[0] <= priority <= INT64[1]:
            raise RequestError("priority must be an integer of 64 bits.", "priority")
        if (
            text is not None
            and self.tokenizer.vocab_size > self.vocab_size
            and max(ids, default=0) >= self.vocab_size
        ):
            self._refuse_id(max(ids))
        ids = self._fit(ids, params)
        engine_params = self._engine_params(params)
        room = self.max_model_len - len(ids)
        seed = self._seed(params)
        arrival = time.time() if arrival_time is None else arrival_time
        requests = [
            EngineRequest(
                request_id=request_id if params.n == 1 else f"{request_id}#{index}",
                prompt_token_ids=ids,
                params=engine_params,
                seed=spread_seed(seed, index),
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                eos_token_ids=self.eos_token_ids,
                priority=priority,
                cache_salt=cache_salt,
                arrival_time=arrival,
            )
            for index in range(params.n)
        ]
        return ProcessedRequest(request_id, text, ids, params, requests)

    def _seed(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        if self._base_seed is None:
            return secrets.randbits(63)
        self._seeded += 1
        return spread_seed(self._base_seed, self._seeded)

    def _fit(self, ids: list[int], params: SamplingParams) -> list[int]:
        limit = self.max_model_len
        if (keep := params.truncate_prompt_tokens) is not None:
            if keep > limit:
                raise RequestError(
                    f"truncate_prompt_tokens is {keep}, but the model's context (max_model_len) is {limit} tokens.",
                    "truncate_prompt_tokens",
                )
            if keep == -1:
                keep = max(limit - min(params.max_tokens or 1, limit), 1)
            ids = ids[-keep:]
        if not ids:
            raise RequestError("prompt is empty; give at least one token.", "prompt")
        if len(ids) >= limit:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens, prompt and output together. However, the prompt has "
                f"{len(ids)} tokens; shorten it, or raise max_model_len.",
                "prompt",
            )
        return ids

    def _check_params(self, params: SamplingParams) -> None:
        params.validate()
        most = self.vocab_size if self.max_logprobs == -1 else self.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and (self.vocab_size if asked == -1 else asked) > most:
                raise RequestError(
                    f"{name} is {asked}, but max_logprobs is {most}; ask for fewer or raise max_logprobs.",
                    name,
                )
        for name in ("allowed_token_ids", "logit_bias"):
            for token_id in getattr(params, name) or ():
                if not 0 <= token_id < self.vocab_size:
                    raise RequestError(
                        f"{name} has the token id {token_id}, but the model's vocabulary has ids 0 to {self.vocab_size - 1}.",
                        name,
                    )
        if any(token_id < 0 for token_id in params.stop_token_ids or ()):
            raise RequestError("stop_token_ids must be 0 or greater.", "stop_token_ids")

    def _engine_params(self, params: SamplingParams) -> SamplingParams:
        """A copy with what the engine cannot work out by itself."""
        changes: dict[str, Any] = {}
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(params, name) == -1:
                changes[name] = self.vocab_size
        if params.stop_token_ids and max(params.stop_token_ids) >= self.vocab_size:
            # Another model's stop tokens do no harm: this model never produces them.
            changes["stop_token_ids"] = [i for i in params.stop_token_ids if i < self.vocab_size]
        if params.bad_words:
            changes["bad_words_token_ids"] = self._bad_words(params.bad_words)
        return msgspec.structs.replace(params, **changes) if changes else params

    def _bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Token sequences of each word, at a text's beginning and after a space."""
        result: list[list[int]] = []
        for word in words:
            bare = self.tokenizer.encode(word.lstrip(), add_special_tokens=False)
            spaced = self.tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
            variants = [bare]
            # Where the space became a token of its own, the bare sequence behind it already matches.
            if spaced and bare and len(spaced) == len(bare) and spaced[0] != bare[0]:
                variants.append(spaced)
            for ids in variants:
                if any(token_id >= self.vocab_size for token_id in ids):
                    raise RequestError(
                        f"bad_words: {word!r} has tokens outside the model's vocabulary.", "bad_words"
                    )
                if ids and ids not in result:
                    result.append(ids)
        return result
