"""What OpenAPI says of the routes whose handlers read their requests themselves."""

from __future__ import annotations

from typing import Any

from server.decode import MEDIA_TYPES
from server.schemas import Classification, Classifications, Problem

ANSWER_HEADERS = (  # those that a page of another origin may read
    "X-Request-Id",
    "X-Scala-Width",
    "X-Budget-Met",
    "Server-Timing",
    "Retry-After",
    "WWW-Authenticate",
    "Inference-Header-Content-Length",
)


def _header(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object",
        "required": ["file"],
        "properties": {"file": {"type": "array", "items": _IMAGE["schema"]}},
    }
}
_ERRORS = {
    400: "Empty body, bad multipart, query or header",
    413: "More bytes, pixels or images than the limit",
    415: "Not an image type we read",
    422: "A broken image, an untrained width, or a budget or floor that no width can satisfy here even when idle",
    429: "Refused for load; see Retry-After",
    503: "Starting or draining",
    504: "The deadline passed",
}

QUOTE: dict[str, Any] = {
    "responses": {
        400: {"model": Problem, "description": "No budget, or one that makes no sense"},
        503: {"model": Problem, "description": "Starting or draining"},
    },
    "openapi_extra": {
        "parameters": [
            {
                "name": "budget_ms",
                "in": "query",
                "required": True,
                "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 600000},
                "description": "Milliseconds that a request may take",
            }
        ]
    },
}

CLASSIFY: dict[str, Any] = {
    "responses": {
        200: {"model": Classification | Classifications, "description": "One image, or `results` for several"},
        **{status: {"model": Problem, "description": text} for status, text in _ERRORS.items()},
    },
    "openapi_extra": {
        "parameters": [
            {
                "name": "top_k",
                "in": "query",
                "schema": {"type": "integer", "minimum": 1, "default": 5},
                "description": "How many classes to return",
            },
            _header(
                "X-Latency-Budget-Ms",
                {"type": "number", "exclusiveMinimum": 0, "maximum": 600000},
                "Milliseconds this request may take",
            ),
            _header("X-Min-Accuracy", {"type": "number", "minimum": 0, "maximum": 1}, "Floor on the width's accuracy"),
            _header("X-Width", {"type": "number"}, "Pins a trained width"),
            _header("X-Request-Id", {"type": "string"}, "Comes back in the answer and in logs"),
        ],
        "requestBody": {
            "required": True,
            "content": {**dict.fromkeys(MEDIA_TYPES, _IMAGE), "multipart/form-data": _FORM},
        },
    },
}
