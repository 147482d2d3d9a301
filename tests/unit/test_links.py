"""The documents' links into the repository: every file is there, and has the heading that is named."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GLOBS = ("docs/*.md", "deploy/*.md", "checkpoints/*/*.md")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(page for glob in GLOBS for page in sorted(ROOT.glob(glob)))]
CODE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(?:\]\(|(?:src|srcset)=")(?!https?:)([^)"\s#]*)(?:#([^)"\s]+))?[)"]')


@cache
def headings(page: Path) -> list[str]:
    """The names that their headings give to places of a page: small letters, hyphens for spaces, no punctuation."""
    found = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for name, place in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not place or headings(target).count(place) == 1, f"{name}#{place}"


def test_each_page_of_the_documentation_has_one_title() -> None:
    for page in PAGES:
        text = CODE.sub("", page.read_text(encoding="utf-8"))
        assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1, page.name
