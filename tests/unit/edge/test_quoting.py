"""``GET /v1/quote``: what a budget would get now, on the assembled application."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.edge.application import Runner, Site, check_problem

QUOTE = "/v1/quote?budget_ms="


async def quoted(site: Site, budget_ms: float) -> dict[str, object]:
    reply = await site.ask("GET", f"{QUOTE}{budget_ms:g}")
    assert reply.status == 200
    body: dict[str, object] = reply.json()
    assert body.keys() == {"budget_ms", "admitted", "width", "expected_accuracy", "chance", "reason"}
    assert body["budget_ms"] == budget_ms
    return body


def test_an_idle_server_quotes_what_it_then_does(site: Runner) -> None:
    """One image takes 40 ms at full width and its share of it at others."""

    async def scenario(site: Site) -> None:
        for budget_ms, width, accuracy in ((100, 1.0, 0.7), (35, 0.75, 0.6), (15, 0.25, 0.4)):
            quote = await quoted(site, budget_ms)
            assert quote["admitted"] is True
            assert (quote["width"], quote["expected_accuracy"]) == (width, accuracy)
            assert quote["chance"] == pytest.approx(0.99, abs=0.01)
            assert quote["reason"] is None
            answer = await site.classify(headers={"X-Latency-Budget-Ms": str(budget_ms)})
            assert answer.json()["width"] == width

    site(scenario)


def test_what_is_impossible_is_refused_with_the_reason(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        quote = await quoted(site, 5)
        assert (quote["admitted"], quote["width"], quote["expected_accuracy"], quote["chance"]) == (
            *(False, None, None),
            0,
        )
        assert "cannot be met" in str(quote["reason"])

    site(scenario)


def test_a_busy_server_quotes_what_admission_says(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        headers = {"X-Latency-Budget-Ms": "200"}
        burst = [asyncio.create_task(site.classify(headers=headers)) for _ in range(30)]
        await asyncio.sleep(0.001)
        statuses = set()
        for budget_ms in (12, 20, 1000):
            quote = await quoted(site, budget_ms)
            reply = await site.classify(headers={"X-Latency-Budget-Ms": str(budget_ms)})
            statuses.add(reply.status)
            assert quote["admitted"] == (reply.status == 200), budget_ms
            assert (quote["reason"] is None) == (reply.status == 200)
        assert {200, 429} == statuses
        await asyncio.gather(*burst)

    site(scenario)


def test_promises_that_were_broken_lower_the_chance(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        usual = (await quoted(site, 100))["chance"]
        site.engine.seconds = lambda width, images: 0.5
        await asyncio.gather(*(site.classify(headers={"X-Latency-Budget-Ms": "100"}) for _ in range(4)))
        site.engine.seconds = lambda width, images: 0.01
        await asyncio.sleep(1)
        lowered = (await quoted(site, 400))["chance"]
        assert isinstance(lowered, float)
        assert lowered < 0.8 < 0.98 < usual  # type: ignore[operator]

    site(scenario)


def test_requests_teach_the_quotes_before_them(site: Runner) -> None:
    """Each is quoted a refusal beside a burst that then leaves, and is answered; and is told so, later on."""

    async def scenario(site: Site) -> None:
        for _ in range(5):
            burst = [asyncio.create_task(site.classify(headers={"X-Latency-Budget-Ms": "90"})) for _ in range(12)]
            await asyncio.sleep(0.001)
            assert (last := await quoted(site, 24))["admitted"] is False
            await asyncio.gather(*burst)
            assert (await site.classify(headers={"X-Latency-Budget-Ms": "24"})).status == 200
        assert last["chance"] == pytest.approx(4 / 14, rel=0.1)

    site(scenario)


def test_who_names_no_budget_was_promised_nothing(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        site.engine.seconds = lambda width, images: 1.5
        assert (await site.classify()).json()["budget_met"] is False
        assert site.services.monitor.promises.all.value(site.clock.now) == 0

    site(scenario)


def test_a_budget_that_makes_no_sense_is_refused(site: Runner) -> None:
    """In the words that a request's own budget gets."""
    number, range_ms = "it must be a number of milliseconds such as 100.", "it must be above 0 and at most 600000."

    async def scenario(site: Site) -> None:
        for said, texts in {number: ("", "soon", "nan", "inf", "1_0"), range_ms: ("0", "-5", "600000.1")}.items():
            for text in texts:
                assert check_problem(await site.ask("GET", QUOTE + text), 400) == f"budget_ms is {text!r}; {said}"
                reply = await site.classify(headers={"X-Latency-Budget-Ms": text})
                assert check_problem(reply, 400) == f"X-Latency-Budget-Ms is {text!r}; {said}"
        missing = check_problem(await site.ask("GET", "/v1/quote"), 400)
        assert missing == "There is no budget_ms: name one, such as ?budget_ms=100."
        unknown = check_problem(await site.ask("GET", f"{QUOTE}10&width=1"), 400)
        assert unknown == "Unknown query parameter 'width'; there is only budget_ms."

    site(scenario)


def test_until_it_serves_there_are_no_quotes(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        check_problem(await site.ask("GET", f"{QUOTE}100"), 503)

    site(scenario, warm=False)


def test_asking_leaves_no_trace(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        before = await site.metric("scala_budget_total"), site.services.admission.requests
        await quoted(site, 100)
        assert (await site.metric("scala_budget_total"), site.services.admission.requests) == before
        assert site.services.monitor.arrivals.value(site.clock.now) == 0

    site(scenario)


def test_quotes_are_documented(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        told = (await site.ask("GET", "/openapi.json")).json()["paths"]["/v1/quote"]["get"]
        assert {"200", "400", "503"} <= told["responses"].keys()
        assert [parameter["name"] for parameter in told["parameters"]] == ["budget_ms", "X-Request-Id"]

    site(scenario)
