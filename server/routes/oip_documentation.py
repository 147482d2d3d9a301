"""What OpenAPI says of the routes of the Open Inference Protocol."""

from __future__ import annotations

from typing import Any

from server.oip import schemas

BINARY = {"schema": {"type": "string", "format": "binary"}}


def _error(text: str) -> dict[str, Any]:
    return {"model": schemas.Error, "description": text}


def _request_schema() -> dict[str, Any]:
    """The schema of a request with what it refers to in place, since OpenAPI's own components are the framework's."""
    schema = schemas.InferenceRequest.model_json_schema()
    parts = schema.pop("$defs")

    def inlined(node: Any) -> Any:
        if isinstance(node, dict):
            reference = node.get("$ref")
            return {k: inlined(v) for k, v in node.items()} if reference is None else inlined(parts[reference[8:]])
        return [inlined(each) for each in node] if isinstance(node, list) else node

    found: dict[str, Any] = inlined(schema)
    return found


def _header(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


_MISTAKES = {"4XX": _error("Another mistake of the caller")}
_UNKNOWN = {404: _error("Another model or version than the one served")}
_NOT_READY = {503: _error("Starting, draining or failed")}
READY: dict[str, Any] = {"responses": {**_NOT_READY, **_MISTAKES}}
OF_MODEL: dict[str, Any] = {"responses": {**_UNKNOWN, **_MISTAKES}}
MODEL_READY: dict[str, Any] = {"responses": {**_UNKNOWN, **_NOT_READY, **_MISTAKES}}
LOAD: dict[str, Any] = {"responses": {400: _error("Always: models come and go with their server"), **_MISTAKES}}
INDEX: dict[str, Any] = {
    "responses": {400: _error("Something else than JSON"), 413: _error("A body of more than 1000 bytes"), **_MISTAKES},
    "openapi_extra": {
        "requestBody": {
            "required": False,
            "content": {"application/json": {"schema": schemas.IndexQuery.model_json_schema()}},
        }
    },
}
INFER: dict[str, Any] = {
    "responses": {
        200: {
            "model": schemas.InferenceResponse,
            "description": "JSON, followed by the binary tensors if any were wanted",
            "content": {
                "application/json": {
                    "example": {
                        "model_name": "scala-xs-tiny-imagenet",
                        "model_version": "1",
                        "id": "42",
                        "parameters": {"budget_ms": 100.0, "budget_met": True},
                        "outputs": [
                            {
                                "name": "probabilities",
                                "datatype": "BYTES",
                                "shape": [1, 2],
                                "data": ["0.644917:145:school bus", "0.247648:166:trolleybus"],
                            }
                        ],
                    }
                },
                "application/octet-stream": BINARY,
            },
        },
        400: _error("A request that cannot be read, or that asks for what there is not"),
        **_UNKNOWN,
        413: _error("More bytes, pixels, images or JSON values than the limit"),
        415: _error("A content type or coding that is not read here, or no image type that is"),
        422: _error("A broken image, or a budget, width or floor that cannot be had here even when idle"),
        429: _error("Refused for load; see Retry-After"),
        500: _error("A bug"),
        503: _error("Starting or draining"),
        504: _error("The deadline passed"),
    },
    "openapi_extra": {
        "parameters": [
            _header(
                "Inference-Header-Content-Length",
                {"type": "integer", "minimum": 0},
                "How many bytes of the body are JSON, before any compression; binary tensors follow. 0: the body is "
                "one encoded image. Absent: all of it is JSON",
            ),
            _header("Content-Encoding", {"type": "string", "enum": ["gzip", "deflate", "identity"]}, "Of the body"),
            _header(
                "X-Latency-Budget-Ms",
                {"type": "number", "exclusiveMinimum": 0, "maximum": 600000},
                "Milliseconds this request may take; so do the parameters `latency_budget_ms` and `timeout`, and the "
                "smallest counts",
            ),
            _header("X-Min-Accuracy", {"type": "number", "minimum": 0, "maximum": 1}, "Floor on the width's accuracy"),
            _header("X-Width", {"type": "number"}, "Pins a trained width"),
            _header("X-Request-Id", {"type": "string"}, "Comes back in the answer's header and in logs"),
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": _request_schema(),
                    "example": {
                        "id": "42",
                        "parameters": {"timeout": 100_000},
                        "inputs": [{"name": "pixels", "shape": [1, 1, 1, 3], "datatype": "UINT8", "data": [255, 0, 0]}],
                        "outputs": [{"name": "probabilities", "parameters": {"classification": 2}}],
                    },
                },
                "application/octet-stream": BINARY,
            },
        },
    },
}
