"""``POST /v1/completions``."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from kubeinfer.api.body import decode_body, read_body
from kubeinfer.api.generation import Collection, collect, gone_response, request_id_of, submit
from kubeinfer.api.logprobs import CompletionLogprobs, prompt_logprobs
from kubeinfer.api.protocol import CompletionRequest, refuse_unsupported, sampling_params
from kubeinfer.api.responses import BytesResponse, EncodedStream
from kubeinfer.api.schema import json_body
from kubeinfer.api.state import ServerState, state_of
from kubeinfer.api.streams import CompletionStream
from kubeinfer.errors import RequestError
from kubeinfer.sampling_params import SamplingParams

router = APIRouter()

Prompt = str | list[int]


def split_prompt(prompt: str | list[Any]) -> list[Prompt]:
    """The request's prompts: a text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is an empty list; give a text, token ids, or a list of either.", "prompt")
    if _are_ids(prompt):
        return [prompt]
    for index, item in enumerate(prompt):
        if isinstance(item, list):
            if not item:
                raise RequestError(f"prompt[{index}] is an empty list.", f"prompt[{index}]")
            if not _are_ids(item):
                raise RequestError(f"prompt[{index}] must hold token ids only.", f"prompt[{index}]")
        elif not isinstance(item, str):
            raise RequestError(
                f"prompt[{index}] must be a text or a list of token ids, got {type(item).__name__}.",
                f"prompt[{index}]",
            )
    return prompt


def _are_ids(items: list[Any]) -> bool:
    """Whether all are integers, as JSON has them (true and false are none), with no Python code run for each."""
    return set(map(type, items)) == {int}


def _params(body: CompletionRequest, defaults: dict[str, Any]) -> SamplingParams:
    max_tokens = body.max_tokens
    if body.echo and max_tokens == 0:
        max_tokens = 1  # the prompt is scored and the token drawn is dropped
    elif max_tokens is None:
        max_tokens = defaults.get("max_tokens", 16)
    params = sampling_params(body, defaults, max_tokens=max_tokens, logprobs=body.logprobs)
    if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
        params.prompt_logprobs = body.logprobs
    return params


@router.post("/v1/completions", openapi_extra=json_body(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue a prompt."""
    state = state_of(request)
    body = decode_body(await read_body(request, state.options.max_request_bytes), CompletionRequest)
    model = state.check_model(body.model)
    refuse_unsupported(body)
    prompts = split_prompt(body.prompt)
    params = _params(body, state.engine.default_sampling_params)
    base_id = request_id_of(request, body.request_id)
    state.log_request(base_id, params, len(prompts))
    special = body.add_special_tokens is not False
    outputs = await submit(
        state,
        [
            {"prompt": p, "add_special_tokens": False} if isinstance(p, str) and not special else p
            for p in prompts
        ],
        params,
        base_id,
        priority=body.priority,
        cache_salt=body.cache_salt,
    )
    drop_output = bool(body.echo) and body.max_tokens == 0
    created = int(time.time())
    if body.stream:
        options = body.stream_options
        encoder = CompletionStream(
            echoes=[state.text_of(prompt) for prompt in prompts] if body.echo else None,
            drop_output=drop_output,
            piece=state.engine.tokenizer.piece,
            response_id=f"cmpl-{base_id}",
            model=model,
            created=created,
            n=params.n,
            logprobs=body.logprobs,
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            return_token_ids=bool(body.return_token_ids),
            tokens_as_ids=bool(body.return_tokens_as_token_ids),
        )
        return EncodedStream(outputs, encoder)
    collection = await collect(request, outputs, params.n, len(prompts))
    if collection is None:
        return gone_response()
    if drop_output:
        collection.usage.completion_tokens = 0
    answer = {
        "id": f"cmpl-{base_id}",
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": _choices(state, body, collection, prompts, drop_output),
        "usage": collection.usage.as_dict(),
    }
    return BytesResponse(msgspec.json.encode(answer))


def _choices(
    state: ServerState, body: CompletionRequest, done: Collection, prompts: list[Prompt], drop_output: bool
) -> list[dict[str, Any]]:
    choices = []
    for index, choice in enumerate(done.choices):
        prompt_index = index // done.n
        source = done.prompts[prompt_index]
        token_ids = [] if drop_output else choice.token_ids
        text = "" if drop_output else choice.text
        logprobs: list[Any] = [] if drop_output else list(choice.logprobs)
        shown_ids = list(token_ids)
        if body.echo:
            text = state.text_of(prompts[prompt_index]) + text
            if source is not None and source.prompt_logprobs is not None:
                shown_ids = source.prompt_token_ids + shown_ids
                logprobs = source.prompt_logprobs + logprobs
        entry: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None
            if body.logprobs is None
            else CompletionLogprobs(
                body.logprobs, bool(body.return_tokens_as_token_ids), state.engine.tokenizer.piece
            ).render(shown_ids, logprobs),
            "finish_reason": "length" if drop_output else choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if source is not None and body.prompt_logprobs is not None:
            entry["prompt_logprobs"] = prompt_logprobs(source.prompt_logprobs)
        if body.return_token_ids:
            entry["token_ids"] = token_ids
            entry["prompt_token_ids"] = source.prompt_token_ids if source is not None else []
        choices.append(entry)
    return choices
