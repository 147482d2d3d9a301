"""API keys, their rate, and pages of other origins: at the edge, before anything else looks at a request."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from starlette.types import Message

from server.api_keys import line_for, new_key
from tests.unit.edge.application import CLASSIFY, IMAGE, Reply, Runner, Site, check_problem, client, statuses
from tests.unit.toy import png

ALICE, BOB = new_key(), new_key()
OPEN = ("/livez", "/readyz", "/openapi.json", "/docs")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{line_for('alice', ALICE)}\n\n{line_for('bob', BOB)}  # until May\n")
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_only_who_has_a_key_may_ask(site: Runner, keys: Path) -> None:
    async def scenario(site: Site) -> None:
        for given in ({}, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer "}, {"Authorization": ALICE}):
            reply = await site.classify(headers=given)
            assert "Authorization: Bearer" in check_problem(reply, 401)
            assert reply.headers["www-authenticate"] == 'Bearer realm="scala-serve"'
        for wrong in (new_key(), ALICE[:-1], ALICE + "x", "é", "x" * 10_000):
            reply = await site.classify(headers=bearer(wrong))
            check_problem(reply, 403)
            assert wrong not in reply.body.decode()
        for right in (bearer(ALICE), bearer(BOB), {"Authorization": f"bearer  {ALICE}"}):
            assert (await site.classify(headers=right)).status == 200
        assert len(site.engine.served) == 3

    site(scenario, api_keys_file=keys)


def test_probes_and_pages_need_no_key_and_everything_else_does(site: Runner, keys: Path) -> None:
    async def scenario(site: Site) -> None:
        for path in OPEN:
            assert (await site.ask("GET", path)).status == 200, path
        for path in ("/metrics", "/v1/model", "/v1/settings", "/v1/quote?budget_ms=9", "/nowhere", "/livez/", "/docsx"):
            check_problem(await site.ask("GET", path), 401)
        for path in ("/", "/v2/health/live", "/v2/health/ready"):
            assert (await site.ask("GET", path)).status != 401, path
        assert (await site.ask("GET", "/v1/model", headers=bearer(ALICE))).status == 200
        check_problem(await site.ask("GET", "/nowhere", headers=bearer(ALICE)), 404)

    site(scenario, api_keys_file=keys)


def test_who_is_turned_away_costs_nothing_and_is_counted(site: Runner, keys: Path) -> None:
    async def never() -> Message:
        raise AssertionError("read")

    async def scenario(site: Site) -> None:
        check_problem(await site.classify(receive=never), 401)
        text = (await site.ask("GET", "/metrics", headers=bearer(BOB))).body.decode()
        assert 'scala_requests_total{route="/v1/classify",status="401"} 1.0' in text
        assert 'scala_budget_total{outcome="shed"} 0.0' in text
        assert site.services.lifecycle.in_flight == 0

    site(scenario, api_keys_file=keys)


def test_no_key_is_ever_logged(site: Runner, keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(site: Site) -> None:
        wrong = new_key()
        await site.classify(headers=bearer(ALICE))
        await site.classify(IMAGE[:40], headers=bearer(ALICE))
        await site.classify(headers=bearer(wrong))
        assert ALICE not in caplog.text
        assert wrong not in caplog.text

    with caplog.at_level(logging.DEBUG):
        site(scenario, api_keys_file=keys)


async def ask_often(site: Site, key: str, times: int) -> list[Reply]:
    """One after the other. Without time between them the limiter's sums of instants may round to one request less."""
    replies = []
    for _ in range(times):
        replies.append(await site.ask("GET", "/v1/model", headers=bearer(key)))
        site.clock.spend(1e-6)
    return replies


def test_each_key_has_its_own_rate(site: Runner, keys: Path) -> None:
    async def scenario(site: Site) -> None:
        replies = await ask_often(site, ALICE, 15)
        assert statuses(replies) == {200: 10, 429: 5}
        assert "alice" in check_problem(replies[-1], 429)
        assert replies[-1].headers["retry-after"] == "6"
        assert (await site.ask("GET", "/v1/model", headers=bearer(BOB))).status == 200
        assert (await site.ask("GET", "/readyz")).status == 200
        await asyncio.sleep(6.01)
        replies = await ask_often(site, ALICE, 2)
        assert statuses(replies) == {200: 1, 429: 1}
        assert await site.metric('scala_budget_total{outcome="shed"}') == 0

    site(scenario, api_keys_file=keys, rate_limit="10/minute")


def test_a_burst_may_be_named(site: Runner, keys: Path) -> None:
    async def scenario(site: Site) -> None:
        assert statuses(await ask_often(site, ALICE, 15)) == {200: 12, 429: 3}

    site(scenario, api_keys_file=keys, rate_limit="10/minute burst 12")


def test_pages_of_named_origins_may_ask_and_read_the_answer(site: Runner, keys: Path) -> None:
    async def scenario(site: Site) -> None:
        origin = {"Origin": "https://app.example.com"}
        asked = origin | {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,x-latency-budget-ms",
        }
        preflight = await site.ask("OPTIONS", CLASSIFY, headers=asked)
        assert preflight.status == 200, "it never carries a key"
        assert preflight.headers["access-control-allow-origin"] == "https://app.example.com"
        assert preflight.headers["access-control-allow-headers"] == "*, Authorization", "and nothing of what was asked"
        assert preflight.headers["x-content-type-options"] == "nosniff"
        assert preflight.headers["x-request-id"]
        for headers, status in ((bearer(ALICE), 200), ({}, 401)):
            reply = await site.classify(headers=origin | headers)
            assert reply.status == status
            assert reply.headers["access-control-allow-origin"] == "https://app.example.com"
            assert "X-Scala-Width" in reply.headers["access-control-expose-headers"]
        stranger = {"Origin": "https://app.example.com.evil.org"}
        assert "access-control-allow-origin" not in (await site.classify(headers=stranger)).headers
        assert (await site.ask("OPTIONS", CLASSIFY, headers=asked | stranger)).status == 400
        metrics = await site.ask("GET", "/metrics", headers=bearer(ALICE))
        assert 'scala_requests_total{route="none",status="400"} 1.0' in metrics.body.decode()
        site.services.lifecycle.draining = True
        assert (await site.ask("OPTIONS", CLASSIFY, headers=asked)).headers["connection"] == "close"

    site(scenario, api_keys_file=keys, cors_origins="https://app.example.com,http://localhost:3000")


def test_without_the_setting_no_page_of_another_origin_may_ask(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        reply = await site.classify(headers={"Origin": "https://app.example.com"})
        assert not [name for name in reply.headers if name.startswith("access-control")]

    site(scenario)


def test_a_client_that_leaves_is_noticed_through_all_of_it(site: Runner, keys: Path) -> None:
    async def scenario(site: Site) -> None:
        headers = bearer(ALICE) | {"Origin": "https://app.example.com"}
        others = [asyncio.create_task(site.classify(png(i), headers)) for i in (1, 2, 3, 4)]
        await asyncio.sleep(0.010)
        gone = await site.classify(headers=headers, receive=client((0.0, png(99)), leaves_after=0.020))
        assert gone.seconds == pytest.approx(0.020)
        assert statuses(await asyncio.gather(*others)) == {200: 4}
        assert 99 not in [image for _, images in site.engine.served for image in images]
        text = (await site.ask("GET", "/metrics", headers=headers)).body.decode()
        assert "scala_cancelled_before_dispatch_total 1.0" in text
        assert site.services.admission.images == 0

    site(scenario, api_keys_file=keys, rate_limit="100/second", cors_origins="*")
