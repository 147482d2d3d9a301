"""Pages, metrics, statistics and settings at an address of their own, and the API alone where callers are."""

from __future__ import annotations

from pathlib import Path

from server.api_keys import line_for, new_key
from tests.unit.edge.application import IMAGE, Runner, Site, check_problem

ADMIN = 9000
FOR_CALLERS = (
    "/livez",
    "/readyz",
    "/v1/model",
    "/v1/quote?budget_ms=9",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/toy",
    "/v2/models/toy/ready",
    "/v2/models/toy/config",
)
FOR_OPERATORS = (
    "/",
    "/docs",
    "/docs/assets/swagger-ui.css",
    "/metrics",
    "/openapi.json",
    "/playground/playground.js",
    "/v1/settings",
    "/v2/models/stats",
    "/v2/models/toy/stats",
    "/v2/models/toy/versions/1/stats",
)


def test_callers_find_the_api_alone_and_operators_everything(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for path in FOR_CALLERS:
            assert (await site.ask("GET", path)).status == 200, path
        for path in (*FOR_OPERATORS, "/v1/events"):
            reply = await site.ask("GET", path)
            assert reply.status == 404, path
            assert reply.body.replace(reply.headers["x-request-id"].encode(), b"") == (
                missing := await site.ask("GET", "/v2/nothing" if path.startswith("/v2") else "/nothing")
            ).body.replace(missing.headers["x-request-id"].encode(), b""), "as if it did not exist"
        for path in (*FOR_CALLERS, *FOR_OPERATORS):
            assert (await site.ask("GET", path, port=ADMIN)).status == 200, path
        for port in (8000, ADMIN):
            assert (await site.ask("POST", "/v1/classify", IMAGE, port=port)).status == 200
        head = {"Inference-Header-Content-Length": "0"}
        assert (await site.ask("POST", "/v2/models/toy/infer", IMAGE, head)).status == 200

    site(scenario, admin_address=f"127.0.0.1:{ADMIN}")


def test_no_spelling_of_a_path_leads_past_it(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for path in ("//metrics", "/metrics/", "/livez/../metrics", "/v2/../metrics", "/METRICS", "/v2/models/stats/"):
            check = await site.ask("GET", path)
            assert check.status == 404, path
        for method in ("HEAD", "POST", "OPTIONS"):
            assert (await site.ask(method, "/metrics")).status == 404

    site(scenario, admin_address=f"127.0.0.1:{ADMIN}")


def test_without_an_address_of_their_own_they_are_beside_the_api(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for path in (*FOR_CALLERS, *FOR_OPERATORS):
            assert (await site.ask("GET", path)).status == 200, path

    site(scenario)


def test_keys_are_asked_for_there_as_well(site: Runner, tmp_path: Path) -> None:
    key = new_key()
    (tmp_path / "keys").write_text(line_for("alice", key))

    async def scenario(site: Site) -> None:
        given = {"Authorization": f"Bearer {key}"}
        check_problem(await site.ask("GET", "/metrics", port=ADMIN), 401)
        check_problem(await site.ask("GET", "/metrics"), 401)
        check_problem(await site.ask("GET", "/metrics", headers=given), 404)
        assert (await site.ask("GET", "/metrics", headers=given, port=ADMIN)).status == 200

    site(scenario, admin_address=f"127.0.0.1:{ADMIN}", api_keys_file=tmp_path / "keys")
