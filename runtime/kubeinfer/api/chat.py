"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from kubeinfer.api.body import decode_body, read_body
from kubeinfer.api.generation import Collection, collect, gone_response, request_id_of, submit
from kubeinfer.api.logprobs import chat_logprobs, prompt_logprobs
from kubeinfer.api.prompting import final_text, render_chat, response_role
from kubeinfer.api.protocol import ChatCompletionRequest, refuse_unsupported, sampling_params
from kubeinfer.api.responses import BytesResponse, EncodedStream
from kubeinfer.api.schema import json_body
from kubeinfer.api.state import state_of
from kubeinfer.api.streams import ChatStream
from kubeinfer.errors import ContextLengthError, RequestError
from kubeinfer.text.tokenizer import Tokenizer

router = APIRouter()


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    if body.max_completion_tokens is None:
        return body.max_tokens
    if body.max_tokens is not None and body.max_tokens != body.max_completion_tokens:
        raise RequestError(
            f"max_tokens ({body.max_tokens}) and max_completion_tokens ({body.max_completion_tokens}) differ; "
            "give one of them.",
            "max_tokens",
        )
    return body.max_completion_tokens


def _logprobs(body: ChatCompletionRequest) -> int | None:
    if body.top_logprobs is not None and body.top_logprobs != 0 and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs=true.", "top_logprobs")
    if body.top_logprobs is not None and body.top_logprobs < -1:
        raise RequestError(
            f"top_logprobs must be 0 or greater, or -1, got {body.top_logprobs}.", "top_logprobs"
        )
    return (body.top_logprobs or 0) if body.logprobs else None


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatCompletionRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    body = decode_body(await read_body(request, state.options.max_request_bytes), ChatCompletionRequest)
    model = state.check_model(body.model)
    refuse_unsupported(body)
    logprobs = _logprobs(body)
    params = sampling_params(
        body, state.engine.default_sampling_params, max_tokens=_max_tokens(body), logprobs=logprobs
    )
    prompt = await render_chat(state, body)
    base_id = request_id_of(request, body.request_id)
    state.log_request(base_id, params, 1)
    try:
        outputs = await submit(
            state, [prompt], params, base_id, priority=body.priority, cache_salt=body.cache_salt
        )
    except ContextLengthError as error:
        error.param = "messages"
        raise
    role = response_role(state, body)
    echo = final_text(body) if body.echo else ""
    created = int(time.time())
    if body.stream:
        options = body.stream_options
        encoder = ChatStream(
            role=role,
            echo=echo,
            piece_bytes=state.engine.tokenizer.piece_bytes,
            response_id=f"chatcmpl-{base_id}",
            model=model,
            created=created,
            n=params.n,
            logprobs=logprobs,
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            return_token_ids=bool(body.return_token_ids),
            tokens_as_ids=bool(body.return_tokens_as_token_ids),
        )
        return EncodedStream(outputs, encoder)
    collection = await collect(request, outputs, params.n, 1)
    if collection is None:
        return gone_response()
    source = collection.prompts[0]
    answer: dict[str, Any] = {
        "id": f"chatcmpl-{base_id}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": _choices(body, collection, role, echo, logprobs, state.engine.tokenizer),
        "usage": collection.usage.as_dict(),
    }
    if source is not None and body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(source.prompt_logprobs)
    if source is not None and body.return_token_ids:
        answer["prompt_token_ids"] = source.prompt_token_ids
    return BytesResponse(msgspec.json.encode(answer))


def _choices(
    body: ChatCompletionRequest,
    done: Collection,
    role: str,
    echo: str,
    logprobs: int | None,
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    choices = []
    for index, choice in enumerate(done.choices):
        entry: dict[str, Any] = {
            "index": index,
            "message": {"role": role, "content": echo + choice.text, "refusal": None},
            "logprobs": None
            if logprobs is None
            else chat_logprobs(
                choice.token_ids,
                choice.logprobs,
                logprobs,
                bool(body.return_tokens_as_token_ids),
                tokenizer.piece_bytes,
            ),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if body.return_token_ids:
            entry["token_ids"] = choice.token_ids
        choices.append(entry)
    return choices
