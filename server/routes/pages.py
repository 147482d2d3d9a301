"""``GET /``: the playground, and the files it is made of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parents[1] / "pages"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Nothing but our own files, no script or style inside a page, and strings are never parsed as HTML. blob: is the
# preview of the picture that was chosen.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked for again each time: an upgrade shows at once
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class Page:
    """One file, as it is sent."""

    content: bytes
    media_type: str
    etag: str


@router.api_route("/", methods=["GET", "HEAD"])
async def playground(request: Request) -> Response:
    """The playground."""
    return _answer("playground.html", request)


@router.api_route("/playground/{name}", methods=["GET", "HEAD"])
async def file(name: str, request: Request) -> Response:
    """Its styles, scripts and icon."""
    return _answer(name, request)


def _answer(name: str, request: Request) -> Response:
    page = _pages().get(name)
    if page is None:
        raise HTTPException(404, f"There is no page {name[:50]!r}")
    headers = HEADERS | {"ETag": page.etag}
    known = request.headers.get("if-none-match", "").replace("W/", "")  # a proxy that compresses weakens tags
    if page.etag in (tag.strip() for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(page.content, headers=headers, media_type=page.media_type)


@cache
def _pages() -> dict[str, Page]:
    """By file name. Small, and read once."""
    return {path.name: _read(path) for path in FOLDER.iterdir() if path.suffix in TYPES}


def _read(path: Path) -> Page:
    content = path.read_bytes()
    return Page(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
