"""One request's stay inside, whatever its form: room for it, its images' way to their answers, and its end in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, MutableMapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from server.admission import Permit
from server.decode import Received
from server.errors import (
    BadRequest,
    BrokenImage,
    Expired,
    Gone,
    RequestError,
    Shed,
    TooLarge,
    UnsupportedImage,
    no_memory,
)
from server.services import Services
from server.types import Job, Terms, Timed

IMAGE_FAULTS = (BadRequest, BrokenImage, TooLarge, UnsupportedImage)


@asynccontextmanager
async def visit(request: Request, services: Services, terms: Terms, num_bytes: int | None) -> AsyncIterator[Visit]:
    """Let a request in that declares so many bytes, and end it at its deadline or when its client leaves.

    Raises TooLarge, Shed, Unavailable, Expired or Gone.
    """
    client = _Client(request.receive)
    inside = Visit(services, terms, client, request.scope["state"])
    try:
        with services.admission.permit(num_bytes) as inside.permit:
            services.admission.check_in_time(terms, undecoded_bytes=num_bytes or 0)
            async with asyncio.timeout(terms.deadline - time.monotonic()) as inside.limit:
                inside.permit.end_upload = partial(_end, inside.limit)
                yield inside
    except Shed:
        inside.count_unseen()
        raise
    except (TimeoutError, ClientDisconnect) as error:
        if client.gone or isinstance(error, ClientDisconnect):
            services.metrics.cancelled_before_dispatch.inc(
                inside.num_images - sum(job.dispatched for job in inside.jobs)
            )
            raise Gone("The client left before its answer was ready.") from None
        inside.count_unseen()
        if inside.permit.gave_way:
            raise services.admission.outlasted() from None
        given_ms = 1000 * (inside.terms.deadline - inside.terms.arrival)
        raise Expired(f"The deadline passed after {given_ms:g} ms.") from None


class Visit:
    """What a route does with a request that was let in: read it, perhaps narrow its terms, and classify its images."""

    permit: Permit
    limit: asyncio.Timeout

    def __init__(self, services: Services, terms: Terms, client: _Client, state: MutableMapping[str, Any]) -> None:
        self._services, self._client, self._state = services, client, state
        self.terms = state["terms"] = terms
        self.jobs: list[Job] = []  # of the images that were queued
        self.num_images = 0
        self._seen = False  # whether an image of it counted as an arrival

    def narrow(self, terms: Terms) -> None:
        """The body named other terms than the head; their deadline may have passed while it came in."""
        self.terms = self._state["terms"] = terms
        if (left_s := terms.deadline - time.monotonic()) <= 0 or self.permit.gave_way:
            raise TimeoutError
        self.limit.reschedule(asyncio.get_running_loop().time() + left_s)

    def count_unseen(self) -> None:
        """Refused or ended before an image was decoded: taken for one image, since nobody looked."""
        if not self._seen:
            self._services.arrived(self.terms)

    async def classify_each(self, images: Sequence[Received]) -> list[Timed | RequestError]:
        """The outcome of each image, queued together. A fault stays with its image."""
        with self._working(images):
            queued = [self._queue(each) if isinstance(each, Job) else each for each in await self._decode(images)]
            if len(self.jobs) > 1:
                await asyncio.gather(*(job.answer for job in self.jobs), return_exceptions=True)
            return [await _outcome(each) if isinstance(each, Job) else each for each in queued]

    async def classify_all(self, images: Sequence[Received]) -> list[Timed]:
        """The answers to all images, which are worth nothing without each other: the first fault is raised, naming its
        image if it is that one's alone, and those that still wait are not run."""
        with self._working(images):
            decoded = []
            for place, each in enumerate(await self._decode(images)):
                if isinstance(each, RequestError):
                    raise _named(each, place, len(images))
                decoded.append(each)
            for job in decoded:
                if isinstance(refusal := self._queue(job), RequestError):
                    raise refusal
            await asyncio.gather(*(job.answer for job in self.jobs))
            return [Timed(job.answer.result(), job.decode_s) for job in self.jobs]

    @contextmanager
    def _working(self, images: Sequence[Received]) -> Iterator[None]:
        """All bytes are in. Whatever happens now, no image stays in the queue for nobody."""
        self.num_images, self._state["jobs"] = len(images), self.jobs
        with self._client.watched(self.limit):
            try:
                yield
            finally:
                for job in self.jobs:
                    job.answer.cancel()

    async def _decode(self, images: Sequence[Received]) -> list[Job | RequestError]:
        if len(images) == 1:
            return [await self._decode_one(images[0])]
        async with asyncio.TaskGroup() as group:
            work = []
            for image in images:
                work.append(group.create_task(self._decode_one(image)))
                await asyncio.sleep(0)  # small ones are decoded in place: between two of them others have their turn
        return [task.result() for task in work]

    async def _decode_one(self, image: Received) -> Job | RequestError:
        started = time.monotonic()
        try:
            pixels = await self._services.decode(image)
        except RequestError as fault:
            return fault
        except MemoryError:
            return no_memory()
        decoded_at = time.monotonic()
        self._services.arrived(self.terms)
        self._seen = True
        return Job(self.terms, pixels, decoded_at, decode_s=decoded_at - started)

    def _queue(self, job: Job) -> Job | RequestError:
        try:
            self._services.lifecycle.check_working()
            due = self._services.admission.check_in_time(self.terms)
        except RequestError as refusal:
            return refusal
        self.jobs.append(job)
        self._services.queue.put(job, due)
        return job


async def _outcome(job: Job) -> Timed | RequestError:
    try:
        return Timed(await job.answer, job.decode_s)
    except RequestError as error:
        return error


def _named(fault: RequestError, place: int, num_images: int) -> RequestError:
    if num_images == 1 or type(fault) not in IMAGE_FAULTS:
        return fault
    return type(fault)(f"Image {place} (the first is 0) of {num_images}: {fault.detail}", extra=fault.extra)


class _Client:
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
        _end(limit)


def _end(limit: asyncio.Timeout) -> None:
    with suppress(RuntimeError):  # the deadline came at the same moment
        limit.reschedule(0)
