"""The page in a real Chromium: choose, rank, critique, errors, keyboard, a narrow window.

`JRM_SCREENSHOTS=FOLDER` keeps pictures of it, to be looked at.
"""

import io
import json
import os
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest
from service_case import BROKEN, FakeModel, make_service, png, serving

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
MODEL = FakeModel()
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><b>red</b>"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url():
    with serving(make_service(MODEL, max_instruction=120)) as found:
        yield found


@pytest.fixture
def page(browser, url):
    """The page, opened. Whatever it asks of other machines, or complains of, fails the test."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    context.set_default_timeout(10_000)
    page = context.new_page()
    foreign, complaints = [], []
    page.on("request", lambda r: None if r.url.startswith((url, "blob:", "data:")) else
            foreign.append(r.url))  # fmt: skip
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.complaints = complaints
    page.goto(url)
    yield page
    assert not foreign
    assert not complaints
    assert page.title() == "Rank edits"
    context.close()


def keep(page, name):
    if folder := os.environ.get("JRM_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def files(*values):
    return [
        {"name": f"{value}.png", "mimeType": "image/png", "buffer": png(value, 64)}
        for value in values
    ]


def names(page):
    return [
        re.sub(r"^\d\. ", "", text) for text in page.locator("#ranking .place").all_inner_texts()
    ]


def test_upload_rank_critique_and_sheet(page):
    page.fill("#instruction", HOSTILE)
    page.set_input_files("#source", files(10))
    page.set_input_files("#candidates", files(20, 90, 50))
    page.click("#rank")
    page.wait_for_selector("#ranking li")
    assert names(page) == ["90.png", "50.png", "20.png"]
    wanted = MODEL.expected(HOSTILE, [png(10)], [png(v) for v in (90, 50, 20)])[:, 0]
    shown = page.locator("#ranking .number").all_inner_texts()
    assert shown == [f"+{reward:.4f}" for reward in wanted]
    widths = [
        fill["width"] for fill in map(lambda i: i.bounding_box(), page.locator(".bar i").all())
    ]
    assert widths[0] > widths[1] > widths[2]
    assert page.locator("#ranking dt").all_inner_texts()[:3] == [
        "overall",
        "following",
        "normalised",
    ]
    page.click("#critique")
    page.wait_for_selector(".said")
    said = page.locator(".said").all_inner_texts()
    assert len(said) == 3 and said[0].startswith(HOSTILE) and said[0].endswith("90")
    assert not page.locator("#ranking b").count()  # text, not markup
    with page.expect_download() as download:
        page.click("#sheet")
    sheet = PIL.Image.open(download.value.path())
    assert sheet.size[0] == 12 + 4 * (256 + 12) and sheet.size[1] > 256
    levels = [
        sheet.convert("L").getpixel((12 + i * 268 + 40, sheet_top(sheet) + 40)) for i in range(4)
    ]
    assert levels == [10, 90, 50, 20]
    keep(page, "ranked")
    if folder := os.environ.get("JRM_SCREENSHOTS"):
        sheet.save(Path(folder) / "sheet.png")


def sheet_top(sheet):
    """Where its pictures begin: the first row that is nearly black at the source's place."""
    grey = sheet.convert("L")
    return next(
        y for y in range(grey.height) if grey.getpixel((100, y)) == grey.getpixel((14, y)) == 10
    )


def test_errors_stand_where_they_belong(page):
    page.click("#rank")
    assert "Say what" in page.inner_text("#instruction-error")
    assert "at least one" in page.inner_text("#candidates-error")
    page.fill("#instruction", "Red.")
    text = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": BROKEN}
    page.set_input_files("#candidates", [text, broken, *files(5)])
    assert "others were left out" in page.inner_text("#candidates-error")
    page.click("#rank")
    page.wait_for_selector("#ranking .error")
    assert names(page) == ["5.png", "broken.png"]
    assert "not a readable image" in page.inner_text("#ranking .error")
    keep(page, "errors")
    page.set_input_files("#source", [broken])
    page.click("#rank")
    page.wait_for_selector("#source-error:not(:empty)")
    assert "not a readable image" in page.inner_text("#source-error")
    page.click("[aria-label='Remove broken.png'] >> nth=0")
    page.set_input_files("#candidates", files(*range(30, 40)))
    assert "At most 8" in page.inner_text("#candidates-error")
    assert page.locator("#candidates-list li").count() == 8
    page.fill("#instruction", "long " * 40)
    page.click("#rank")
    page.wait_for_selector("#form-error:not(:empty)")
    assert "characters of instruction" in page.inner_text("#form-error")
    page.click("#clear")
    assert page.locator(".pictures li").count() == 0 and page.input_value("#instruction") == ""
    page.complaints[:] = [c for c in page.complaints if "422" not in c]  # the browser logs each


def test_the_example_by_keyboard_in_a_narrow_window(page):
    page.set_viewport_size({"width": 360, "height": 740})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "example"
    page.keyboard.press("Enter")
    page.wait_for_selector("#candidates-list li >> nth=1")
    assert page.input_value("#instruction")
    order = []
    for _ in range(12):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
        if order[-1] == "rank":
            break
    assert [name for name in order if name] == ["instruction", "source", "candidates", "rank"]
    page.keyboard.press("Enter")
    page.wait_for_selector("#ranking li")
    assert page.evaluate("document.activeElement.id") == "result-label"
    overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0
    for control in page.locator("button:visible, a:visible, textarea").all():
        box = control.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    keep(page, "narrow")
    meaning = page.inner_text(".note")
    assert "no fixed scale" in meaning and "larger is better" in meaning


def test_the_routes_page(page, url):
    page.goto(url + "/docs")
    page.wait_for_selector("summary")
    titles = page.locator("summary").all_inner_texts()
    assert {"POST /v1/score", "POST /score", "POST /compute", "GET /health"} <= set(titles)
    page.click("text=POST /v1/score")
    schema = json.loads(page.locator("details[open] pre").first.inner_text())
    assert "groups" in schema["properties"]
    keep(page, "routes")
    page.goto(url)


def test_pictures_can_be_dropped(page):
    data = list(png(33, 16))
    page.evaluate(
        """(bytes) => {
            const move = new DataTransfer();
            move.items.add(new File([new Uint8Array(bytes)], "drop.png", { type: "image/png" }));
            for (const name of ["dragover", "drop"]) {
                const options = { dataTransfer: move, bubbles: true, cancelable: true };
                const event = new DragEvent(name, options);
                document.getElementById("candidates-drop").dispatchEvent(event);
            }
        }""",
        data,
    )
    assert page.locator("#candidates-list img").get_attribute("alt") == "drop.png"
    assert PIL.Image.open(io.BytesIO(bytes(data))).size == (16, 16)
