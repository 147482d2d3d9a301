"""The document is true: each route is tried with what it allows and what it forbids; and its page needs no internet."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.service_process import Running

pytestmark = pytest.mark.service

# No schema can say which bytes are an image (400, 415), how much data a shape takes (400) or what is impossible on this
# machine (422); 503 and 504 are answers of a server that works. Models are never loaded or unloaded (400). Headers that
# nobody documented are nothing to refuse.
CONFIG = """
seed = 1
request-timeout = 20
max-stream-events = 2
cache.enabled = false
generation.max-examples = 30
generation.database = "none"
generation.allow-extra-parameters = false
phases.stateful.enabled = false
checks.not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 503, 504]

[[operations]]
include-path-regex = "^/v1/classify$|/infer$"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 415, 422, 429, 503, 504]

[[operations]]
include-path-regex = "load$"
checks.positive_data_acceptance.expected-statuses = [400]
"""


def test_every_route_does_what_its_document_says(server: Running, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{server.port}/openapi.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    routes = sum(len(operations) for operations in server.http.get("/openapi.json").json()["paths"].values())
    assert f"Tested: {routes}\n" in done.stdout
    assert server.http.get("/readyz").status_code == 200


def test_the_page_asks_nobody_else_for_its_parts(server: Running) -> None:
    page = server.http.get("/docs")
    assert page.status_code == 200
    parts = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(parts) >= 3
    for part in parts:
        assert part.startswith("docs/assets/"), part
        assert server.http.get(f"/{part}").status_code == 200, part
    assert "://" not in page.text
    assert server.http.get("/redoc").status_code == 404
