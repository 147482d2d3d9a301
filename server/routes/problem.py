"""Errors at the HTTP edge: one status table, and ``application/problem+json`` (RFC 9457) for everything but ``/v2``."""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from server import errors

STATUSES: dict[type[errors.RequestError], int] = {
    errors.UnknownModel: 404,
    errors.NoApiKey: 401,
    errors.UnknownApiKey: 403,
    errors.RateLimited: 429,
    errors.BadRequest: 400,
    errors.TooLarge: 413,
    errors.TooSlow: 408,
    errors.HeadTooLarge: 431,
    errors.UnsupportedBody: 415,
    errors.UnsupportedImage: 415,
    errors.BrokenImage: 422,
    errors.Impossible: 422,
    errors.Shed: 429,
    errors.Gone: 499,  # nobody reads it; nginx's number
    errors.EngineFailed: 500,
    errors.Unavailable: 503,
    errors.Expired: 504,
}
TITLES = {
    errors.UnknownModel: "No such model",
    errors.NoApiKey: "No API key",
    errors.UnknownApiKey: "Unknown API key",
    errors.RateLimited: "Too many requests",
    errors.BadRequest: "Bad request",
    errors.TooLarge: "Too large",
    errors.TooSlow: "Too slow",
    errors.HeadTooLarge: "Too large a head",
    errors.UnsupportedBody: "Not a body we read",
    errors.UnsupportedImage: "Not an image we read",
    errors.BrokenImage: "Broken image",
    errors.Impossible: "Impossible on this machine",
    errors.Shed: "Refused for load",
    errors.Gone: "Client left",
    errors.EngineFailed: "Internal error",
    errors.Unavailable: "Not serving",
    errors.Expired: "Deadline passed",
}


def problem(error: Exception, request_id: str) -> dict[str, Any]:
    """The problem object of any exception; a bug shows none of its internals."""
    if isinstance(error, errors.RequestError):
        kind = type(error)
        content = _content(
            re.sub(r"\B(?=[A-Z])", "-", kind.__name__).lower(), TITLES[kind], STATUSES[kind], error.detail, request_id
        )
        return {**content, **error.extra}
    if isinstance(error, HTTPException):
        title = HTTPStatus(error.status_code).phrase
        return _content(title.lower().replace(" ", "-"), title, error.status_code, f"{error.detail}.", request_id)
    return _content(
        "bug", "Internal error", 500, "The server has a bug; it was logged under this request id.", request_id
    )


def is_oip(path: str) -> bool:
    """Whether the route is one of the Open Inference Protocol."""
    return f"{path}/".startswith("/v2/")


def error_response(error: Exception, scope: Scope) -> Response:
    """In the form of the request's route: the Open Inference Protocol knows ``{"error": ...}`` alone."""
    content = problem(error, scope["state"]["request_id"])
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, errors.NoApiKey):
        headers["WWW-Authenticate"] = 'Bearer realm="scala-serve"'
    if isinstance(error, errors.Shed | errors.RateLimited):
        headers["Retry-After"] = str(int(error.retry_after_s))
    if isinstance(error, errors.Unavailable):
        headers["Retry-After"] = "1"
    status, media_type = content["status"], "application/problem+json"
    if is_oip(scope["path"]):
        content, media_type = {"error": content["detail"]}, "application/json"
    return Response(json.dumps(content, ensure_ascii=False), status, headers, media_type=media_type)


def _content(kind: str, title: str, status: int, detail: str, request_id: str) -> dict[str, Any]:
    return {
        "type": f"urn:scala-serve:problem:{kind}",
        "title": title,
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }
