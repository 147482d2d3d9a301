"""``POST /v1/classify``: an image in, a class out, within the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from fastapi import APIRouter
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from scala_model.width import Width
from server.admission import Permit
from server.decode import MEDIA_TYPES, Received, check_media_type
from server.errors import BadRequest, Impossible, Shed, TooLarge, Unavailable, UnsupportedBody, UnsupportedImage
from server.form import files_of
from server.json_body import count_bytes, parse_json
from server.log import log_engine_failures
from server.response import classification, classifications, settle, write_in_time
from server.routes.documentation import CLASSIFY
from server.routes.visit import visit
from server.services import Services
from server.types import Terms, Timed

MAX_BUDGET_MS = 600_000
VALUES_A_PREDICTION = 10  # its label, its number and its score, each named, cost as much as so many numbers
LATE_FACTOR = 10  # an answer to a request without a budget may take ten default budgets

router = APIRouter()


@router.post("/v1/classify", response_model=None, **CLASSIFY)
async def classify(request: Request) -> Response:
    """Classify one image, or several, with the most accurate width that fits the budget and the present load."""
    services: Services = request.scope["state"]["services"]
    services.lifecycle.check_serving()
    terms = read_terms(request, services)
    top_k = read_top_k(request, len(services.labels))
    async with visit(request, services, terms, read_content_length(request.headers)) as inside:
        images, single = await read_images(request, services, inside.permit)
        outcomes = await inside.classify_each(images)
        first, state = outcomes[0], request.scope["state"]
        if isinstance(first, Exception) and (single or all(isinstance(each, Shed | Unavailable) for each in outcomes)):
            raise first
        log_engine_failures(outcomes, state["request_id"])
        answers = [outcome for outcome in outcomes if isinstance(outcome, Timed)]
        write = partial(classification if single else classifications, services, terms, outcomes, top_k, state)
        num_values = len(answers) * (len(services.labels) + VALUES_A_PREDICTION * top_k)
        body, met = await write_in_time(terms, answers, write, num_values)
    return Response(body, headers=settle(services, terms, answers, met, state), media_type="application/json")


async def read_images(request: Request, services: Services, permit: Permit) -> tuple[list[Received], bool]:
    """The encoded images of a request, and whether there is one, which is answered without a list.

    Raises UnsupportedBody, BadRequest, UnsupportedImage, TooLarge or Shed.
    """
    if (coding := request.headers.get("content-encoding") or "identity").lower() != "identity":
        raise UnsupportedBody(f"The body is compressed ({coding[:50]!r}), which is not read here: send it as it is.")
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("multipart/form-data", "application/json"):
        check_media_type(media_type)
        body = await read_body(request, permit)
        permit.set_images(1)
        return [body], True
    body, most = await read_body(request, permit), permit.admission.max_images
    if media_type == "application/json":
        images = await services.read(len(body), read_json, body, most)
    else:
        images = await services.read(len(body), read_form, body, request.headers["content-type"], most)
    permit.set_images(len(images))
    return images, len(images) == 1


def read_json(body: bytes, max_images: int) -> list[Received]:
    """The images of ``{"images": [...]}``, still base64. Raises BadRequest or TooLarge."""
    form = '{"images": ["<base64>", ...]}'
    if count_bytes(body, b",") > 2 * max_images:  # 20 MB of small values would keep the event loop for a second
        raise TooLarge(
            f"The JSON body has more entries than the queue has places ({max_images}): send fewer images at once."
        )
    try:
        document = parse_json(body)
    except TooLarge:
        raise
    except ValueError as error:
        raise BadRequest(f"The JSON body, which must be {form}, cannot be read: {error}.") from None
    # By hand: a model would list every fault of a body that may be made of millions.
    images = document.get("images") if isinstance(document, dict) and len(document) == 1 else None
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise BadRequest(f"The JSON body must be {form}: nothing but a list of one or more texts.")
    return images


def read_form(body: bytes, content_type: str, max_images: int) -> list[Received]:
    """The ``file`` parts of a multipart form, those of another type as errors. Raises BadRequest or TooLarge."""
    images = [_image_or_error(*each) for each in files_of(body, content_type, max_images)]
    if not images:
        raise BadRequest("The form holds no file: send the image in a part named 'file', with a file name.")
    return images


def _image_or_error(media_type: str, content: bytes) -> Received:
    try:
        check_media_type(media_type)
    except UnsupportedImage as error:
        return error
    return content


async def read_body(request: Request, permit: Permit) -> bytes:
    """The whole body, counted against the limits while it comes in. Raises TooLarge, Shed, or BadRequest when empty."""
    chunks = []
    async for chunk in request.stream():
        permit.add_bytes(len(chunk))
        chunks.append(chunk)
    permit.end_upload = None
    body = b"".join(chunks)
    if not body:
        raise BadRequest(f"The body is empty: send an encoded image ({', '.join(MEDIA_TYPES[:3])}, ...).")
    return body


def read_terms(request: Request, services: Services) -> Terms:
    """Budget, pin and floor of the headers. Raises BadRequest for what is malformed, Impossible for what cannot be."""
    arrival: float = request.scope["state"]["arrival"]
    budget_ms = read_budget_ms(request.headers, "X-Latency-Budget-Ms")
    floor = _number(request.headers, "X-Min-Accuracy", "a fraction such as 0.55")
    if floor is not None and not 0 <= floor <= 1:
        raise BadRequest(f"X-Min-Accuracy is {floor:g}; it is a fraction from 0 to 1, such as 0.55.")
    widths = services.admission.widths_for(_pinned(request.headers, services), floor)
    order_by_s = (services.settings.default_budget_ms if budget_ms is None else budget_ms) / 1000
    deadline_s = LATE_FACTOR * order_by_s if budget_ms is None else order_by_s
    services.admission.check_possible(widths, deadline_s)
    return Terms(arrival, arrival + order_by_s, arrival + deadline_s, widths)


def read_budget_ms(given: Mapping[str, str], name: str) -> float | None:
    """The budget of this ``name`` among headers or query parameters, None when there is none. Raises BadRequest."""
    budget_ms = _number(given, name, "a number of milliseconds such as 100")
    if budget_ms is not None and not 0 < budget_ms <= MAX_BUDGET_MS:
        raise BadRequest(f"{name} is {given[name][:50]!r}; it must be above 0 and at most {MAX_BUDGET_MS}.")
    return budget_ms


def read_top_k(request: Request, num_classes: int) -> int:
    """Query ``top_k``, 5 unless given. Raises BadRequest."""
    unknown = set(request.query_params) - {"top_k"}
    if unknown:
        raise BadRequest(f"Unknown query parameter {min(unknown)[:50]!r}; there is only top_k.")
    text = request.query_params.get("top_k", str(min(5, num_classes)))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= num_classes):
        raise BadRequest(f"top_k is {text[:50]!r}; it must be a whole number from 1 to {num_classes}.")
    return int(text)


def read_content_length(headers: Headers) -> int | None:
    text = headers.get("content-length")
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _pinned(headers: Headers, services: Services) -> Width | None:
    ratio = _number(headers, "X-Width", "a trained width such as 0.5")
    if ratio is None:
        return None
    try:
        return services.checkpoint.config.width(ratio)
    except ValueError as error:
        raise Impossible(f"X-Width: {error}.", extra=services.admission.offers()) from None


def _number(given: Mapping[str, str], name: str, example: str) -> float | None:
    text = given.get(name)
    if text is None:
        return None
    try:
        value = float(text if "_" not in text else "nan")  # Python reads 1_000
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadRequest(f"{name} is {text[:50]!r}; it must be {example}.")
    return value
