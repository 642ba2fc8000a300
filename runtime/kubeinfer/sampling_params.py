"""How one request is sampled. Names, defaults and meanings are vLLM's."""

from __future__ import annotations

import numbers
from typing import Any

import msgspec

from kubeinfer.errors import NotSupportedError, RequestError

MAX_STOP_STRINGS = 64
_NUMBERS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p")
INT64 = (-(2**63), 2**63 - 1)  # what messages carry


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text)} characters)"


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True, dict=True):
    """Parameters of one request's sampling.

    ``logprobs=k`` asks for the k most likely tokens of each position beside the chosen one (0: the chosen one
    only; -1: the whole vocabulary); ``prompt_logprobs`` the same for the prompt. ``top_k`` of 0 or -1 means all
    tokens. ``temperature`` 0 is greedy. Raises :class:`RequestError` naming the field where a value is out of range.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    # Known from vLLM and not there yet: taken only to be refused by name.
    structured_outputs: Any = None
    guided_decoding: Any = None
    logits_processors: Any = None

    # Filled in by the text layer before the request reaches the engine (token ids of bad_words).
    bad_words_token_ids: list[list[int]] | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:  # numpy's, which no message carries
            value = getattr(self, name)
            if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
                setattr(self, name, float(value))
        self.validate()

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def clone(self) -> SamplingParams:
        return msgspec.structs.replace(self)

    def validate(self) -> None:
        """Raise :class:`RequestError` for the first field that is out of range."""
        try:
            self._validate()
        except (TypeError, AttributeError) as exc:
            raise RequestError(f"a sampling parameter has a value of a wrong type: {exc}.") from None

    def _validate(self) -> None:
        def need(ok: bool, param: str, what: str) -> None:
            if not ok:
                raise RequestError(f"{param} must be {what}, got {_short(getattr(self, param))}.", param)

        def number(param: str) -> None:
            value = getattr(self, param)
            need(
                isinstance(value, (int, float)) and not isinstance(value, bool) and value == value,
                param,
                "a number",
            )

        def integer(param: str) -> None:
            value = getattr(self, param)
            need(isinstance(value, int) and not isinstance(value, bool), param, "an integer")
            need(INT64[0] <= value <= INT64[1], param, "an integer of 64 bits")

        for field in _NUMBERS:
            number(field)
        for field in ("n", "top_k", "min_tokens"):
            integer(field)
        need(1 <= self.n <= 1024, "n", "between 1 and 1024")
        if self.best_of is not None and self.best_of != self.n:
            raise NotSupportedError("best_of is not supported; ask for n outputs instead.", "best_of")
        need(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        need(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        need(0.0 < self.repetition_penalty <= 1e4, "repetition_penalty", "greater than 0")
        need(0.0 <= self.temperature <= 1e4, "temperature", "0 or greater")
        need(0.0 < self.top_p <= 1.0, "top_p", "greater than 0 and at most 1")
        need(self.top_k >= -1, "top_k", "-1 or 0 (all tokens) or a positive count")
        need(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        if self.seed is not None:
            integer("seed")
        if self.max_tokens is not None:
            integer("max_tokens")
            need(self.max_tokens >= 1, "max_tokens", "at least 1")
        need(self.min_tokens >= 0, "min_tokens", "0 or greater")
        if self.max_tokens is not None:
            need(self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens ({self.max_tokens})")
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                integer(field)
                need(
                    getattr(self, field) >= -1, field, "-1 (the whole vocabulary) or a count of 0 or greater"
                )
        if self.truncate_prompt_tokens is not None:
            integer("truncate_prompt_tokens")
            need(self.truncate_prompt_tokens >= -1 and self.truncate_prompt_tokens != 0, "truncate_prompt_tokens",
                 "-1 (the model's length) or at least 1")  # fmt: skip
        stops = self.stop_strings
        need(len(stops) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
        need(all(isinstance(s, str) and s for s in stops), "stop", "a string or a list of non-empty strings")
        if stops and not self.detokenize:
            raise RequestError("stop strings need detokenize=True.", "stop")
        if self.stop_token_ids is not None:
            need(
                all(isinstance(t, int) and INT64[0] <= t <= INT64[1] for t in self.stop_token_ids),
                "stop_token_ids",
                "a list of token ids",
            )
        if self.bad_words is not None:
            need(
                all(isinstance(w, str) and w for w in self.bad_words),
                "bad_words",
                "a list of non-empty strings",
            )
        if self.allowed_token_ids is not None:
            need(len(self.allowed_token_ids) > 0, "allowed_token_ids", "a non-empty list of token ids")
        if self.logit_bias is not None:
            need(all(-100.0 <= b <= 100.0 for b in self.logit_bias.values()), "logit_bias",
                 "a map of token id to a number between -100 and 100")  # fmt: skip
        for field in ("structured_outputs", "guided_decoding", "logits_processors"):
            if getattr(self, field) is not None:
                raise NotSupportedError(f"{field} is not supported yet.", field)
