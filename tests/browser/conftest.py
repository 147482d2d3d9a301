"""A browser, a server that takes its time, and the playground of the one in the other."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator

import pytest
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, sync_playwright

from tests.browser.page_server import write_checkpoint
from tests.service.service_process import Running, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_MS = 15_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: `apt-get install chromium` to run this test")
    with (
        sync_playwright() as playwright,
        # Without the sandbox, which a container's root cannot have; all that it opens is our own page.
        playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        yield browser


@pytest.fixture(scope="module")
def playground(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The server of ``page_server``, all warmed. Asks for the browser first: without one, nothing needs to start."""
    folder = tmp_path_factory.mktemp("playground")
    checkpoint = write_checkpoint(folder / "toy")
    with serving(folder / "log", command=("-m", "tests.browser.page_server"), CHECKPOINT=str(checkpoint)) as running:
        running.wait_ready()
        running.wait_until(lambda: all("1" in w["latency_ms"] for w in running.http.get("/v1/model").json()["widths"]))
        yield running


@pytest.fixture
def page(browser: Browser, playground: Running) -> Iterator[Page]:
    """The playground, just opened. No script of it may fail, and the policy may have nothing to object to."""
    faults: list[str] = []
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Policy" in message.text else None)
        page.goto(f"http://127.0.0.1:{playground.port}/")
        page.get_by_text("Ready", exact=True).wait_for()
        set_slider(page, "#budget", "140")  # 3.2 s: enough on any machine
        yield page
    assert not faults


def set_slider(page: Page, slider: str, value: str) -> None:
    page.eval_on_selector(slider, f"e => {{ e.value = {value}; e.dispatchEvent(new Event('input')); }}")


def grey(value: int, name: str = "grey.png") -> FilePayload:
    """An image of class ``value``, as a visitor picks it."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (value, value, value)).save(buffer, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}
