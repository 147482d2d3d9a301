"""``/v2/...``: the Open Inference Protocol over HTTP, for the clients that already speak it.

Errors are ``{"error": "..."}`` (see ``problem.py``). What bodies hold is the business of ``server/oip/``.
"""

from __future__ import annotations

import asyncio
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version as installed_version
from typing import Any, Literal

from fastapi import APIRouter, Depends
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from server.admission import Permit
from server.decode import MEDIA_TYPES
from server.errors import BadRequest, TooLarge, Unavailable, UnsupportedBody
from server.oip import codec, schemas
from server.oip.classifier import IMAGE, VERSION, Classifier, images_of, the_input
from server.oip.compression import choose_coding, pack, read_coding, unpacked
from server.oip.statistics import model_statistics
from server.response import settle, told_of_budget, write_in_time
from server.routes import oip_documentation as told
from server.routes.classify import MAX_BUDGET_MS, read_body, read_budget_ms, read_content_length, read_terms
from server.routes.visit import visit
from server.services import Services
from server.types import SMALL_BYTES, Terms, Timed

EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "schedule_policy",
    "statistics",
]
HEADER_BYTES = "Inference-Header-Content-Length"
# The last but one is what curl says of whatever it sends; images are for raw requests.
MEDIA_TYPES_READ = ("", "application/json", "application/octet-stream", "application/x-www-form-urlencoded", "image/*")
MAX_QUERY_BYTES = 1000
PREFIXES = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
MAX_TIMEOUT_US, MAX_PRIORITY = 1000 * MAX_BUDGET_MS, 2**32 - 1
PACKET_BYTES = 1400  # an answer that fits into one gains nothing by compression

router = APIRouter(tags=["Open Inference Protocol"])


@router.get("/v2/health/live", **told.LIVE)
async def live() -> schemas.Live:
    """200 while the event loop turns."""
    return schemas.Live(live=True)


@router.get("/v2/health/ready", **told.READY)
async def ready(request: Request) -> schemas.Ready:
    """200 once the narrowest and the widest width are warmed; 503 while starting, draining or failed."""
    _check_ready(_services(request))
    return schemas.Ready(ready=True)


@router.get("/v2/", include_in_schema=False)
@router.get("/v2", **told.SERVER)
async def server_metadata() -> schemas.ServerMetadata:
    """The server, and the extensions of the protocol that it knows."""
    return schemas.ServerMetadata(name="scala-serve", version=installed_version("scala-serve"), extensions=EXTENSIONS)


@router.get("/v2/models/stats", **told.ALL_STATISTICS)
async def statistics(request: Request) -> schemas.Statistics:
    """What the only model has done since the server started, by whichever route."""
    services = _services(request)
    name = _classifier(services).name
    return schemas.Statistics(model_stats=[model_statistics(name, services.metrics, services.batches)])


async def model_metadata(request: Request) -> schemas.ModelMetadata:
    """The model's inputs and outputs."""
    return _classifier(_services(request)).metadata()


async def model_ready(request: Request) -> schemas.ModelReady:
    """200 when the server is ready."""
    services = _services(request)
    _check_ready(services)
    return schemas.ModelReady(name=_classifier(services).name, ready=True)


async def model_config(request: Request) -> schemas.ModelConfig:
    """The same as the metadata in the words of the extension "model configuration", and how many images fit."""
    return _classifier(_services(request)).config()


async def infer(request: Request) -> Response:
    """Classify a batch of images, all or none of them, with the most accurate widths that fit its budget."""
    services = _services(request)
    services.lifecycle.check_serving()
    json_bytes, coding = _read_form(request.headers)
    terms, model = read_terms(request, services), _classifier(services)
    async with visit(request, services, terms, read_content_length(request.headers)) as inside:
        body = await read_body(request, inside.permit)
        if coding is not None:
            body = await _unpack(body, coding, inside.permit)
        text_bytes = len(body) if json_bytes is None else json_bytes
        if json_bytes == 0:
            asked = codec.read_raw(body, IMAGE.name)
        else:
            asked = await services.read(text_bytes, codec.read_request, body, json_bytes)
        model.check_outputs(asked)
        tensor = the_input(asked)
        inside.permit.set_images(tensor.shape[0])
        inside.narrow(_narrowed(terms, asked.parameters, services))
        answers = await inside.classify_all(await services.read(text_bytes, images_of, tensor))
        coding = choose_coding(request.headers.get("accept-encoding"))
        write = partial(_write, model, asked, answers, inside.terms, coding)
        num_values = len(answers) * len(services.labels)
        (content, form), met = await write_in_time(inside.terms, answers, write, num_values)
    headers = settle(services, inside.terms, answers, met, request.scope["state"])
    return Response(content, headers=headers | form)


@router.post("/v2/repository/index", **told.INDEX)
async def repository_index(request: Request) -> list[schemas.IndexEntry]:
    """The only model, and whether it is ready."""
    services, asked = _services(request), await _read_query(request)
    ready = services.lifecycle.ready
    if asked.ready and not ready:
        return []
    reason = "" if ready else services.lifecycle.why_not_ready()
    state: Literal["READY", "UNAVAILABLE"] = "READY" if ready else "UNAVAILABLE"
    return [schemas.IndexEntry(name=_classifier(services).name, version=VERSION, state=state, reason=reason)]


@router.post("/v2/repository/models/{model}/load", **told.CHANGE)
@router.post("/v2/repository/models/{model}/unload", **told.CHANGE)
async def change_repository() -> None:
    """Never: a model comes and goes with its server."""
    raise BadRequest("Models cannot be loaded or unloaded: start another server with another checkpoint.")


