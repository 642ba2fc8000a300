"""What clients send: OpenAI's fields and vLLM's extra ones. A field that is not here is refused by name.

``None`` means "not given" throughout, as OpenAI's clients send ``null`` for what they leave out.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kubeinfer.errors import NotSupportedError, RequestError
from kubeinfer.sampling_params import SamplingParams


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """``include_usage``: a last chunk with the usage; ``continuous_usage_stats``: usage in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's clients may send false; true is refused


class Sampled(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of every request that generates."""

    stream: bool | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[int, float] | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None

    # Accepted, no effect on the answer: they are the caller's notes, or hints to OpenAI's own service.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    # Known, refused unless they say what is so anyway (see ``_REFUSED``).
    best_of: int | None = None
    use_beam_search: Any = None
    length_penalty: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_decoding_backend: Any = None
    logits_processors: Any = None
    kv_transfer_params: Any = None
    vllm_xargs: Any = None


class _OpenAI(Sampled, kw_only=True):
    """Fields of both kinds of completion."""

    model: str | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class CompletionRequest(_OpenAI, kw_only=True):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[Any]
    logprobs: int | None = None
    suffix: Any = None


class ChatCompletionRequest(_OpenAI, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None

    parallel_tool_calls: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    reasoning_effort: Any = None
    include_reasoning: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    mm_processor_kwargs: Any = None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /tokenize``: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


# field -> values that change nothing and so are fine; any other value is refused
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "logits_processors": ([],),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none",),
    "reasoning_effort": ("none",),
    "include_reasoning": (True, False),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
    "mm_processor_kwargs": ({},),
}


def refuse_unsupported(request: Sampled) -> None:
    """Raise :class:`NotSupportedError` for the first field that asks for what this version does not do."""
    for name, harmless in _REFUSED.items():
        value = getattr(request, name, None)
        if value is not None and value not in harmless:
            raise NotSupportedError(f"{name} is not supported yet.", name)
    options: StreamOptions | None = getattr(request, "stream_options", None)
    if options is not None:
        if not request.stream:
            raise RequestError("stream_options needs stream=true.", "stream_options")
        if options.include_obfuscation:
            raise NotSupportedError(
                "include_obfuscation is not supported.", "stream_options.include_obfuscation"
            )


_SAMPLING = (
    "n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k",
    "min_p", "seed", "stop", "stop_token_ids", "bad_words", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "prompt_logprobs", "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens", "logit_bias",
    "allowed_token_ids",
)  # fmt: skip


def sampling_params(
    request: Sampled, defaults: dict[str, Any], *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """The request's sampling, over the model's own ``defaults``. Raises :class:`RequestError` naming the field."""
    values = dict(defaults)
    for name in _SAMPLING:
        value = getattr(request, name, None)
        if value is not None:
            values[name] = value
    if max_tokens is not None or "max_tokens" not in values:
        values["max_tokens"] = max_tokens
    values["logprobs"] = logprobs
    stop = values.get("stop")
    if stop == [] or stop == "":
        values["stop"] = None
    return SamplingParams(**values)
