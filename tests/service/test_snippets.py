"""The examples of README.md and docs/, run as they stand there against a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.service.service_process import ROOT, Running

pytestmark = pytest.mark.service
PAGES = ("README.md", "docs/api.md", "docs/operations.md")
SHOWN_AT = "127.0.0.1:8000"
FENCED = re.compile(
    r"(?<!not run -->\n)^```(\w+)\n(.*?)^```\n(?:\n```(json|text)\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL
)
SAME = ("model", "budget_ms", "budget_met", "width", "expected_accuracy", "type", "title", "status")
TRIES = 5  # a machine on which other tests run may be late for a budget


@dataclass(frozen=True)
class Snippet:
    """An example, and what the page shows of its output, if it does: JSON or text."""

    place: str
    language: str
    code: str
    output_kind: str
    output: str


def snippets() -> Iterator[Snippet]:
    """All Python of the pages, and those shell commands that ask the server, but for what a comment says is not run."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for found in FENCED.finditer(text):
            language, code, kind, output = found.groups(default="")
            line = text.count("\n", 0, found.start()) + 1
            if language == "python" or (language == "sh" and "curl" in code):
                yield Snippet(f"{page}:{line}", language, code, kind, output)


ALL = list(snippets())


def test_the_pages_show_each_kind_of_client() -> None:
    for client in ("curl", "httpx", "tritonclient"):
        assert any(client in snippet.code and snippet.output for snippet in ALL), client


@pytest.mark.parametrize("snippet", ALL, ids=[snippet.place for snippet in ALL])
def test_a_snippet_does_what_its_page_shows(
    snippet: Snippet, server: Running, photos: list[bytes], tmp_path: Path
) -> None:
    if snippet.language == "sh" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "your-photo.jpg").write_bytes(photos[0])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    code = snippet.code.replace(SHOWN_AT, f"127.0.0.1:{server.port}")
    command = [sys.executable, "-c", code] if snippet.language == "python" else ["bash", "-ec", code]
    for last in (number == TRIES for number in range(1, TRIES + 1)):
        ran = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=60,
            check=False,
        )
        try:
            assert ran.returncode == 0, ran.stderr
            check_output(snippet, ran.stdout)
            return
        except AssertionError:
            if last:
                raise


def check_output(snippet: Snippet, output: str) -> None:
    if snippet.output_kind == "text":
        assert output == snippet.output
    elif snippet.output_kind == "json":
        check_alike(json.loads(output), json.loads(snippet.output))
    elif snippet.language == "sh":
        assert "detail" not in json.loads(output), output


def check_alike(answered: Any, shown: Any, where: str = "") -> None:
    """Of the same shape and kinds; what does not depend on the photo or the clock is the same."""
    if isinstance(shown, dict):
        assert list(answered) == list(shown), where
        for name, value in shown.items():
            check_alike(answered[name], value, name)
    elif isinstance(shown, list):
        assert len(answered) == len(shown), where
        for one, other in zip(answered, shown, strict=True):
            check_alike(one, other, where)
    else:
        assert type(answered) is type(shown), where
        if where in SAME:
            assert answered == shown, where


def test_what_is_shown_is_compared() -> None:
    shown = {"width": 1.0, "predictions": [{"score": 0.5}]}
    check_alike({"width": 1.0, "predictions": [{"score": 0.25}]}, shown)
    for answered in (
        {"width": 0.5, "predictions": [{"score": 0.5}]},
        {"width": 1.0, "predictions": []},
        {"width": 1.0, "predictions": [{"score": "0.5"}]},
        {"predictions": [{"score": 0.5}], "width": 1.0},
    ):
        with pytest.raises(AssertionError):
            check_alike(answered, shown)
