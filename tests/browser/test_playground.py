"""The playground in a real browser. One image takes 200 ms at full width, and its share of it at others."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser.conftest import TIMEOUT_MS, grey, set_slider
from tests.browser.page_server import HOSTILE_CLASS, HOSTILE_LABEL, write_checkpoint
from tests.service.service_process import Running, serving

pytestmark = [pytest.mark.service, pytest.mark.slow]
expect.set_options(timeout=TIMEOUT_MS)
# A file input is hidden: its label, which follows it, shows the focus.
OUTLINED = """[document.activeElement, document.activeElement.nextElementSibling].some(
    (element) => element && getComputedStyle(element).outlineStyle !== "none")"""
PROBLEM = {"type": "about:blank", "title": "Refused for load", "status": 429, "detail": "Too much.", "request_id": "r1"}


def set_budget(page: Page, budget_ms: float) -> None:
    """As near as the slider has it."""
    set_slider(page, "#budget", f"Math.round(40 * Math.log10({budget_ms}))")


def refuse(page: Page, status: int, problem: dict[str, object], **headers: str) -> None:
    """The server's next answers, as if it were in such a state."""

    def answer(route: Route) -> None:
        route.fulfill(status=status, json=problem, headers=headers, content_type="application/problem+json")

    page.route("**/v1/classify", answer)


def test_a_picked_image_is_classified_and_the_width_explained(page: Page) -> None:
    page.set_input_files("#file", grey(7, "my cat.png"))
    predictions = page.locator("#predictions li")
    expect(predictions).to_have_count(5)
    expect(predictions.first).to_contain_text("class 7")
    expect(predictions.first).to_contain_text("90.0")
    assert (
        page.locator(".bar span").first.evaluate("e => e.getBoundingClientRect().width / e.parentNode.clientWidth")
        > 0.8
    )
    expect(page.locator("#used")).to_have_text("Width 1, right in 70\xa0% of cases")
    expect(page.locator("#why")).to_contain_text("most accurate there is")
    expect(page.locator("tr[aria-current]")).to_contain_text("used")
    expect(page.locator("#chosen")).to_contain_text("my cat.png")
    expect(page.locator("#preview")).to_be_visible()
    expect(page.locator("#said")).to_contain_text("class 7, 90\xa0%. Width 1")
    expect(page.locator("#foresight")).to_contain_text("would get width 1")


@pytest.mark.parametrize(
    "event",
    [
        "new DragEvent('drop', {bubbles: true, dataTransfer})",
        "new ClipboardEvent('paste', {clipboardData: dataTransfer})",
    ],
    ids=["dropped", "pasted"],
)
def test_an_image_can_be_dropped_and_pasted(page: Page, event: str) -> None:
    page.evaluate(
        f"""(bytes) => {{
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([new Uint8Array(bytes)], "a.png", {{ type: "image/png" }}));
            document.body.dispatchEvent({event.replace("{clip", "{bubbles: true, clip")});
        }}""",
        list(grey(20)["buffer"]),
    )
    expect(page.locator("#predictions li").first).to_contain_text("class 20")


def test_a_small_budget_gets_a_narrow_width(page: Page) -> None:
    page.set_input_files("#file", grey(7))
    expect(page.locator("#used")).to_contain_text("Width 1")
    set_budget(page, 140)  # of 50, 100, 150 and 200 ms: no room for two, and on a busy machine for one more
    expect(page.locator("#budget-value")).to_have_text("140\xa0ms")
    expect(page.locator("#used")).to_contain_text(re.compile(r"Width 0\.(25|5),"))
    expect(page.locator("#why")).to_contain_text(re.compile("Budget|Interference"))
    expect(page.locator("#widths tr").first).to_contain_text("over the budget")
    set_budget(page, 3200)
    expect(page.locator("#used")).to_contain_text("Width 1")


