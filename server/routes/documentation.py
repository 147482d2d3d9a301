"""What OpenAPI says beyond what the framework reads off the routes: headers, errors, examples.

The handlers read their requests themselves, so parameters and answers are written down here. ``document`` adds what the
edge does for all routes, and what only the running server knows: its widths, its classes, whether it asks for keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server import errors
from server.api_keys import is_open
from server.decode import MEDIA_TYPES
from server.routes.problem import problem
from server.schemas import Classification, Classifications, EffectiveSettings, Images, Problem

ANSWER_HEADERS = (  # those that a page of another origin may read
    "X-Request-Id",
    "X-Scala-Width",
    "X-Budget-Met",
    "Server-Timing",
    "Retry-After",
    "WWW-Authenticate",
    "Inference-Header-Content-Length",
)
_ID = "4449e0d3f35c48c7a5bb15cfa7a1bf70"
_DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"  # a PNG, 1 x 1
_FRAME = {"model": "scala-xs-tiny-imagenet", "budget_ms": 100.0, "budget_met": True, "request_id": _ID}
_ANSWER = {
    "predictions": [
        {"class_id": 145, "label": "school bus", "score": 0.644917},
        {"class_id": 166, "label": "trolleybus", "score": 0.247648},
    ],
    "width": 1.0,
    "expected_accuracy": 0.3136,
    "batch_size": 1,
    "timing_ms": {"decode": 0.845, "queue": 1.088, "inference": 1.304, "total": 4.293},
}
_QUOTE = {
    "budget_ms": 100.0,
    "admitted": True,
    "width": 1.0,
    "expected_accuracy": 0.3136,
    "chance": 0.99,
    "reason": None,
}
_MODEL = {
    "name": "scala-xs-tiny-imagenet",
    "image_size": 48,
    "classes": ["goldfish", "European fire salamander"],
    "widths": [
        {
            "width": 0.25,
            "accuracy": 0.2353,
            "accuracy_ci95": [0.2271, 0.2437],
            "parameters": 77576,
            "macs": 2938944,
            "dominated": False,
            "dominated_at": [],
            "latency_ms": {"1": {"p50": 0.239, "p99": 0.579}, "2": {"p50": 0.428, "p99": 0.674}},
        }
    ],
    "architecture": {"image_size": 48, "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 2},
    "preprocessing": {"image_size": 48, "crop_ratio": 1.0},
    "evaluation": {"dataset": "tiny-imagenet val", "images": 10000},
    "training": {"recipe": "scala-xs-tiny-imagenet"},
    "weights_sha256": "673650c861246bbb0d5c3d7f5776b06468fee0305b5e99862dc78559639b6bd7",
}
_SETTINGS = EffectiveSettings(
    checkpoint=Path("checkpoints/scala-xs-tiny-imagenet"),
    engine="openvino 2026.4.1 bf16",
    device="AMD EPYC",
    num_threads=1,
    max_batch=16,
    profile_dir=Path("/root/.cache/scala-serve"),
).model_dump(mode="json")
_OFFERS = {"widths": [{"width": 0.25, "accuracy": 0.2353, "latency_ms": 1.1}]}
_NOT_BASE64 = errors.BadRequest("The image is not base64: Incorrect padding.")
_BROKEN = errors.BrokenImage("The image is damaged or incomplete.")
_STARTING = errors.Unavailable("The server is not serving: starting: the first widths are being warmed.")
_KEY_ERRORS: dict[int, tuple[str, list[errors.RequestError]]] = {
    401: ("No API key", [errors.NoApiKey("This server asks for an API key.")]),
    403: ("None of this server's API keys", [errors.UnknownApiKey("The API key is not, or no longer, one of ours.")]),
}
_TOO_OFTEN = errors.RateLimited("The API key of alice is used more often than it may be.", retry_after_s=1)


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _parameter(where: str, name: str, schema: dict[str, Any], text: str, example: object) -> dict[str, Any]:
    return {"name": name, "in": where, "schema": schema, "description": text, "example": example}


def _header(text: str, example: object, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": text, "schema": schema or {"type": "string"}, "example": example}


def _json(text: str, schema: dict[str, Any], headers: dict[str, Any], **examples: object) -> dict[str, Any]:
    named = {name: {"value": value} for name, value in examples.items()}
    return {
        "description": text,
        "headers": headers,
        "content": {"application/json": {"schema": schema, "examples": named}},
    }


def _problem(text: str, examples: Sequence[errors.RequestError]) -> dict[str, Any]:
    """An answer that is a problem, with examples of it."""
    named = {type(error).__name__: {"value": problem(error, _ID)} for error in examples}
    headers = _RETRY_AFTER if isinstance(examples[0], _COME_BACK) else {}
    headers = _AUTHENTICATE if isinstance(examples[0], errors.NoApiKey) else headers
    content = {"application/problem+json": {"schema": _ref(Problem), "examples": named}}
    return {"description": text, "headers": dict(headers), "content": content}


_COME_BACK = (errors.Shed, errors.RateLimited, errors.Unavailable)
_RETRY_AFTER = {"Retry-After": _header("Seconds until it makes sense", 2, {"type": "integer", "minimum": 1})}
_AUTHENTICATE = {"WWW-Authenticate": _header("How to say who asks", 'Bearer realm="scala-serve"')}
_REQUEST_ID = _header("The caller's own, or a new one; it is in the logs, too", _ID)
_TIMING = "decode;dur=0.845, queue;dur=1.088, inference;dur=1.304, total;dur=4.293"
_ANSWERED = {
    "X-Scala-Width": _header("The width that answered; with commas if several did", "1"),
    "X-Budget-Met": _header("Whether the answer was in time", "true", {"type": "string", "enum": ["true", "false"]}),
    "Server-Timing": _header("Milliseconds of each stage; of several images the longest of each", _TIMING),
}
_BUDGET = {"type": "number", "exclusiveMinimum": 0, "maximum": 600_000}
_IMAGE = {"schema": {"type": "string", "format": "binary"}}


def _text(description: str, example: str) -> dict[str, Any]:
    return {"description": description, "content": {"text/plain": {"schema": {"type": "string"}, "example": example}}}


def _example(description: str, example: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Of an answer whose schema the framework reads off the route."""
    return {200: {"description": description, "content": {"application/json": {"example": example}}}}


