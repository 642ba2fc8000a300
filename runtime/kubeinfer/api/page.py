"""The chat page at ``/``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from kubeinfer.api.responses import BytesResponse

router = APIRouter()

# Nothing is loaded from elsewhere, and the page cannot be put in another site's frame.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def _page() -> bytes:
    return (Path(__file__).parent / "static" / "chat.html").read_bytes()


@router.get("/", include_in_schema=False)
async def chat_page() -> Response:
    return BytesResponse(
        _page(),
        media_type="text/html; charset=utf-8",
        headers={
            "content-security-policy": _POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        },
    )
