"""The words in which routes are described for OpenAPI, and what makes their document whole.

The handlers read their requests themselves, so parameters and answers are written down: in ``documentation.py``, those
of the Open Inference Protocol in ``oip_documentation.py``. ``document`` adds what the edge does for all routes, and
what only the running server knows: its model, widths and classes, and whether it asks for keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server import errors
from server.api_keys import is_open
from server.oip import schemas as oip
from server.oip.classifier import VERSION
from server.routes.problem import is_oip, problem
from server.schemas import Classification, Classifications, Images, Problem, Tick

# The framework documents what it reads and writes itself. These are read by hand, or one of several forms.
MODELS = (
    Classification,
    Classifications,
    Images,
    Problem,
    Tick,
    oip.Error,
    oip.IndexQuery,
    oip.InferenceRequest,
    oip.InferenceResponse,
)
ANSWER_HEADERS = (  # those that a page of another origin may read
    "X-Request-Id",
    "X-Scala-Width",
    "X-Budget-Met",
    "Server-Timing",
    "Retry-After",
    "WWW-Authenticate",
    "Inference-Header-Content-Length",
)
ID = "4449e0d3f35c48c7a5bb15cfa7a1bf70"
NAME = "scala-xs-tiny-imagenet"
_SCHEMAS = "#/components/schemas/{model}"


def ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _SCHEMAS.format(model=model.__name__)}


def parameter(where: str, name: str, schema: Mapping[str, Any], text: str, example: object = None) -> dict[str, Any]:
    """``/docs`` sends the example of a header unless told otherwise: None where it would not go with every body."""
    shown = {} if example is None else {"example": example}
    return {"name": name, "in": where, "schema": schema, "description": text, **shown}


def header(text: str, example: object, schema: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"description": text, "schema": schema or {"type": "string"}, "example": example}


def plain(text: str, example: str) -> dict[str, Any]:
    return {"description": text, "content": {"text/plain": {"schema": {"type": "string"}, "example": example}}}


def answer(text: str, headers: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": text, "headers": {**headers}, "content": content}


def shown(schema: Mapping[str, Any], **examples: object) -> dict[str, Any]:
    return {"schema": schema, "examples": {name: {"value": value} for name, value in examples.items()}}


def example(text: str, value: object) -> dict[int, dict[str, Any]]:
    """The answers of a route whose schema the framework reads off it."""
    return {200: {"description": text, "content": {"application/json": {"example": value}}}}


def refused(text: str, *examples: errors.RequestError, by_oip: bool = False) -> dict[str, Any]:
    """An answer that is a problem, or an error of the Open Inference Protocol."""
    first, named = examples[0], {type(error).__name__: error for error in examples}
    headers = _RETRY_AFTER if isinstance(first, errors.Shed | errors.RateLimited | errors.Unavailable) else {}
    headers = _AUTHENTICATE if isinstance(first, errors.NoApiKey) else headers
    if by_oip:
        told = shown(ref(oip.Error), **{name: {"error": each.detail} for name, each in named.items()})
        return answer(text, headers, {"application/json": told})
    told = shown(ref(Problem), **{name: problem(each, ID) for name, each in named.items()})
    return answer(text, headers, {"application/problem+json": told})


_RETRY_AFTER = {"Retry-After": header("Seconds until it makes sense", 2, {"type": "integer", "minimum": 1})}
_AUTHENTICATE = {"WWW-Authenticate": header("How to say who asks", 'Bearer realm="scala-serve"')}
_REQUEST_ID = header("The caller's own, or a new one; it is in the logs, too", ID)
_ASKED_ID = parameter("header", "X-Request-Id", {"type": "string"}, "Comes back, and is in the logs", ID)
_IN_PATH = {
    "model": parameter("path", "model", {"type": "string"}, "The model's name", NAME),
    "version": parameter("path", "version", {"type": "string", "enum": [VERSION]}, "The model's version", VERSION),
}
_KEY_ERRORS: dict[str, tuple[str, errors.RequestError]] = {
    "401": ("No API key", errors.NoApiKey("This server asks for an API key.")),
    "403": ("None of this server's API keys", errors.UnknownApiKey("The API key is not, or no longer, one of ours.")),
    "429": (
        "The API key was used too often",
        errors.RateLimited("The API key of alice is used more often than it may be.", retry_after_s=1),
    ),
}


def document(app: FastAPI, *, model: str, num_classes: int, widths: Sequence[float], keys: bool) -> None:
    """Complete the document when it is first asked for."""
    of_routes = app.openapi
    known: dict[str, dict[str, Any]] = {
        "model": {"schema": {"enum": [model]}, "example": model},
        "top_k": {"schema": {"maximum": num_classes}},
        "X-Width": {"schema": {"enum": list(widths)}, "example": max(widths)},
    }

    def whole() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(of_routes(), known, keys)
        return app.openapi_schema or {}

    app.openapi = whole  # type: ignore[method-assign]  # as the framework's own documentation does it


def _complete(document: dict[str, Any], known: Mapping[str, Mapping[str, Any]], keys: bool) -> None:
    _, schemas = models_json_schema([(model, "serialization") for model in MODELS], ref_template=_SCHEMAS)
    components = document.setdefault("components", {})
    components["schemas"] = components.get("schemas", {}) | schemas["$defs"]
    if keys:
        components["securitySchemes"] = {"apiKey": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete_operation(path, operation, known)
            if keys and not is_open(path):
                _ask_for_key(path, operation)
            for each in operation["responses"].values():
                each["headers"] = each.get("headers", {}) | {"X-Request-Id": _REQUEST_ID}


def _complete_operation(path: str, operation: dict[str, Any], known: Mapping[str, Mapping[str, Any]]) -> None:
    in_path = [{"required": True} | _IN_PATH[name] for name in re.findall(r"{(\w+)}", path)]
    parameters, operation["parameters"] = [*in_path, *operation.get("parameters", ()), _ASKED_ID], []
    for each in parameters:
        more = known.get(each["name"], {})
        operation["parameters"].append({**each, **more, "schema": {**each["schema"], **more.get("schema", {})}})


def _ask_for_key(path: str, operation: dict[str, Any]) -> None:
    operation["security"] = [{"apiKey": []}]
    for status, (text, error) in _KEY_ERRORS.items():
        operation["responses"].setdefault(status, refused(text, error, by_oip=is_oip(path)))
