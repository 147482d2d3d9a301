"""The pages of a server whose checkpoint has HTML for a name and for a label: all of it stays text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import TIMEOUT_MS, grey, set_slider
from tests.browser.page_server import HOSTILE_CLASS, HOSTILE_LABEL, write_checkpoint
from tests.service.service_process import Running, serving

pytestmark = [pytest.mark.service, pytest.mark.slow]
expect.set_options(timeout=TIMEOUT_MS)
TAKEN = "taken"
NAME = f"<img src=x onerror=\"document.title='{TAKEN}'\"></script><script>document.title='{TAKEN}'</script>"


@pytest.fixture(scope="module")
def hostile(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("hostile")
    card = write_checkpoint(folder / "toy") / "config.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"name": NAME}))
    command = ("-m", "tests.browser.page_server")
    with serving(folder / "log", command=command, CHECKPOINT=str(folder / "toy")) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose scripts may not fail, and whose title must stay."""
    faults: list[str] = []
    with browser.new_context() as context:
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        yield page
        assert TAKEN not in page.title()
    assert not faults


def test_the_playground_shows_it_as_text(page: Page, hostile: Running) -> None:
    page.goto(f"http://127.0.0.1:{hostile.port}/")
    expect(page.locator("#model")).to_contain_text(NAME)
    set_slider(page, "#budget", "140")
    page.set_input_files("#file", grey(HOSTILE_CLASS, f"{NAME.replace('/', '')}.png"))
    expect(page.locator("#predictions .label").first).to_have_text(HOSTILE_LABEL)
    assert page.locator("main img").count() == 1, "the preview"
    assert page.locator("body script").count() == 0


def test_the_documentation_runs_nothing_of_it_and_works(page: Page, hostile: Running) -> None:
    """Swagger UI shows some values as Markdown, and leaves of the name an image without its handler."""
    page.goto(f"http://127.0.0.1:{hostile.port}/docs")
    infer = page.locator(".opblock", has_text="/v2/models/{model}/infer").first
    infer.locator(".opblock-summary").click()
    expect(infer.locator("select").first).to_contain_text(NAME)
    assert page.locator("[onerror]").count() == 0
    live = page.locator(".opblock", has_text="/livez").first
    live.locator(".opblock-summary").click()
    live.get_by_role("button", name="Try it out").click()
    live.get_by_role("button", name="Execute").click()
    expect(live.locator(".live-responses-table").first).to_contain_text("ok")


@pytest.mark.parametrize("path", ["", "docs"])
def test_no_page_can_be_put_into_the_frame_of_another_site(
    path: str, browser: Browser, hostile: Running, tmp_path: Path
) -> None:
    """A file is of another origin."""
    (tmp_path / "frame.html").write_text(f'<iframe src="http://127.0.0.1:{hostile.port}/{path}"></iframe>')
    said: list[str] = []
    with browser.new_context() as context:
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        with page.expect_event("console", timeout=TIMEOUT_MS):
            page.goto((tmp_path / "frame.html").as_uri())
    assert any("frame-ancestors" in text for text in said), said
