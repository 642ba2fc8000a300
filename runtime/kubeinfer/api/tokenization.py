"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from kubeinfer.api.body import decode_body, read_body
from kubeinfer.api.prompting import render_chat
from kubeinfer.api.protocol import DetokenizeRequest, TokenizeRequest
from kubeinfer.api.responses import BytesResponse
from kubeinfer.api.schema import json_body
from kubeinfer.api.state import state_of
from kubeinfer.errors import RequestError

router = APIRouter()


@router.post("/tokenize", openapi_extra=json_body(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of messages put through the chat template."""
    state = state_of(request)
    body = decode_body(await read_body(request, state.options.max_request_bytes), TokenizeRequest)
    state.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("Give either prompt or messages.", "prompt")
    if body.prompt is not None:
        text, special = body.prompt, body.add_special_tokens is not False
    else:
        rendered = await render_chat(state, body)
        text, special = rendered["prompt"], rendered["add_special_tokens"]
    ids = await state.encode(text, special)
    answer = {
        "count": len(ids),
        "max_model_len": state.max_model_len,
        "tokens": ids,
        "token_strs": state.token_strings(ids) if body.return_token_strs else None,
    }
    return BytesResponse(msgspec.json.encode(answer))


@router.post("/detokenize", openapi_extra=json_body(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    state = state_of(request)
    body = decode_body(await read_body(request, state.options.max_request_bytes), DetokenizeRequest)
    state.check_model(body.model)
    size = int(state.engine.model_config.vocab_size)
    for token in body.tokens:
        if not 0 <= token < size:
            raise RequestError(f"tokens: {token} is not a token id; ids go from 0 to {size - 1}.", "tokens")
    return BytesResponse(msgspec.json.encode({"prompt": state.decode(body.tokens)}))
