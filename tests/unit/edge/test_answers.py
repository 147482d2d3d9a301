"""Answers, as the HTTP contract wants them."""

from __future__ import annotations

import asyncio
import io
import tempfile

import pytest
from PIL import Image

from tests.unit.edge.application import IMAGE, Runner, Site, form
from tests.unit.toy import ACCURACIES, png


def test_one_image(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        reply = await site.classify(IMAGE, {"Content-Type": "image/png", "X-Latency-Budget-Ms": "100"})
        assert reply.status == 200
        answer, headers = reply.json(), reply.headers
        assert answer.keys() == {
            "model",
            "predictions",
            "width",
            "expected_accuracy",
            "budget_ms",
            "budget_met",
            "timing_ms",
            "batch_size",
            "request_id",
        }
        assert (answer["model"], answer["width"], answer["expected_accuracy"]) == ("toy", 1.0, 0.7)
        assert (answer["budget_ms"], answer["budget_met"], answer["batch_size"]) == (100, True, 1)
        first, *others = answer["predictions"]
        assert first == {"class_id": 7, "label": "class 7", "score": pytest.approx(0.9)}
        assert len(others) == 4
        assert answer["timing_ms"] == {
            "decode": 0,
            "queue": 0,
            "inference": pytest.approx(40, abs=0.01),
            "total": pytest.approx(40, abs=0.01),
        }
        assert headers["content-type"] == "application/json"
        assert (headers["x-scala-width"], headers["x-budget-met"]) == ("1", "true")
        assert headers["x-request-id"] == answer["request_id"]
        timing = dict(stage.split(";dur=") for stage in headers["server-timing"].split(", "))
        assert {stage: float(ms) for stage, ms in timing.items()} == answer["timing_ms"]

    site(scenario)


def test_several_images_have_each_their_own_answer_or_error(site: Runner) -> None:
    """One bad image does not fail the others of its request, ..."""

    async def scenario(site: Site) -> None:
        body, headers = form(png(3), IMAGE[:40], b"no image at all", png(5))
        reply = await site.classify(body, headers | {"X-Latency-Budget-Ms": "500"}, "?top_k=2")
        assert reply.status == 200
        answer = reply.json()
        assert answer.keys() == {"model", "results", "budget_ms", "budget_met", "request_id"}
        good, broken, nothing, other = answer["results"]
        assert [entry["predictions"][0]["class_id"] for entry in (good, other)] == [3, 5]
        assert good.keys() == {"predictions", "width", "expected_accuracy", "batch_size", "timing_ms"}
        assert (good["width"], good["batch_size"], len(good["predictions"])) == (1.0, 2, 2)
        assert [entry["error"]["status"] for entry in (broken, nothing)] == [422, 415]
        assert broken["error"]["request_id"] == answer["request_id"] == reply.headers["x-request-id"]
        assert (reply.headers["x-scala-width"], reply.headers["x-budget-met"]) == ("1", "true")
        assert "total;dur=" in reply.headers["server-timing"]

    site(scenario)


def test_a_large_file_of_a_form_needs_no_place_on_disk(site: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(site: Site) -> None:
        monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
        photo = io.BytesIO()
        Image.new("RGB", (800, 800), (9, 9, 9)).save(photo, "BMP")
        body, headers = form(photo.getvalue())
        assert len(body) > 1_500_000
        reply = await site.classify(body, headers)
        assert (reply.status, reply.json()["predictions"][0]["class_id"]) == (200, 9)
        assert site.services.admission.inflight_bytes == 0

    site(scenario, max_body_bytes=2_000_000, max_pixels=1_000_000)


def test_a_part_that_is_no_image_fails_alone(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        body, headers = form(png(3), png(5))
        body = body.replace(b"Content-Type: image/png", b"Content-Type: text/plain", 1)
        text, good = (await site.classify(body, headers)).json()["results"]
        assert text["error"]["status"] == 415
        assert "text/plain" in text["error"]["detail"]
        assert good["predictions"][0]["class_id"] == 5

    site(scenario)


def test_a_bad_image_fails_nobody_who_comes_at_the_same_time(site: Runner) -> None:
    """... nor those of other requests, with whom it would have shared a batch."""

    async def scenario(site: Site) -> None:
        bodies = (png(3), IMAGE[:40], png(4), b"no image at all", png(5))
        replies = await asyncio.gather(*(site.classify(body) for body in bodies))
        assert [reply.status for reply in replies] == [200, 422, 200, 415, 200]
        assert [reply.json()["predictions"][0]["class_id"] for reply in replies[::2]] == [3, 4, 5]
        assert sorted(image for _, images in site.engine.served for image in images) == [3, 4, 5]

    site(scenario)


def test_several_images_of_which_none_is_answered_have_met_nothing(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        body, headers = form(IMAGE[:40], IMAGE[:30])
        reply = await site.classify(body, headers)
        assert [entry["error"]["status"] for entry in reply.json()["results"]] == [422, 422]
        assert await site.metric("scala_budget_total") == 0

    site(scenario)


def test_a_form_of_one_file_is_answered_like_one_image(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        body, headers = form(png(9))
        reply = await site.classify(body, headers)
        assert (reply.status, reply.json()["predictions"][0]["class_id"]) == (200, 9)

    site(scenario)


@pytest.mark.parametrize(
    "content_type", [None, "image/png", "IMAGE/PNG; x=y", "image/jpeg", "application/octet-stream"]
)
def test_an_image_of_any_declared_image_type_is_read_for_what_it_is(site: Runner, content_type: str | None) -> None:
    async def scenario(site: Site) -> None:
        reply = await site.classify(IMAGE, {"Content-Type": content_type} if content_type else {})
        assert reply.status == 200

    site(scenario)


def test_the_budget_buys_the_width(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for budget_ms, width in ((41, 1.0), (39, 0.75), (29, 0.5), (19, 0.25), (10.5, 0.25)):
            answer = (await site.classify(headers={"X-Latency-Budget-Ms": str(budget_ms)})).json()
            assert (answer["width"], answer["budget_met"]) == (width, True)
            assert answer["expected_accuracy"] == ACCURACIES[width]

    site(scenario)


def test_pins_and_floors(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for headers, width in (
            ({"X-Width": "0.5"}, 0.5),
            ({"X-Min-Accuracy": "0.5", "X-Latency-Budget-Ms": "25"}, 0.5),
            ({"X-Min-Accuracy": "0"}, 1.0),
            ({"X-Min-Accuracy": "0.7"}, 1.0),
            ({"X-Width": "0.75", "X-Min-Accuracy": "0.6"}, 0.75),
        ):
            assert (await site.classify(headers=headers)).json()["width"] == width

    site(scenario)


@pytest.mark.parametrize(("query", "count"), [("?top_k=1", 1), ("?top_k=200", 200), ("", 5)])
def test_top_k(site: Runner, query: str, count: int) -> None:
    async def scenario(site: Site) -> None:
        predictions = (await site.classify(query=query)).json()["predictions"]
        assert len({entry["class_id"] for entry in predictions}) == count
        scores = [entry["score"] for entry in predictions]
        assert scores == sorted(scores, reverse=True)

    site(scenario)


def test_who_names_no_budget_has_the_default_one_and_may_be_late(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        site.engine.seconds = lambda width, images: 0.5
        reply = await site.classify()
        assert (reply.status, reply.json()["budget_ms"], reply.json()["budget_met"]) == (200, 100, False)
        assert reply.headers["x-budget-met"] == "false"
        assert await site.metric('scala_budget_total{outcome="missed"}') == 1

    site(scenario, default_budget_ms=100)


def test_a_request_id_comes_back(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for given in ("abc-123", "x" * 128, "a b/c=d"):
            reply = await site.classify(headers={"X-Request-Id": given})
            assert reply.headers["x-request-id"] == reply.json()["request_id"] == given
        reply = await site.ask("GET", "/nowhere", headers={"X-Request-Id": "abc"})
        assert reply.headers["x-request-id"] == reply.json()["request_id"] == "abc"

    site(scenario)


def test_a_silly_request_id_is_replaced(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        made = set()
        for given in ("", "x" * 129, "x" * 1000, "a\nb", "a\r\nSet-Cookie: x", "\x00", "\x7f", "caf\xe9"):
            reply = await site.classify(headers={"X-Request-Id": given})
            assert reply.status == 200
            made.add(reply.headers["x-request-id"])
        assert len(made) == 8
        assert all(len(name) == 32 and name.isalnum() for name in made)

    site(scenario)