LIVEZ: dict[str, Any] = {"responses": {200: _text("The event loop turns", "ok")}}
READYZ: dict[str, Any] = {
    "responses": {
        200: _text("The narrowest and the widest width are warmed", "ready"),
        503: _text("Starting, draining or failed", "starting: the first widths are being warmed"),
    }
}
METRICS: dict[str, Any] = {
    "responses": {200: _text("Prometheus text format", 'scala_budget_total{outcome="met"} 3781.0')}
}
SETTINGS: dict[str, Any] = {
    "responses": _example("By the names that environment and file have for them", _SETTINGS),
}
MODEL: dict[str, Any] = {"responses": _example("The card, with what this machine makes of each width", _MODEL)}

QUOTE: dict[str, Any] = {
    "responses": {
        **_example("What such a request would get", _QUOTE),
        400: _problem("No budget, or one that makes no sense", [errors.BadRequest("There is no budget_ms.")]),
        503: _problem("Starting, draining or failed", [_STARTING]),
    },
    "openapi_extra": {
        "parameters": [
            {"required": True} | _parameter("query", "budget_ms", _BUDGET, "Milliseconds that a request may take", 100)
        ]
    },
}

CLASSIFY: dict[str, Any] = {
    "responses": {
        200: _json(
            "One image, or `results` for several: each its answer or its error",
            {"anyOf": [_ref(Classification), _ref(Classifications)]},
            _ANSWERED,
            one={**_FRAME, **_ANSWER},
            several={**_FRAME, "results": [_ANSWER, {"error": problem(_BROKEN, _ID)}]},
        ),
        400: _problem(
            "Empty body, bad multipart, JSON, base64, query or header",
            [errors.BadRequest("X-Latency-Budget-Ms is 'soon'; it must be a number of milliseconds such as 100.")],
        ),
        413: _problem(
            "More bytes, pixels or images than the limit",
            [errors.TooLarge("The image declares 90000 x 90000 = 8100000000 pixels; the limit is 50000000.")],
        ),
        415: _problem("Not an image type we read", [errors.UnsupportedImage("The bytes are no image we recognise.")]),
        422: _problem(
            "A broken image, an untrained width, or a budget or floor that no width can satisfy here even when idle; "
            "`widths` lists what can",
            [_BROKEN, errors.Impossible("A budget of 0.1 ms cannot be met at any width.", extra=_OFFERS)],
        ),
        429: _problem(
            "Refused for load, or the API key was used too often",
            [errors.Shed("Even the narrowest width would be late; try again in 2 s.", retry_after_s=2)],
        ),
        500: _problem("A bug; it is in the log", [errors.EngineFailed("The engine failed on this batch.")]),
        503: _problem("Starting, draining or failed", [_STARTING]),
        504: _problem("The deadline came first", [errors.Expired("The deadline passed after 100 ms.")]),
    },
    "openapi_extra": {
        "parameters": [
            _parameter("query", "top_k", {"type": "integer", "minimum": 1, "default": 5}, "Classes to return", 2),
            _parameter("header", "X-Latency-Budget-Ms", _BUDGET, "Milliseconds this request may take", 100),
            _parameter(
                "header",
                "X-Min-Accuracy",
                {"type": "number", "minimum": 0, "maximum": 1},
                "Floor on the width's accuracy",
                0.2,
            ),
            _parameter("header", "X-Width", {"type": "number"}, "Pins a trained width", 1),
            _parameter(
                "header", "traceparent", {"type": "string"}, "W3C trace context", f"00-{_ID}-00f067aa0ba902b7-01"
            ),
        ],
        "requestBody": {
            "required": True,
            "content": {
                **dict.fromkeys(MEDIA_TYPES, _IMAGE),
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file"],
                        "properties": {"file": {"type": "array", "minItems": 1, "items": _IMAGE["schema"]}},
                    }
                },
                "application/json": {"schema": _ref(Images), "example": {"images": [_DOT]}},
            },
        },
    },
}