def test_a_floor_gets_a_wide_one_where_load_would_give_a_narrow_one(page: Page) -> None:
    """Four requests at a time, which at width 0.75 take 600 ms: with the floor, some must be refused."""
    page.set_input_files("#file", grey(7))
    expect(page.locator("#used")).to_contain_text("Width 1")
    set_budget(page, 450)
    page.select_option("#rate", "20")
    page.get_by_role("button", name="Keep sending").click()
    expect(page.locator("#used")).to_contain_text(re.compile(r"Width 0\.(25|5),"))
    assert page.locator("#floor").get_attribute("max") == "4", "one step for each of the model's widths"
    set_slider(page, "#floor", "3")
    expect(page.locator("#floor-value")).to_have_text("60.0\xa0%, width 0.75")
    expect(page.locator("#widths tr").last).to_contain_text("below the floor")
    for _ in range(10):
        page.wait_for_timeout(200)
        expect(page.locator("#used")).to_contain_text(re.compile(r"Width (0\.75|1),"))
    set_budget(page, 140)
    expect(page.locator("#problem-title")).to_have_text("Impossible on this machine (422)")


def test_the_floor_is_sent_as_the_accuracy_of_its_width(page: Page) -> None:
    page.set_input_files("#file", grey(7))
    expect(page.locator("#used")).to_contain_text("Width")
    with page.expect_request("**/v1/classify") as sent:
        set_slider(page, "#floor", "2")
    assert sent.value.headers["x-min-accuracy"] == "0.5"
    assert sent.value.headers["x-latency-budget-ms"] == "3200"


def test_what_is_impossible_is_offered_otherwise(page: Page) -> None:
    page.set_input_files("#file", grey(7))
    expect(page.locator("#used")).to_contain_text("Width")
    set_budget(page, 2)
    expect(page.locator("#problem-detail")).to_contain_text("cannot be met at any width")
    expect(page.locator("#foresight")).to_contain_text("would be refused")
    offers = page.locator("#offers li")
    expect(offers).to_have_count(4)
    offers.nth(1).get_by_role("button").click()
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("#used")).to_contain_text("Width")
    assert float(page.locator("#budget-value").inner_text().split()[0]) > 100


def test_the_charts_move_while_sending_goes_on(page: Page) -> None:
    page.set_input_files("#file", grey(7))
    expect(page.locator("#used")).to_contain_text("Width")
    expect(page.locator("figure")).to_have_count(6)
    page.get_by_role("button", name="Keep sending").click()
    requests = page.locator("figure", has_text="Requests")
    expect(requests.locator("li").first).to_contain_text(re.compile(r"in time[3-7]"))
    expect(page.locator("figure").nth(2).locator(".line").first).to_have_attribute("d", re.compile("L"))
    before = [path.get_attribute("d") for path in page.locator("figure path").all()]
    page.wait_for_timeout(2500)
    after = [path.get_attribute("d") for path in page.locator("figure path").all()]
    assert sum(one != other for one, other in zip(before, after, strict=True)) >= 5
    expect(requests.locator("svg")).to_have_attribute(
        "aria-label", re.compile(r"Requests in the last two minutes\. in time \d")
    )
    page.get_by_role("button", name="Stop sending").click()
    expect(page.locator("#tally")).to_contain_text(re.compile(r"^\d+ sent, \d+ answered, 0 refused for load, 0 failed"))
    page.get_by_text("The same as a table").click()
    expect(page.locator("#numbers tr")).to_have_count(4 + 4 + 2 + 1 + 1 + 2)


def test_who_comes_later_sees_the_last_two_minutes(page: Page) -> None:
    page.wait_for_timeout(3000)
    page.reload()
    expect(page.locator("figure").last.locator(".line").first).to_have_attribute("d", re.compile("L.*L.*L"))


def test_refusals_are_shown_with_when_to_come_back(page: Page) -> None:
    refuse(page, 429, PROBLEM, **{"Retry-After": "7"})
    page.set_input_files("#file", grey(7))
    expect(page.get_by_role("alert")).to_contain_text("Refused for load (429)")
    expect(page.locator("#problem-notes")).to_have_text("Retry-After: 7 s · Request r1")
    page.unroute("**/v1/classify")
    page.get_by_role("button", name="Send again").click()
    expect(page.locator("#used")).to_contain_text("Width")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_answers_are_shown_though_later_requests_were_refused_before(page: Page) -> None:
    """Every second request is refused at once, and so before the one ahead of it is answered."""
    refuse(page, 429, PROBLEM)
    page.set_input_files("#file", grey(7))
    expect(page.locator("#problem")).to_be_visible()
    asked: list[Route] = []

    def answer_every_other(route: Route) -> None:
        asked.append(route)
        if len(asked) % 2:
            route.continue_()
        else:
            route.fulfill(status=429, json=PROBLEM, content_type="application/problem+json")

    page.route("**/v1/classify", answer_every_other)
    page.select_option("#rate", "20")
    page.get_by_role("button", name="Keep sending").click()
    expect(page.locator("#tally")).to_contain_text(re.compile(r"[1-9]\d* answered, [1-9]\d* refused for load"))
    expect(page.locator("#used")).to_contain_text("Width")
    expect(page.locator("#problem")).to_be_hidden()
    refuse(page, 429, PROBLEM)
    expect(page.locator("#problem")).to_be_visible()


