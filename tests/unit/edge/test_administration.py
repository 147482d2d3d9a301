"""Pages, metrics, statistics and settings at an address of their own, and the API alone where callers are."""

from __future__ import annotations

from pathlib import Path

from server.api_keys import is_for_callers, line_for, new_key
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
MODEL_ROUTES = ("/ready", "/config", "/infer")
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
        odd = ("//metrics", "/metrics/", "/livez/../metrics", "/v2/../metrics", "/METRICS", "/v2/models/stats/")
        cut_off = ("/metrics\n", "/v2/models/stats\n", "/v2/models/toy/stats\n", "/v2/models/toy/versions/1/stats\n")
        for path in (*odd, *cut_off):  # the framework takes a last line feed for none
            check = await site.ask("GET", path)
            assert check.status == 404, path
        for method in ("HEAD", "POST", "OPTIONS"):
            assert (await site.ask(method, "/metrics")).status == 404

    site(scenario, admin_address=f"127.0.0.1:{ADMIN}")


def test_what_is_for_callers_is_a_list_and_a_route_that_is_not_in_it_is_closed(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        documented = (await site.ask("GET", "/openapi.json")).json()["paths"]
        found = {path.format(model="toy", version="1") for path in documented}
        model = {f"/v2/models/toy{version}{what}" for version in ("", "/versions/1") for what in ("", *MODEL_ROUTES)}
        others = {"/v2/repository/index", *(f"/v2/repository/models/toy/{what}" for what in ("load", "unload"))}
        named = {path.partition("?")[0] for path in FOR_CALLERS} | {"/v1/classify"} | model | others
        assert {path for path in found if is_for_callers(path)} == named
        for path in (
            "/v2/new",
            "/v2/models/toy/new",
            "/v2/models/toy/versions/1/new",
            "/v2/repository/new",
            "/v2/health/",
        ):
            assert not is_for_callers(path), path

    site(scenario)


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