async def check_model(request: Request) -> None:
    """Raises UnknownModel."""
    named = request.path_params
    _classifier(_services(request)).check_name(named["model"], named.get("version", VERSION))


for prefix in PREFIXES:
    named: dict[str, Any] = {"dependencies": [Depends(check_model)]}
    router.get(prefix, **named, **told.MODEL)(model_metadata)
    router.get(f"{prefix}/ready", **named, **told.MODEL_READY)(model_ready)
    router.get(f"{prefix}/config", **named, **told.CONFIG)(model_config)
    router.get(f"{prefix}/stats", **named, **told.STATISTICS)(statistics)
    router.post(f"{prefix}/infer", **named, **told.INFER, response_model=None)(infer)


def infer_paths(model: str) -> dict[str, str]:
    """Where the model of this name is asked, and the route of each, for whoever calls ``infer`` past the framework."""
    return {f"{prefix}/infer".format(model=model, version=VERSION): f"{prefix}/infer" for prefix in PREFIXES}


def _services(request: Request) -> Services:
    services: Services = request.scope["state"]["services"]
    return services


def _classifier(services: Services) -> Classifier:
    return Classifier(services.settings.model_name, services.labels, services.settings.max_queue)


def _check_ready(services: Services) -> None:
    if not services.lifecycle.ready:
        raise Unavailable(f"The server is not ready: {services.lifecycle.why_not_ready()}; try again.")


async def _read_query(request: Request) -> schemas.IndexQuery:
    """Most clients send no body at all. Raises BadRequest or TooLarge."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_QUERY_BYTES:
            raise TooLarge(f"The body has {len(body)} bytes or more; the limit is {MAX_QUERY_BYTES}: send less.")
    try:
        return schemas.IndexQuery.model_validate_json(body or b"{}")
    except ValidationError:
        raise BadRequest('The body must be empty or say whether only ready models count: {"ready": true}.') from None


def _read_form(headers: Headers) -> tuple[int | None, str | None]:
    """How many bytes of the body are JSON, and how all of it is compressed. Raises BadRequest or UnsupportedBody."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in MEDIA_TYPES_READ and media_type not in MEDIA_TYPES:
        raise UnsupportedBody(
            f"The declared type {media_type[:100]!r} is not one that is read here; send application/json, "
            "application/octet-stream, or no type at all."
        )
    text, coding = headers.get(HEADER_BYTES), read_coding(headers.get("content-encoding"))
    if text is None:
        return None, coding
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise BadRequest(f"{HEADER_BYTES} is {text[:50]!r}; it must be the number of bytes of the JSON.")
    return int(text), coding


async def _unpack(body: bytes, coding: str, permit: Permit) -> bytes:
    """The body without its compression. Raises BadRequest, TooLarge or Shed."""
    permit.unpack()
    pieces, unpacking, in_place = [], unpacked(body, coding), len(body) <= SMALL_BYTES
    while piece := next(unpacking) if in_place else await asyncio.to_thread(next, unpacking):
        permit.add_bytes(len(piece))
        pieces.append(piece)
        in_place = False
    return b"".join(pieces)


def _narrowed(terms: Terms, parameters: Mapping[str, Any], services: Services) -> Terms:
    """The terms with the priority and the smallest of all budgets. Raises BadRequest or Impossible."""
    budgets_ms = [each for each in (_budget_ms(parameters), _timeout_ms(parameters)) if each is not None]
    terms = replace(terms, priority=_whole(parameters, "priority", MAX_PRIORITY, "1 for the highest, or 0 for none"))
    due = terms.arrival + min(budgets_ms, default=math.inf) / 1000
    if due >= (terms.deadline if terms.order_by == terms.deadline else math.inf):  # what the header named, if it did
        return terms
    services.admission.check_possible(terms.widths, due - terms.arrival)
    return replace(terms, order_by=due, deadline=due)


def _budget_ms(parameters: Mapping[str, Any]) -> float | None:
    name = "latency_budget_ms"
    if name not in parameters:
        return None
    value = parameters[name]  # of any type and size
    return read_budget_ms({name: value[:50] if isinstance(value, str) else reprlib.repr(value)}, name)


def _timeout_ms(parameters: Mapping[str, Any]) -> float | None:
    microseconds = _whole(parameters, "timeout", MAX_TIMEOUT_US, "in microseconds, or 0 for none")
    return microseconds / 1000 if microseconds else None


def _whole(parameters: Mapping[str, Any], name: str, most: int, meaning: str) -> int:
    value = parameters.get(name, 0)
    if type(value) is not int or not 0 <= value <= most:
        raise BadRequest(f"{name} is {reprlib.repr(value)}; it must be a whole number up to {most}: {meaning}.")
    return value


def _write(
    model: Classifier, asked: codec.Request, answers: Sequence[Timed], terms: Terms, coding: str | None, met: bool
) -> tuple[bytes, dict[str, str]]:
    """The answer's body, and the headers that tell its form."""
    outputs = model.outputs(asked, [timed.answer for timed in answers])
    named = {} if asked.id is None else {"id": asked.id}
    frame = {"model_name": model.name, "model_version": VERSION, **named, "parameters": told_of_budget(terms, met)}
    body, json_bytes = codec.write_response(frame, outputs)
    headers = {"Content-Type": "application/json"}
    if json_bytes is not None:
        headers = {"Content-Type": "application/octet-stream", HEADER_BYTES: str(json_bytes)}
    if coding is not None and len(body) > PACKET_BYTES and len(packed := pack(body, coding)) < len(body):
        return packed, headers | {"Content-Encoding": coding}
    return body, headers
