"""``POST /generate`` as vLLM's first server had it: the prompt and its continuation, streamed with ``\\0`` between chunks."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from kubeinfer.api.body import decode_body, read_body
from kubeinfer.api.errors import as_api_error
from kubeinfer.api.generation import collect, gone_response, request_id_of, submit
from kubeinfer.api.protocol import Sampled, refuse_unsupported, sampling_params
from kubeinfer.api.responses import BytesResponse, EncodedStream
from kubeinfer.api.schema import json_body
from kubeinfer.api.state import state_of
from kubeinfer.outputs import RequestOutput

router = APIRouter()


class GenerateRequest(Sampled, kw_only=True):
    """Body of ``POST /generate``."""

    prompt: str


class GenerateStream:
    """Each chunk holds the whole texts so far, ended by ``\\0``."""

    media_type = "text/plain; charset=utf-8"

    def __init__(self, prompt: str, n: int):
        self.texts = [prompt] * n

    def encode(self, item: RequestOutput) -> bytes:
        for delta in item.outputs:
            self.texts[delta.index] += delta.text
        return msgspec.json.encode({"text": self.texts}) + b"\0"

    def finish(self) -> bytes:
        return b""

    def fail(self, error: Exception) -> bytes:
        return as_api_error(error).body + b"\0"


@router.post("/generate", openapi_extra=json_body(GenerateRequest))
async def generate(request: Request) -> Response:
    """Continue ``prompt``: ``{"text": [prompt + continuation, ...]}``."""
    state = state_of(request)
    body = decode_body(await read_body(request, state.options.max_request_bytes), GenerateRequest)
    refuse_unsupported(body)
    defaults: dict[str, Any] = state.engine.default_sampling_params
    max_tokens = body.max_tokens if body.max_tokens is not None else defaults.get("max_tokens", 16)
    params = sampling_params(body, defaults, max_tokens=max_tokens, logprobs=None)
    base_id = request_id_of(request, body.request_id)
    state.log_request(base_id, params, 1)
    outputs = await submit(
        state, [body.prompt], params, base_id, priority=body.priority, cache_salt=body.cache_salt
    )
    if body.stream:
        return EncodedStream(outputs, GenerateStream(body.prompt, params.n))
    collection = await collect(request, outputs, params.n, 1)
    if collection is None:
        return gone_response()
    texts = [body.prompt + choice.text for choice in collection.choices]
    return BytesResponse(msgspec.json.encode({"text": texts}))
