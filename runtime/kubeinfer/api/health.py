"""What probes and dashboards read: health, version, load, metrics."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from kubeinfer import __version__
from kubeinfer.api.responses import BytesResponse, error_response
from kubeinfer.api.state import state_of
from kubeinfer.metrics import CONTENT_TYPE

router = APIRouter()


@router.get("/health")
@router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
async def health(request: Request) -> Response:
    """200 while requests are taken; 503 with the reason while draining and once the engine has died."""
    refusal = state_of(request).refusal()
    return Response(status_code=200) if refusal is None else error_response(refusal)


@router.get("/version")
async def version() -> Response:
    return BytesResponse(msgspec.json.encode({"version": __version__}))


@router.get("/load")
async def load(request: Request) -> Response:
    """``server_load``: requests in flight."""
    return BytesResponse(msgspec.json.encode({"server_load": state_of(request).in_flight}))


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return BytesResponse(state_of(request).metrics.render(), media_type=CONTENT_TYPE)
