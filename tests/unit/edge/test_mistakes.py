"""The caller's mistakes: each one sentence that names the value and the remedy."""

from __future__ import annotations

from unittest import mock

import pytest
from starlette.types import Message

from tests.unit.edge.application import (
    BODY_LIMIT,
    CLASSIFY,
    IMAGE,
    PIXEL_LIMIT,
    Runner,
    Site,
    check_problem,
    client,
    form,
)
from tests.unit.toy import png

BAD_HEADERS = [
    *(
        ("X-Latency-Budget-Ms", value)
        for value in ("abc", "", "-5", "0", "-0", "nan", "inf", "-inf", "1e9", "600000.1", "1_000", "0x10", "1e999")
    ),
    *(("X-Min-Accuracy", value) for value in ("1.5", "-0.1", "high", "nan", "55%")),
    *(("X-Width", value) for value in ("wide", "nan", "inf", "")),
]
BAD_QUERIES = [
    "top_k=0",
    "top_k=201",
    "top_k=abc",
    "top_k=-1",
    "top_k=",
    "top_k=1.0",
    "top_k=%C2%B2",
    "topk=3",
    "top_k=1&x=2",
]


def test_a_header_that_makes_no_sense_is_named_with_its_value(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for name, value in BAD_HEADERS:
            detail = check_problem(await site.classify(headers={name: value}), 400)
            assert name in detail, (name, value)
        assert site.engine.served == []

    site(scenario)


def test_a_query_that_makes_no_sense_is_refused(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for query in (*BAD_QUERIES, "top_k=000000001" + "9" * 2000, "top_k=" + "9" * 2000):
            assert "top_k" in check_problem(await site.classify(query=f"?{query}"), 400), query

    site(scenario)


@pytest.mark.parametrize("method_and_path", ["POST /v1/classify", "GET /v1/quote", "GET /v1/model", "GET /"])
def test_a_long_query_is_not_even_looked_at(site: Runner, method_and_path: str) -> None:
    """To take 32 KB of ``&`` apart held the event loop for a tenth of a second."""
    method, path = method_and_path.split()

    async def scenario(site: Site) -> None:
        with mock.patch("starlette.requests.QueryParams", side_effect=AssertionError):
            for query in ("top_k=" + "1" * 2043, "a" + "&a" * 32):
                detail = check_problem(await site.ask(method, f"{path}?{query}", IMAGE), 400)
                assert "more than 2048 bytes or 32 parameters" in detail
        for query in ("top_k=" + "1" * 2042, "a" + "&a" * 31):
            reply = await site.ask(method, f"{path}?{query}", IMAGE)
            assert b"2048" not in reply.body

    site(scenario)


def test_a_body_that_makes_no_sense_is_refused(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        boundary = {"Content-Type": "multipart/form-data; boundary=x"}
        for body, headers in (
            (b"", {}),
            (b"", boundary),
            (b"no form", {"Content-Type": "multipart/form-data"}),
            (b"no form", boundary),
            (b"--x--\r\n", boundary),
            form(IMAGE, name="picture"),
            (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--x--\r\n', boundary),
            form(b""),
        ):
            check_problem(await site.classify(body, headers), 400)

    site(scenario)


def test_a_compressed_body_is_refused_by_name(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        reply = await site.classify(IMAGE, {"Content-Encoding": "gzip"})
        check_problem(reply, 415)
        assert "'gzip'" in reply.json()["detail"]
        assert (await site.classify(IMAGE, {"Content-Encoding": "identity"})).status == 200

    site(scenario)


def test_too_many_bytes_are_refused_by_their_declared_size_before_one_is_read(site: Runner) -> None:
    async def never() -> Message:
        raise AssertionError("read")

    async def scenario(site: Site) -> None:
        reply = await site.classify(headers={"Content-Length": str(BODY_LIMIT + 1)}, receive=never)
        assert f"{BODY_LIMIT} (SCALA_MAX_BODY_BYTES)" in check_problem(reply, 413)

    site(scenario)


def test_too_many_bytes_are_refused_when_they_come_undeclared(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        endless = client(*[(0.0, bytes(BODY_LIMIT // 10))] * 1000)
        check_problem(await site.classify(receive=endless), 413)
        assert site.services.admission.inflight_bytes == 0
        assert await endless() != {"type": "http.disconnect"}, "the rest is not read"

    site(scenario)


def test_too_many_pixels_are_refused(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        assert (await site.classify(png(1, (100, 100)))).status == 200
        assert f"{PIXEL_LIMIT} (SCALA_MAX_PIXELS)" in check_problem(await site.classify(png(1, (101, 100))), 413)

    site(scenario)


def test_a_form_of_more_parts_than_any_form_needs_is_refused_for_good(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for body in (b"--x\r\n\r\n" * 10_000, form(*[b"1"] * 900)[0]):
            reply = await site.classify(body, {"Content-Type": "multipart/form-data; boundary=x"})
            assert "104 parts or more; the limit is 103: send fewer" in check_problem(reply, 413)

    site(scenario, max_queue=3)


def test_more_images_than_the_queue_holds_are_refused_for_good(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        body, headers = form(*[IMAGE] * 3)
        assert (await site.classify(body, headers)).status == 200
        body, headers = form(*[IMAGE] * 4)
        assert "3 (SCALA_MAX_QUEUE): send fewer" in check_problem(await site.classify(body, headers), 413)
        assert site.services.admission.images == 0

    site(scenario, max_queue=3)


def test_what_is_no_image_is_refused(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for body, declared in ((IMAGE, "text/plain"), (IMAGE, "application/pdf"), (b"%PDF-1.7 ...", "image/png")):
            check_problem(await site.classify(body, {"Content-Type": declared}), 415)
        body, headers = form(IMAGE, content_type="text/plain")
        check_problem(await site.classify(body, headers), 415)

    site(scenario)


def test_a_broken_image_is_refused(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        check_problem(await site.classify(IMAGE[:40]), 422)

    site(scenario)


def test_the_impossible_is_refused_with_what_is_possible(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for headers in ({"X-Latency-Budget-Ms": "9"}, {"X-Min-Accuracy": "0.71"}):
            reply = await site.classify(headers=headers)
            check_problem(reply, 422)
            assert [offer["width"] for offer in reply.json()["widths"]] == [0.25, 0.5, 0.75, 1.0]
            assert [offer["accuracy"] for offer in reply.json()["widths"]] == [0.4, 0.5, 0.6, 0.7]
        check_problem(await site.classify(headers={"X-Latency-Budget-Ms": "25", "X-Width": "1"}), 422)
        for untrained in ("0.3", "2", "-1", "0"):
            reply = await site.classify(headers={"X-Width": untrained})
            assert "X-Width" in check_problem(reply, 422)
            assert [offer["width"] for offer in reply.json()["widths"]] == [0.25, 0.5, 0.75, 1.0]
        assert await site.metric('scala_budget_total{outcome="impossible"}') > 0
        assert site.engine.served == []

    site(scenario)


def test_where_nothing_is_and_how_not_to_ask(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        check_problem(await site.ask("GET", "/nowhere"), 404)
        reply = await site.ask("GET", CLASSIFY)
        check_problem(reply, 405)
        assert reply.headers["allow"] == "POST"
        check_problem(await site.ask("DELETE", "/readyz"), 405)

    site(scenario)


@pytest.mark.parametrize("where", ["server.routes.classify.files_of", "server.decode.ImageDecoder.if_small"])
def test_a_lack_of_memory_is_no_bug(site: Runner, where: str) -> None:
    """Wherever it is met: in a form, in one of its images, in a tensor, by the framework."""

    async def scenario(site: Site) -> None:
        with mock.patch(where, side_effect=MemoryError):
            for images in ((IMAGE,), (IMAGE, IMAGE)):
                reply = await site.classify(*form(*images))
                assert "no memory for this request" in check_problem(reply, 503)
                assert reply.headers["retry-after"] == "1"
        with mock.patch("server.routes.quote.read_query", side_effect=MemoryError):
            assert "no memory" in check_problem(await site.ask("GET", "/v1/quote?budget_ms=100"), 503)
        with mock.patch("server.oip.codec.read_raw", side_effect=MemoryError):
            reply = await site.ask("POST", "/v2/models/toy/infer", IMAGE, {"Inference-Header-Content-Length": "0"})
            assert (reply.status, "no memory" in reply.json()["error"]) == (503, True)
        assert (await site.classify()).status == 200
        assert site.services.admission.images == 0

    site(scenario)