def document(app: FastAPI, *, num_classes: int, widths: Sequence[float], keys: bool) -> None:
    """Complete the document when it is first asked for."""
    of_routes = app.openapi

    def whole() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(of_routes(), {"top_k": {"maximum": num_classes}, "X-Width": {"enum": list(widths)}}, keys)
        return app.openapi_schema or {}

    app.openapi = whole  # type: ignore[method-assign]  # as the framework's own documentation does it


def _complete(document: dict[str, Any], known: dict[str, dict[str, Any]], keys: bool) -> None:
    models = [(model, "serialization") for model in (Classification, Classifications, Images, Problem)]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    components = document.setdefault("components", {})
    components["schemas"] = components.get("schemas", {}) | schemas["$defs"]
    if keys:
        components["securitySchemes"] = {"apiKey": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete_operation(operation, known, asks_for_key=keys and not is_open(path))


def _complete_operation(operation: dict[str, Any], known: dict[str, dict[str, Any]], *, asks_for_key: bool) -> None:
    request_id = _parameter("header", "X-Request-Id", {"type": "string"}, "Comes back, and is in the logs", _ID)
    operation["parameters"] = [
        {**parameter, "schema": parameter["schema"] | known.get(parameter["name"], {})}
        for parameter in (*operation.get("parameters", ()), request_id)
    ]
    responses = operation["responses"]
    if asks_for_key:
        operation["security"] = [{"apiKey": []}]
        responses |= {str(status): _problem(text, examples) for status, (text, examples) in _KEY_ERRORS.items()}
        responses.setdefault("429", _problem("The API key was used too often", [_TOO_OFTEN]))
    for response in responses.values():
        response["headers"] = response.get("headers", {}) | {"X-Request-Id": _REQUEST_ID}