def test_what_is_no_image_is_named_by_the_server(page: Page) -> None:
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"})
    expect(page.locator("#problem-title")).to_contain_text("(415)")
    expect(page.locator("#preview")).to_be_hidden()


def test_an_answer_that_is_no_problem_object_is_shown_as_text(page: Page) -> None:
    page.route("**/v1/classify", lambda route: route.fulfill(status=502, body="<b>Bad gateway</b>"))
    page.set_input_files("#file", grey(7))
    expect(page.locator("#problem-detail")).to_have_text("<b>Bad gateway</b>")


def test_labels_and_file_names_are_only_text(page: Page) -> None:
    page.set_input_files("#file", grey(HOSTILE_CLASS, "<img src=x onerror=\"document.title='taken'\">.png"))
    expect(page.locator("#predictions .label").first).to_have_text(HOSTILE_LABEL)
    expect(page.locator("#chosen")).to_contain_text("<img src=x")
    assert page.locator("main img").count() == 1, "the preview"
    assert page.title() == "scala-serve"
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>'")


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_is_asked_for_when_there_is_none_or_a_wrong_one(page: Page, status: int) -> None:
    def guarded(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer a-key":
            route.continue_()
        else:
            route.fulfill(status=status, json=PROBLEM | {"status": status, "title": "No key"})

    expect(page.locator("#key-form")).to_be_hidden()
    page.route("**/v1/**", guarded)
    page.set_input_files("#file", grey(7))
    expect(page.get_by_role("alert")).to_contain_text(f"({status})")
    expect(page.get_by_label("This server asks for an API key")).to_be_focused()
    page.keyboard.type("a-key")
    page.keyboard.press("Enter")
    expect(page.locator("#used")).to_contain_text("Width")
    expect(page.locator("#key-form")).to_be_hidden()
    page.reload()
    expect(page.locator("#state")).to_have_text("Ready")
    assert "a-key" not in page.content()


def test_a_refusal_of_before_the_key_does_not_ask_for_it_again(page: Page) -> None:
    held: list[Route] = []

    def guarded(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer a-key":
            route.continue_()
        elif "quote" in route.request.url:
            held.append(route)
        else:
            route.fulfill(status=401, json=PROBLEM | {"status": 401, "title": "No key"})

    page.route("**/v1/**", guarded)
    with page.expect_request("**/v1/quote*"):
        page.set_input_files("#file", grey(7))
    expect(page.get_by_label("This server asks for an API key")).to_be_focused()
    page.keyboard.type("a-key")
    page.keyboard.press("Enter")
    expect(page.locator("#used")).to_contain_text("Width")
    assert held
    with page.expect_response("**/v1/quote*"):
        for route in held:
            route.fulfill(status=401, json=PROBLEM | {"status": 401, "title": "No key"})
    expect(page.locator("#foresight")).to_contain_text("Now")
    expect(page.locator("#key-form")).to_be_hidden()


def test_with_the_keyboard_alone(page: Page) -> None:
    page.set_input_files("#file", grey(7))
    expect(page.locator("#used")).to_contain_text("Width")
    reached = []
    page.locator("body").click(position={"x": 1, "y": 1})
    for _ in range(10):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert page.evaluate(OUTLINED), f"the focus on {reached[-1]} cannot be seen"
    wanted = ["API", "Metrics", "file", "camera", "budget", "floor", "send", "keep", "rate"]
    assert [each for each in reached if each in wanted] == wanted
    page.focus("#budget")
    page.keyboard.press("Home")
    expect(page.locator("#budget")).to_have_attribute("aria-valuetext", "1 milliseconds")
    page.keyboard.press("End")
    expect(page.locator("#budget-value")).to_have_text("10000\xa0ms")
    page.focus("#keep")
    page.keyboard.press("Enter")
    expect(page.locator("#keep")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Space")
    expect(page.locator("#keep")).to_have_attribute("aria-pressed", "false")


def test_everything_has_a_name_for_those_who_listen(page: Page) -> None:
    page.set_input_files("#file", grey(7))
    expect(page.locator("#used")).to_contain_text("Width")
    for role, name in (
        ("slider", "Latency budget"),
        ("slider", "Accuracy floor"),
        ("combobox", "Requests a second"),
        ("region", "Ask"),
        ("region", "Answer"),
        ("list", "The most likely classes"),
    ):
        expect(page.get_by_role(role, name=name)).to_be_visible()  # type: ignore[arg-type]
    for name in ("Choose a file", "Take a picture"):
        expect(page.get_by_label(name)).to_have_count(1)
    assert page.get_by_role("img", name="in the last two minutes").count() == 6
    assert page.locator("#camera").get_attribute("capture") == "environment"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(page: Page, scheme: str) -> None:
    """WCAG 2.2 AA: 4.5 to 1 for text."""
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_input_files("#file", grey(7))
    expect(page.locator("#used")).to_contain_text("Width")
    ground = luminance(page, "body", "backgroundColor")
    assert (ground > 0.5) == (scheme == "light")
    for text, behind in (
        ("h1", "body"),
        ("#model", "body"),
        ("#why", ".ask"),
        ("#time-text", ".ask"),
        ("#send", "#send"),
        ("nav a", "body"),
    ):
        lighter, darker = sorted(
            (luminance(page, text, "color"), luminance(page, behind, "backgroundColor")), reverse=True
        )
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, text


def luminance(page: Page, selector: str, attribute: str) -> float:
    """Relative, of a colour as computed; WCAG's formula."""
    colour: str = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{attribute}")
    channels = [int(channel) / 255 for channel in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_it_fits_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.set_input_files("#file", grey(7, "a-file-name-" * 20 + ".png"))
    expect(page.locator("#used")).to_contain_text("Width")
    page.get_by_text("The same as a table").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert min(box["width"] for plot in page.locator(".plot svg").all() if (box := plot.bounding_box())) > 200


def test_nothing_moves_for_those_who_asked_for_it(page: Page) -> None:
    page.set_input_files("#file", grey(7))
    expect(page.locator("#used")).to_contain_text("Width")
    bar = page.locator(".bar span").first
    expect(bar).to_have_css("transition-duration", "0.25s")
    page.emulate_media(reduced_motion="reduce")
    expect(bar).to_have_css("transition-duration", "0s")


def test_the_page_talks_to_its_own_server_alone(page: Page, playground: Running) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.set_input_files("#file", grey(7))
    set_budget(page, 3200)
    expect(page.locator("#used")).to_contain_text("Width")
    own = (f"http://127.0.0.1:{playground.port}/", f"blob:http://127.0.0.1:{playground.port}/")
    assert asked
    assert [url for url in asked if not url.startswith(own)] == []


def test_a_server_that_leaves_is_told_and_one_that_comes_back_is_found(browser: Browser, tmp_path: Path) -> None:
    checkpoint, command = str(write_checkpoint(tmp_path / "toy")), ("-m", "tests.browser.page_server")
    with browser.new_context() as context:
        page = context.new_page()
        with serving(tmp_path / "log", command=command, CHECKPOINT=checkpoint, DRAIN_GRACE_S="0") as first:
            first.wait_ready()
            page.goto(f"http://127.0.0.1:{first.port}/")
            expect(page.locator("#state")).to_have_text("Ready")
            first.process.send_signal(signal.SIGTERM)
            assert first.process.wait(timeout=5) == 0, "an open page holds nothing up"
            assert "Cancel" not in (tmp_path / "log").read_text(), "the stream was ended, not cut off"
            expect(page.locator("#state")).to_have_attribute("data-kind", "lost")
            page.set_input_files("#file", grey(7))
            expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
        with serving(tmp_path / "log", command=command, port=first.port, CHECKPOINT=checkpoint) as second:
            second.wait_ready()
            expect(page.locator("#state")).to_have_text("Ready", timeout=30_000)
            set_budget(page, 3200)  # which sends again
            expect(page.locator("#used")).to_contain_text("Width")
