"""Images as base64 in a JSON document."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest
from pydantic_core import to_json

from server import json_body
from tests.unit.edge.application import IMAGE, Reply, Runner, Site, check_problem
from tests.unit.toy import png


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


async def classify(site: Site, *images: object, query: str = "") -> Reply:
    return await post(site, json.dumps({"images": images}).encode(), query)


async def post(site: Site, body: bytes, query: str = "") -> Reply:
    return await site.classify(body, {"Content-Type": "application/json; charset=utf-8"}, query)


def test_one_image_is_answered_like_one_image(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        reply = await classify(site, text(png(9)), query="?top_k=1")
        assert (reply.status, reply.json()["predictions"][0]["class_id"]) == (200, 9)
        assert reply.json().keys() == (await site.classify()).json().keys()
        check_problem(await classify(site, text(IMAGE[:40])), 422)
        assert "base64" in check_problem(await classify(site, "%%%%"), 400)

    site(scenario)


def test_several_images_have_each_their_own_answer_or_error(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        reply = await classify(site, text(png(3)), "%%%%", text(IMAGE[:40]), "", text(b"no image"), text(png(5)))
        results = reply.json()["results"]
        assert [entry.get("error", {}).get("status") for entry in results] == [None, 400, 422, 400, 415, None]
        assert [results[i]["predictions"][0]["class_id"] for i in (0, 5)] == [3, 5]
        assert site.services.admission.images == 0

    site(scenario)


def test_the_slowest_image_of_each_stage_is_in_the_timing(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        reply = await classify(site, *[text(png(i)) for i in range(1, 7)])
        spent = [entry["timing_ms"] for entry in reply.json()["results"]]
        timing = dict(stage.split(";dur=") for stage in reply.headers["server-timing"].split(", "))
        assert timing.keys() == {"decode", "queue", "inference", "total"}
        for stage, ms in timing.items():
            assert float(ms) == max(each[stage] for each in spent), stage
        assert len({each["queue"] for each in spent}) > 1, "or the longest would be no choice"
        none = await classify(site, "%%%%", "%%%%")
        assert none.headers["server-timing"].startswith("total;dur=")

    site(scenario)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "cannot be read: EOF"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 5000, "cannot be read"),
        *((body, "nothing but a list") for body in (b"[]", b"null", b"{}", b'{"images": "QQ=="}', b'{"images": []}')),
        *((body, "one or more texts") for body in (b'{"images": ["QQ==", 5]}', b'{"images": [null]}')),
        (b'{"images": ["QQ=="], "top_k": 3}', "nothing but"),
    ],
)
def test_a_malformed_document_is_refused_with_the_form_that_it_must_have(site: Runner, body: bytes, words: str) -> None:
    async def scenario(site: Site) -> None:
        detail = check_problem(await post(site, body), 400)
        assert words in detail
        assert '{"images": ["<base64>", ...]}' in detail
        assert site.engine.served == []

    site(scenario)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda whole: whole[:-1],
        lambda whole: whole.rstrip("="),
        lambda whole: whole + "\n",
        lambda whole: whole[:76] + "\n" + whole[76:],
        lambda whole: " " + whole,
        lambda whole: whole + "====",
        lambda whole: "data:image/png;base64," + whole,
        lambda whole: whole.replace("A", "-", 1),
        lambda whole: whole.replace("A", "é", 1),
        lambda whole: "QQ==" + whole,
    ],
)
def test_nothing_that_is_no_base64_is_skipped_over(site: Runner, wrong: object) -> None:
    async def scenario(site: Site) -> None:
        image = next(image for image in map(png, range(1, 200)) if text(image).endswith("="))
        assert callable(wrong)
        assert "without line breaks" in check_problem(await classify(site, wrong(text(image))), 400)

    site(scenario)


@pytest.mark.parametrize(
    "body",
    [b'{"images": [' + b"0," * 30_000 + b"0]}", b"{" + b",".join(b'"%d":0' % i for i in range(9000)) + b"}"],
)
def test_a_body_of_a_million_trifles_is_not_even_parsed(
    site: Runner, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_body, "from_json", None)

    async def scenario(site: Site) -> None:
        assert "fewer" in check_problem(await post(site, body), 413)

    site(scenario)


def test_writing_a_large_answer_takes_of_the_budget(site: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(site: Site) -> None:
        def slowly(content: object) -> bytes:
            site.clock.spend(0.008)
            return to_json(content)

        monkeypatch.setattr("server.response.to_json", slowly)
        body = json.dumps({"images": [text(png(1))] * 60}).encode()
        asking = {"X-Width": "0.25", "Content-Type": "application/json"}  # 375 ms on the engine
        reply = await site.classify(body, asking | {"X-Latency-Budget-Ms": "600"})
        check_problem(reply, 504)
        assert reply.seconds == pytest.approx(0.6, abs=0.001), "whatever is still being written"
        reply = await site.classify(body, asking)
        assert (reply.status, reply.json()["budget_met"], len(reply.json()["results"])) == (200, True, 60)
        assert reply.seconds > 0.8, "in time for the default budget of a second"

    site(scenario)


def test_more_images_than_the_queue_holds_are_refused(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        assert (await classify(site, *[text(IMAGE)] * 3)).status == 200
        assert "fewer" in check_problem(await classify(site, *[text(IMAGE)] * 4), 413)
        assert site.services.admission.images == 0

    site(scenario, max_queue=3)


def test_a_lack_of_memory_does_not_end_the_process() -> None:
    """The parser would: its own allocations must not fail."""
    program = """
import resource
from server.json_body import parse_json
text = b'["' + b"x" * 16_000_000 + b'"]'
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 4_000_000, resource.RLIM_INFINITY))
try:
    parse_json(text)
except MemoryError:
    print("told")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "told\n"
