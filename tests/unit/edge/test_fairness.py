"""Nobody is forgotten: requests without a budget under overload, images without a decoder, many in one request."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import sys
from collections.abc import Callable, Coroutine
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic_core import to_json

from scala_model.preprocess import Preprocessing, to_pixels
from server.types import SMALL_BYTES
from tests.unit.edge.application import CLASSIFY, Reply, Runner, Site, check_problem, form, statuses
from tests.unit.toy import png

CAPACITY = 160.0  # images a second that the fake engine serves at the narrowest width, four in 25 ms
BUDGET = {"X-Latency-Budget-Ms": "200"}


async def stream(site: Site, rate: float, seconds: float) -> list[Reply]:
    """Requests with a budget, evenly spaced."""
    requests = []
    for k in range(int(rate * seconds)):
        requests.append(asyncio.create_task(site.classify(png(k % 200), BUDGET)))
        await asyncio.sleep(1 / rate)
    return await asyncio.gather(*requests)


async def later(seconds: float, request: Coroutine[None, None, Reply]) -> Reply:
    await asyncio.sleep(seconds)
    return await request


@pytest.mark.parametrize("default_budget_ms", [100, 400])
def test_who_names_no_budget_does_not_starve_under_overload(site: Runner, default_budget_ms: int) -> None:
    """Twice as many requests with a budget come as even the narrowest width can serve, all the time. Those without one
    have ten default budgets until their deadline, and are answered by then, whether their place in the queue is before
    that of the others or behind it."""

    async def scenario(site: Site) -> None:
        crowd = asyncio.create_task(stream(site, 2 * CAPACITY, 0.5 + 0.010 * default_budget_ms))
        patient = await asyncio.gather(*(later(0.2 + 0.0123 * k, site.classify()) for k in range(5)))
        assert statuses(patient) == {200: 5}
        assert not crowd.done(), "or the overload would not have lasted until the answer"
        assert max(reply.seconds for reply in patient) <= 0.010 * default_budget_ms
        replies = await crowd
        assert statuses(replies).keys() <= {200, 429, 504}
        assert statuses(replies).get(504, 0) <= 0.01 * len(replies), "given up where that saves several others"
        assert statuses(replies)[200] > 0.3 * len(replies), "half of them could be, in batches of four"
        assert all(reply.json()["budget_met"] for reply in replies if reply.status == 200)

    site(scenario, default_budget_ms=default_budget_ms)


def test_images_that_wait_for_a_decoder_are_in_the_queue_too(site: Runner) -> None:
    """No queue hides in waiting coroutines: what decoders hold counts, and is refused before a byte is decoded."""

    async def scenario(site: Site) -> None:
        await site.services.decoder_turns.acquire()  # all decoders are busy for a while
        await site.services.decoder_turns.acquire()
        requests = [asyncio.create_task(site.classify(photo())) for _ in range(10)]
        for _ in range(50):
            await asyncio.sleep(0)
        assert (site.services.admission.images, site.services.admission.preparing) == (3, 3)
        assert sum(request.done() for request in requests) == 7
        for _ in range(2):
            site.services.decoder_turns.release()
        assert statuses(await asyncio.gather(*requests)) == {200: 3, 429: 7}

    site(scenario, max_queue=3, max_pixels=100_000)


def spend_on(site: Site, seconds: float, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on images of this mode take so long to decode."""

    def slow(image: Image.Image, spec: Preprocessing) -> NDArray[np.uint8]:
        site.clock.spend(seconds * (image.mode == mode))
        return to_pixels(image, spec)

    monkeypatch.setattr("server.decode.to_pixels", slow)


