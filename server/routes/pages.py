"""The pages: ``GET /``, the playground, and ``GET /docs``, Swagger UI, with the files that each is made of.

All are read when the server starts and sent from memory. The framework's way takes a thread and an open file for each
request: where memory was short, its wait for a thread that could not start stood still the event loop, for good.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fastapi_offline
from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

FOLDER = Path(__file__).parents[1] / "pages"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
ASSETS = Path(fastapi_offline.__file__).parent / "static"
ASSET_NAMES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
PIECE_BYTES = 65_536  # that may wait for a client who takes them slowly
# Nothing but our own files, no script or style inside a page, and strings are never parsed as HTML. blob: is the
# preview of the picture that was chosen.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
# Swagger UI styles its elements one by one and has its icons in data: addresses. The one script inside its page is
# known by its hash. Like the playground, it may speak with this server alone, and be in nobody's frame.
DOCS_POLICY = (
    "default-src 'none'; script-src 'self' 'sha256-{script}'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked for again each time: an upgrade shows at once
    "Referrer-Policy": "no-referrer",
}
router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class Page:
    """One file, as it is sent."""

    content: bytes
    media_type: str
    etag: str
    policy: str


class InPieces(Response):
    """The next piece is written once the client has taken the last."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for begin in range(0, len(self.body), PIECE_BYTES):
            piece = self.body[begin : begin + PIECE_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def read_all() -> None:
    """So that no request has to."""
    _pages()
    _assets()
    _documentation()


@router.api_route("/", methods=["GET", "HEAD"])
async def playground(request: Request) -> Response:
    """The playground."""
    return _answer(_pages(), "playground.html", request)


@router.api_route("/playground/{name}", methods=["GET", "HEAD"])
async def file(name: str, request: Request) -> Response:
    """Its styles, scripts and icon."""
    return _answer(_pages(), name, request)


@router.api_route("/docs", methods=["GET", "HEAD"])
async def documentation(request: Request) -> Response:
    """Swagger UI, on what ``/openapi.json`` tells."""
    return _send(_documentation(), request)


@router.api_route("/docs/assets/{name}", methods=["GET", "HEAD"])
async def asset(name: str, request: Request) -> Response:
    """Swagger UI's script, style and icon."""
    return _answer(_assets(), name, request)


def _answer(pages: Mapping[str, Page], name: str, request: Request) -> Response:
    page = pages.get(name)
    if page is None:
        raise HTTPException(404, f"There is no page {name[:50]!r}")
    return _send(page, request)


def _send(page: Page, request: Request) -> Response:
    headers = HEADERS | {"ETag": page.etag, "Content-Security-Policy": page.policy}
    known = request.headers.get("if-none-match", "").replace("W/", "")  # a proxy that compresses weakens tags
    if page.etag in (tag.strip() for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return InPieces(page.content, headers=headers, media_type=page.media_type)


@cache
def _pages() -> dict[str, Page]:
    """By file name."""
    return _read(path for path in FOLDER.iterdir() if path.suffix in TYPES)


@cache
def _assets() -> dict[str, Page]:
    """By file name: 1.7 MB."""
    return _read(ASSETS / name for name in ASSET_NAMES)


def _read(paths: Iterable[Path]) -> dict[str, Page]:
    return {path.name: _page(path.read_bytes(), TYPES[path.suffix], POLICY) for path in paths}


@cache
def _documentation() -> Page:
    """Its addresses are relative, so that it works behind a proxy that puts a prefix before them."""
    script, style, icon = ASSET_NAMES
    html = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="scala-serve - Swagger UI",
        swagger_js_url=f"docs/assets/{script}",
        swagger_css_url=f"docs/assets/{style}",
        swagger_favicon_url=f"docs/assets/{icon}",
    ).body
    (code,) = re.findall(rb"<script>(.*?)</script>", html, re.DOTALL)
    digest = b64encode(hashlib.sha256(code).digest()).decode()
    return _page(bytes(html), "text/html", DOCS_POLICY.format(script=digest))


def _page(content: bytes, media_type: str, policy: str) -> Page:
    return Page(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"', policy)
