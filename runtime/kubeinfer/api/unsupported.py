"""OpenAI's and vLLM's endpoints that a generative model does not serve: refused with what to do instead."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from kubeinfer.api.errors import ApiError

router = APIRouter()

_POOLING = {
    "/v1/embeddings": "Embeddings",
    "/v2/embed": "Embeddings",
    "/pooling": "Pooling",
    "/classify": "Classification",
    "/score": "Score",
    "/v1/score": "Score",
    "/rerank": "Rerank",
    "/v1/rerank": "Rerank",
    "/v2/rerank": "Rerank",
}

_OTHER = {
    "/v1/responses": "Responses",
    "/v1/messages": "Messages",
    "/v1/audio/transcriptions": "Transcriptions",
    "/v1/audio/translations": "Translations",
    "/v1/audio/speech": "Speech",
    "/v1/images/generations": "Images",
    "/v1/moderations": "Moderations",
    "/v1/load_lora_adapter": "LoRA",
    "/v1/unload_lora_adapter": "LoRA",
}


async def _refuse(request: Request) -> Response:
    path = request.scope["route"].path
    name = _POOLING.get(path)
    if name is not None:
        raise ApiError(
            400,
            f"The model does not support {name} API: it is run as a generative model. Pooling models "
            "(--runner pooling) are not supported by this version yet.",
            code="not_supported",
        )
    raise ApiError(
        404,
        f"The {_OTHER[path]} API is not supported by this version; "
        "use /v1/chat/completions or /v1/completions.",
        code="not_supported",
    )


for _path in (*_POOLING, *_OTHER):
    router.add_api_route(_path, _refuse, methods=["POST"], include_in_schema=False)
