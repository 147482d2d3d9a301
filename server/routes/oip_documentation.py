"""What OpenAPI says of the routes of the Open Inference Protocol."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from server import errors
from server.oip import schemas
from server.oip.classifier import VERSION, Classifier
from server.routes import openapi
from server.routes.documentation import ANSWERED, BROKEN, TERMS, UNSERVED
from server.routes.openapi import NAME, answer, example, header, parameter, ref, shown

refused = partial(openapi.refused, by_oip=True)

_CLASSIFIER = Classifier(NAME, [""] * 200, max_images=256)
_NOTHING, _ONCE = {"count": 0, "ns": 0}, {"count": 1, "ns": 1_024_581}
_COMPUTED = {"compute_input": _ONCE, "compute_infer": _ONCE, "compute_output": _NOTHING}
_STATISTICS = {
    "name": NAME,
    "version": VERSION,
    "last_inference": 1_795_415_843_017,
    "inference_count": 1,
    "execution_count": 1,
    "inference_stats": {
        **{"success": _ONCE, "fail": _NOTHING, "queue": _ONCE},
        **_COMPUTED,
        **{"cache_hit": _NOTHING, "cache_miss": _NOTHING},
    },
    "batch_stats": [{"batch_size": 1, **_COMPUTED}],
}
_NOT_READY = {
    503: refused(
        "Starting, draining or failed",
        errors.Unavailable("The server is not ready: starting: the first widths are being warmed; try again."),
    )
}
_UNKNOWN = {
    404: refused(
        "Another model or version than the one served",
        errors.UnknownModel(f"There is no model 'other'; the one served here is {NAME!r}."),
    )
}

LIVE: dict[str, Any] = {"responses": example("The event loop turns", {"live": True})}
READY: dict[str, Any] = {
    "responses": {**example("The narrowest and the widest width are warmed", {"ready": True}), **_NOT_READY}
}
SERVER: dict[str, Any] = {
    "responses": example(
        "What is served, and the protocol's extensions",
        {"name": "scala-serve", "version": "0.1.0", "extensions": ["binary_tensor_data", "classification"]},
    )
}
ALL_STATISTICS: dict[str, Any] = {"responses": example("Of the only model", {"model_stats": [_STATISTICS]})}
STATISTICS: dict[str, Any] = {"responses": {**ALL_STATISTICS["responses"], **_UNKNOWN}}
MODEL: dict[str, Any] = {
    "responses": {**example("-1 is any size", _CLASSIFIER.metadata().model_dump()), **_UNKNOWN},
}
MODEL_READY: dict[str, Any] = {
    "responses": {**example("The server is ready", {"name": NAME, "ready": True}), **_UNKNOWN, **_NOT_READY}
}
CONFIG: dict[str, Any] = {
    "responses": {**example("Dimensions without the batch's", _CLASSIFIER.config().model_dump()), **_UNKNOWN},
}
CHANGE: dict[str, Any] = {
    "status_code": 400,
    "responses": {
        400: refused(
            "Always",
            errors.BadRequest("Models cannot be loaded or unloaded: start another server with another checkpoint."),
        )
    },
}
INDEX: dict[str, Any] = {
    "responses": {
        **example("The only model", [{"name": NAME, "version": VERSION, "state": "READY", "reason": ""}]),
        400: refused(
            "Another body",
            errors.BadRequest('The body must be empty or say whether only ready models count: {"ready": true}.'),
        ),
        413: refused(
            "A body of more than 1000 bytes",
            errors.TooLarge("The body has 1001 bytes or more; the limit is 1000: send less."),
        ),
    },
    "openapi_extra": {
        "requestBody": {
            "content": {"application/json": {"schema": ref(schemas.IndexQuery), "example": {"ready": True}}}
        }
    },
}

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FRAME = {"model_name": NAME, "model_version": VERSION, "parameters": {"budget_ms": 100.0, "budget_met": True}}
_BEST = {
    "name": "probabilities",
    "datatype": "BYTES",
    "shape": [1, 2],
    "data": ["0.096201:113:lampshade", "0.081535:168:umbrella"],
}
_HALF = {"name": "width", "datatype": "FP32", "shape": [1, 1], "parameters": {"binary_data_size": 4}}
_BINARY_JSON = json.dumps({**_FRAME, "outputs": [_HALF]})
_JSON_BYTES = header(
    "How many bytes are JSON, before any compression; only if binary tensors follow",
    len(_BINARY_JSON),
    {"type": "integer", "minimum": 1},
)
INFER: dict[str, Any] = {
    "responses": {
        200: answer(
            "JSON, followed by the binary tensors if any were wanted",
            ANSWERED | {"Inference-Header-Content-Length": _JSON_BYTES},
            {
                "application/json": shown(
                    ref(schemas.InferenceResponse), best={**_FRAME, "id": "42", "outputs": [_BEST]}
                ),
                "application/octet-stream": {**_BINARY, "example": f"{_BINARY_JSON}\0\0\0?"},
            },
        ),
        400: refused(
            "A request that cannot be read, or that asks for what there is not",
            errors.BadRequest("Input 'image' must have either data or the parameter binary_data_size."),
        ),
        **_UNKNOWN,
        413: refused(
            "More bytes, pixels, images or JSON values than the limit",
            errors.TooLarge(
                "The image declares 90000 x 90000 = 8100000000 pixels; the limit is 50000000 (SCALA_MAX_PIXELS): "
                "send a smaller one."
            ),
        ),
        415: refused(
            "A content type or coding that is not read here, or no image type that is",
            errors.UnsupportedBody("The content coding 'br' is unknown; send gzip, deflate or none."),
            errors.UnsupportedImage("The bytes are no image we recognise."),
        ),
        422: refused(
            "A broken image, or a budget, width or floor that cannot be had here even when idle",
            BROKEN,
            errors.Impossible("A budget of 0.1 ms cannot be met at any width."),
        ),
        **{status: refused(*told) for status, told in UNSERVED.items()},
    },
    "openapi_extra": {
        "parameters": [
            parameter(
                "header",
                "Inference-Header-Content-Length",
                {"type": "integer", "minimum": 0},
                "How many bytes of the body are JSON, before any compression; binary tensors follow. 0: the body is "
                "one encoded image. Absent: all of it is JSON",
            ),
            parameter(
                "header",
                "Content-Encoding",
                {"type": "string", "enum": ["identity", "gzip", "deflate"]},
                "Of the body",
                "identity",
            ),
            *TERMS,
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": ref(schemas.InferenceRequest),
                    "example": {
                        "id": "42",
                        "parameters": {"timeout": 100_000},
                        "inputs": [{"name": "pixels", "shape": [1, 1, 1, 3], "datatype": "UINT8", "data": [255, 0, 0]}],
                        "outputs": [{"name": "probabilities", "parameters": {"classification": 2}}],
                    },
                },
                "application/octet-stream": _BINARY,
            },
        },
    },
}
