"""``GET /v1/models`` and one of them."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from kubeinfer.api.responses import BytesResponse
from kubeinfer.api.state import ServerState, state_of
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.text.input_processor import DEFAULTED_PARAMS

router = APIRouter()


def _card(state: ServerState, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "kubeinfer",
        "root": state.options.model,
        "parent": None,
        "max_model_len": state.max_model_len,
        "default_sampling_params": _defaults(state),
    }


def _defaults(state: ServerState) -> dict[str, Any]:
    """What holds where a chat request leaves it out; ``max_tokens`` of None is the rest of the context."""
    own = state.engine.default_sampling_params
    plain = SamplingParams(max_tokens=None)
    return {name: own.get(name, getattr(plain, name)) for name in DEFAULTED_PARAMS}


@router.get("/v1/models")
@router.get("/v1/models/", include_in_schema=False)
async def list_models(request: Request) -> Response:
    """The names this server answers to."""
    state = state_of(request)
    cards = [_card(state, name) for name in state.served_names]
    return BytesResponse(msgspec.json.encode({"object": "list", "data": cards}))


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    """One of the names."""
    state = state_of(request)
    return BytesResponse(msgspec.json.encode(_card(state, state.check_model(name))))
