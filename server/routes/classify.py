"""``POST /v1/classify``: an image in, a class out, within the budget."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager, suppress

from fastapi import APIRouter
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from scala_model.width import Width
from server.admission import Permit
from server.decode import MEDIA_TYPES, check_media_type
from server.errors import BadRequest, Expired, Gone, Impossible, RequestError, Shed, TooLarge, Unavailable
from server.response import QuickJSONResponse, classification, classifications
from server.routes.documentation import CLASSIFY
from server.services import Services
from server.types import Job, Terms, Timed

MAX_BUDGET_MS = 600_000
LATE_FACTOR = 10  # an answer to a request without a budget may take ten default budgets

router = APIRouter()


@router.post("/v1/classify", response_model=None, **CLASSIFY)
async def classify(request: Request) -> Response:
    """Classify one image, or several, with the most accurate width that fits the budget and the present load."""
    services: Services = request.scope["state"]["services"]
    services.lifecycle.check_serving()
    terms = request.scope["state"]["terms"] = read_terms(request, services)
    top_k = read_top_k(request, len(services.labels))
    images: list[bytes] = []
    jobs: list[Job] = []
    client = Client(request.receive)
    try:
        num_bytes = read_content_length(request.headers)
        with services.admission.permit(num_bytes) as permit:
            services.admission.check_in_time(terms, undecoded_bytes=num_bytes or 0)
            async with asyncio.timeout(terms.deadline - time.monotonic()) as limit:
                images, single = await read_images(request, permit)
                request.scope["state"]["jobs"] = jobs
                with client.watched(limit):
                    work = [classify_image(services, terms, image, jobs) for image in images]
                    outcomes = [await work[0]] if single else await asyncio.gather(*work)
    except Shed:
        if not jobs:  # refused before it was decoded: taken for an image, since nobody looked
            services.arrived(terms)
        raise
    except (TimeoutError, ClientDisconnect) as error:
        if client.gone or isinstance(error, ClientDisconnect):
            services.metrics.cancelled_before_dispatch.inc(len(images) - sum(job.dispatched for job in jobs))
            raise Gone("The client left before its answer was ready.") from None
        if not jobs:
            services.arrived(terms)
        raise Expired(f"The deadline passed after {1000 * (terms.deadline - terms.arrival):g} ms.") from None
    first = outcomes[0]
    if isinstance(first, Exception) and (single or all(isinstance(each, Shed | Unavailable) for each in outcomes)):
        raise first
    respond = classification if single else classifications
    return QuickJSONResponse(**respond(services, terms, outcomes, top_k, request.scope["state"]))


async def classify_image(services: Services, terms: Terms, encoded: bytes, jobs: list[Job]) -> Timed | Exception:
    """Decode, queue, and wait for the batch. An image's fault is returned, so that it stays with that image."""
    started = time.monotonic()
    try:
        pixels = await services.decode(encoded)
        queued_at = time.monotonic()
        services.arrived(terms)
        services.lifecycle.check_serving()
        due = services.admission.check_in_time(terms)
        job = Job(terms, pixels, queued_at)
        jobs.append(job)
        services.queue.put(job, due)
        return Timed(await job.answer, queued_at - started)
    except RequestError as error:
        return error


class Client:
    """Watches for the caller's leaving, and then ends the request by moving its time limit to now."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.gone = False

    @contextmanager
    def watched(self, limit: asyncio.Timeout) -> Iterator[None]:
        """Once the body was read, all that can come is the disconnect."""
        watch = asyncio.create_task(self._watch(limit))
        try:
            yield
        finally:
            watch.cancel()

    async def _watch(self, limit: asyncio.Timeout) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        with suppress(RuntimeError):  # the deadline came at the same moment
            limit.reschedule(0)


async def read_images(request: Request, permit: Permit) -> tuple[list[bytes], bool]:
    """The encoded images of a request, and whether it is the one-image form.

    Raises BadRequest, UnsupportedImage, TooLarge or Shed.
    """
    content_type = request.headers.get("content-type")
    if not (content_type or "").lower().startswith("multipart/form-data"):
        check_media_type(content_type)
        body = await read_body(request, permit)
        permit.set_images(1)
        return [body], True
    body = await read_body(request, permit)
    parser = MultiPartParser(
        request.headers, _once(body), max_files=permit.admission.max_images + 1, max_part_size=len(body)
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        kind = TooLarge if error.message.startswith("Too many files") else BadRequest
        raise kind(f"The multipart body cannot be read: {error.message}") from None
    try:
        files = [part for name, part in form.multi_items() if name == "file" and isinstance(part, UploadFile)]
        if not files:
            raise BadRequest("The form holds no file: send the image in a part named 'file', with a file name.")
        permit.set_images(len(files))
        for part in files:
            check_media_type(part.content_type)
        return [await part.read() for part in files], len(files) == 1
    finally:
        await form.close()


async def read_body(request: Request, permit: Permit) -> bytes:
    """The whole body, counted against the limits while it comes in. Raises TooLarge, Shed, or BadRequest when empty."""
    chunks = []
    async for chunk in request.stream():
        permit.add_bytes(len(chunk))
        chunks.append(chunk)
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


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body