def test_a_small_body_that_takes_long_in_a_thread_is_not_expected_of_small_images(
    site: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 2.5 s such an image had a quarter of all small images refused."""

    async def scenario(site: Site) -> None:
        spend_on(site, 2.5, "RGBA", monkeypatch)
        webp = encoded(Image.new("RGBA", (9, 9), (7, 7, 7, 254)), "WEBP")
        assert (await site.classify(webp, {"X-Latency-Budget-Ms": "60000"})).status == 200
        assert (await site.classify(headers={"X-Latency-Budget-Ms": "100"})).status == 200

    site(scenario)


def test_large_images_leave_decoders_to_others(site: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two callers with legal images of 50 million pixels kept both decoders of a server, and all others waited."""
    monkeypatch.setattr("server.decode.LARGE_BYTES", 4 * 120 * 120)

    async def scenario(site: Site) -> None:
        services, large, patient = site.services, photo(121), {"X-Latency-Budget-Ms": "60000"}
        await services.large_images.acquire(1)  # a large image is being decoded
        assert services.large_images.most == 1, "no second one at a time, of two decoders"
        requests = [asyncio.create_task(site.classify(large, patient)) for _ in range(10)]
        assert (await site.classify(photo(), {"X-Latency-Budget-Ms": "100"})).status == 200
        assert not any(request.done() for request in requests)
        assert services.admission.preparing == 0, "nor is their inference expected soon"
        assert (await site.classify(large, {"X-Latency-Budget-Ms": "100"})).status == 504
        services.large_images.release(1)
        assert statuses(await asyncio.gather(*requests)) == {200: 10}
        assert services.large_images.count == services.large_images.held_bytes == 0

    site(scenario, max_pixels=100_000)


@pytest.mark.parametrize(("seconds", "healthy"), [(50.0, True), (70.0, False)])
def test_a_decoder_that_hangs_ends_the_server(
    site: Runner, seconds: float, healthy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept its turn and its memory for ever, and what was not decoded in place timed out, though it was ready."""

    async def scenario(site: Site) -> None:
        spend_on(site, seconds, "RGB", monkeypatch)
        stuck = asyncio.create_task(site.classify(photo(), {"X-Latency-Budget-Ms": "1000"}))
        await asyncio.sleep(61)
        assert (await stuck).status == 504
        assert (await site.ask("GET", "/readyz")).status == (200 if healthy else 503)
        assert site.services.lifecycle.failed == (None if healthy else "a decoder has not come to an end in 60 s")

    site(scenario, max_pixels=100_000)


def as_json(image: bytes) -> tuple[str, bytes, dict[str, str]]:
    return CLASSIFY, to_json({"images": [base64.b64encode(image)]}), {"Content-Type": "application/json"}


def as_form(image: bytes) -> tuple[str, bytes, dict[str, str]]:
    return CLASSIFY, *form(image)


def as_tensor(image: bytes) -> tuple[str, bytes, dict[str, str]]:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [base64.b64encode(image)]}
    return "/v2/models/toy/infer", to_json({"inputs": [tensor]}), {}


@pytest.mark.parametrize("written", [as_json, as_form, as_tensor])
def test_a_large_body_is_taken_apart_beside_the_event_loop(
    site: Runner, written: Callable[[bytes], tuple[str, bytes, dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body of 19 MB in JSON held everybody up for 0.2 s: its base64 is the decoder's, its syntax a thread's."""
    read = list[str]()

    def noting(module: str, name: str) -> None:
        work = getattr(sys.modules[module], name)

        def noted(*given: object) -> object:
            read.append(name)
            return work(*given)

        monkeypatch.setattr(f"{module}.{name}", noted)

    for module, name in (
        ("server.routes.classify", "read_json"),
        ("server.routes.classify", "read_form"),
        ("server.oip.codec", "read_request"),
        ("server.decode", "_bytes_of"),
    ):
        noting(module, name)

    async def scenario(site: Site) -> None:
        for _ in range(2):
            await site.services.decoder_turns.acquire()  # all decoders are busy for a while
        path, body, headers = written(photo())
        request = asyncio.create_task(site.ask("POST", path, body, headers))
        for _ in range(50):
            await asyncio.sleep(0)
        assert read == [], "all of it waits for a thread"
        assert (await site.ask("POST", *written(png(1)))).status == 200, "a small one does not"
        for _ in range(2):
            site.services.decoder_turns.release()
        assert (await request).status == 200
        assert len(read) > 2

    site(scenario, max_pixels=100_000)


def photo(side: int = 120) -> bytes:
    """Too large to be decoded in place."""
    body = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)), "PNG")
    assert SMALL_BYTES < len(body) < 100_000
    return body


def encoded(image: Image.Image, image_format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


def test_images_are_counted_and_not_requests(site: Runner) -> None:
    """In the queue as in a batch: a request of four images fills four places."""

    async def scenario(site: Site) -> None:
        four, headers = form(*map(png, (1, 2, 3, 4)))
        two, _ = form(*map(png, (5, 6)))
        replies = await asyncio.gather(*(site.classify(body, headers) for body in (four, two, two)))
        assert statuses(replies) == {200: 2, 429: 1}
        assert sum(len(images) for _, images in site.engine.served) == 6
        assert max(len(images) for _, images in site.engine.served) <= site.engine.max_batch
        check_problem(replies[-1], 429)

    site(scenario, max_queue=6)


def test_a_wall_clock_that_is_set_changes_no_deadline(site: Runner) -> None:
    """A deadline is one monotonic instant, computed once: hours that come and go are no part of it."""
    chance = random.Random(0)

    async def scenario(site: Site) -> None:
        site.engine.seconds = lambda width, images: 0.5
        with mock.patch("time.time", side_effect=lambda: chance.uniform(0, 1e9)):
            headers = {"X-Latency-Budget-Ms": "120"}
            expired, patient = await asyncio.gather(site.classify(headers=headers), site.classify())
        check_problem(expired, 504)
        assert expired.seconds == pytest.approx(0.120, abs=1e-6)
        assert patient.status == 200

    site(scenario)
