"""The playground's files: what is sent of them, and what must not be in them."""

from __future__ import annotations

import hashlib
import inspect
import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from starlette.types import Message, Scope

from server.edge import Edge
from server.routes.pages import ASSET_NAMES, ASSETS, FOLDER, TYPES
from tests.unit.edge.application import Reply, Runner, Site, check_problem, client

FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in TYPES)
PAGE = FOLDER / "playground.html"


def policy_of(reply: Reply) -> dict[str, str]:
    return dict(part.strip().partition(" ")[::2] for part in reply.headers["content-security-policy"].split(";"))


def test_every_file_is_served_as_what_it_is_and_may_run_nothing_else(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for path in FILES:
            reply = await site.ask("GET", "/" if path == PAGE else f"/playground/{path.name}")
            assert (reply.status, reply.body) == (200, path.read_bytes())
            assert reply.headers["content-type"].partition(";")[0] == TYPES[path.suffix]
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["referrer-policy"] == "no-referrer"
            policy = policy_of(reply)
            assert policy["default-src"] == "'none'"
            assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
            assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
            assert policy["require-trusted-types-for"] == "'script'"

    site(scenario)


def test_the_documentation_may_run_its_own_script_and_be_in_nobodys_frame(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        reply = await site.ask("GET", "/docs")
        assert (reply.status, reply.headers["content-type"].partition(";")[0]) == (200, "text/html")
        assert reply.headers["referrer-policy"] == "no-referrer"
        (script,) = re.findall(rb"<script>(.*?)</script>", reply.body, re.DOTALL)
        digest = b64encode(hashlib.sha256(script).digest()).decode()
        policy = policy_of(reply)
        assert policy["script-src"] == f"'self' 'sha256-{digest}'"
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["connect-src"] == "'self'"

    site(scenario)


def test_what_the_documentation_is_made_of_comes_from_memory(site: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a thread nor a file is needed: where there was no memory for a thread, the event loop waited for ever."""

    async def scenario(site: Site) -> None:
        with monkeypatch.context() as poor:
            for needed in ("threading.Thread.start", "pathlib.Path.open", "os.stat"):
                poor.setattr(needed, mock.Mock(side_effect=MemoryError))
            replies = [await site.ask("GET", f"/docs/assets/{name}") for name in ASSET_NAMES]
        for name, reply in zip(ASSET_NAMES, replies, strict=True):
            content = (ASSETS / name).read_bytes()
            assert (reply.status, reply.body, reply.headers["content-length"]) == (200, content, str(len(content)))
            assert reply.headers["content-type"].partition(";")[0] == TYPES[Path(name).suffix]
        for name in ("redoc.standalone.js", "..", "../__init__.py", "..%2f__init__.py", ""):
            check_problem(await site.ask("GET", f"/docs/assets/{name}"), 404)

    site(scenario)


def routes_of(router: Any) -> Iterator[Any]:
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        yield from [route] if inner is None else routes_of(inner)


def test_nothing_is_answered_in_a_thread_of_the_framework(site: Runner) -> None:
    """It starts them when they are needed, and puts whatever is no coroutine into one."""

    async def scenario(site: Site) -> None:
        assert isinstance(site.app, Edge)
        routes = list(routes_of(site.app._app))
        assert {"/v1/classify", "/docs", "/openapi.json"} < {route.path for route in routes}
        for route in routes:
            assert inspect.iscoroutinefunction(route.endpoint), route.path

    site(scenario)


def test_a_slow_reader_holds_a_piece_of_a_file_and_not_all_of_it(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        pieces = []

        async def send(message: Message) -> None:
            pieces.append(len(message.get("body", b"")))

        path = f"/docs/assets/{ASSET_NAMES[0]}"
        scope: Scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": path, "headers": []}
        scope["query_string"] = b""
        await site.app(scope, client((0.0, b"")), send)
        assert sum(pieces) > 1_000_000
        assert max(pieces) <= 65_536

    site(scenario)


def test_no_answer_may_be_taken_for_a_page(site: Runner) -> None:
    """Errors repeat what was sent, and a browser that guesses types could take that for HTML."""

    async def scenario(site: Site) -> None:
        for method, path in (
            ("GET", "/v1/model"),
            ("GET", "/metrics"),
            ("GET", "/docs/assets/swagger-ui.css"),
            ("GET", "/playground/<script>"),
            ("POST", "/v1/classify?top_k=<script>"),
            ("POST", "/v2/models/<script>/infer"),
        ):
            reply = await site.ask(method, path)
            assert reply.headers["x-content-type-options"] == "nosniff", path
            assert "html" not in reply.headers["content-type"], path

    site(scenario)


def test_nobody_is_sent_to_where_a_request_says_it_was_meant_for(site: Runner) -> None:
    """A redirect would lead to the Host header's server, and caches would keep that for others."""

    async def scenario(site: Site) -> None:
        for path in ("/docs/", "/v1/model/", "/docs/assets", "/livez/", "//evil.example/"):
            reply = await site.ask("GET", path, headers={"Host": "evil.example"})
            check_problem(reply, 404)
            assert "location" not in reply.headers, path

    site(scenario)


def test_who_has_a_file_already_is_told_so(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        etag = (await site.ask("GET", "/")).headers["etag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}'):
            reply = await site.ask("GET", "/", headers={"If-None-Match": known})
            assert (reply.status, reply.body, reply.headers["etag"]) == (304, b"", etag)
            assert reply.headers["cache-control"] == "no-cache"
        assert (await site.ask("GET", "/", headers={"If-None-Match": '"other"'})).status == 200
        etags = [(await site.ask("GET", f"/playground/{path.name}")).headers["etag"] for path in FILES]
        assert len(set(etags)) == len(FILES)

    site(scenario)


def test_only_the_files_of_the_page_are_there(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        assert (await site.ask("HEAD", "/")).status == 200
        for name in ("nothing.js", "..", "../app.py", "..%2fapp.py", "__init__.py", ""):
            check_problem(await site.ask("GET", f"/playground/{name}"), 404)

    site(scenario)


def test_the_page_is_there_before_the_server_is_ready_and_while_it_leaves(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        assert (await site.ask("GET", "/")).status == 200
        site.services.lifecycle.refusing = site.services.lifecycle.draining = True
        assert (await site.ask("GET", "/")).status == 200

    site(scenario, warm=False)


def test_whatever_the_page_names_exists() -> None:
    """By addresses relative to the page, so that a proxy may put a prefix before them."""
    named = set(re.findall(r'(?:href|src)="([^"#]*)"', PAGE.read_text()))
    assert named - {"docs", "metrics"} == {
        "playground/icon.svg",
        "playground/playground.css",
        "playground/playground.js",
    }
    for script in FOLDER.glob("*.js"):
        for name in re.findall(r'from "\./(.*)"', script.read_text()):
            assert (FOLDER / name).is_file(), f"{script.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_other_site_and_no_html_made_of_text(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", text), "the policy would forbid it"
