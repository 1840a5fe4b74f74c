"""The pages in a real browser: an accessibility checker, the keyboard, the phone, the dark, the printer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import hostile_changes, hostile_facts
from webpage import BROWSER, FLAGS, needs_browser

from fused_rec.reporting.changes import render_changes
from fused_rec.reporting.page import render_page

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright drives the browser; it comes with the tests extra"
)
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe checks pages; it comes with the tests extra"
)
pytestmark = needs_browser

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
UNFOLD = "document.querySelectorAll('details').forEach(folded => { folded.open = true; })"
# What can be reached by Tab and is not in a folded part, in the order of the page.
REACHABLE = (
    """[...document.querySelectorAll('a[href], summary, [tabindex="0"]')].filter(part => part.checkVisibility())"""
)
# Of the element with the focus: its place among them, and whether it is seen and has an outline.
FOCUSED = f"""(() => {{
  const part = document.activeElement, style = getComputedStyle(part), box = part.getBoundingClientRect();
  const shown = box.right > 0 && box.bottom > 0 && box.left < innerWidth && box.top < innerHeight;
  const outlined = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2;
  return [{REACHABLE}.indexOf(part), shown, outlined];
}})()"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    facts = hostile_facts()
    made = {"report": render_page(facts), "changes": render_changes([hostile_changes()] * 2, facts.results)}
    for name, page in made.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(params=["report", "changes"])
def file(request, files) -> Path:
    return files[request.param]


@pytest.fixture
def opened(browser, file):
    """Opens the page, in a new context each time; the policy of the page lets no checker run unless it is set aside."""
    contexts = []

    def open_page(size: str = "desktop", scheme: str = "light") -> Any:
        width, height = SIZES[size]
        view = {"width": width, "height": height}
        context = browser.new_context(viewport=view, color_scheme=scheme, bypass_csp=True, has_touch=size == "phone")
        contexts.append(context)
        page = context.new_page()
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def faults(page: Any) -> list[str]:
    """What axe finds, a line for each rule and element."""
    return [
        f"{found['id']}: {node['target']} {node['failureSummary']}"
        for found in axe.Axe().run(page).response["violations"]
        for node in found["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_no_fault(opened, size, scheme):
    page = opened(size, scheme)
    assert faults(page) == []
    page.evaluate(UNFOLD)
    assert faults(page) == []
    assert page.said == []
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_printed_page_is_light_and_whole(opened, scheme):
    page = opened(scheme=scheme)
    folded = page.evaluate("document.querySelectorAll('details:not([open])').length")
    page.emulate_media(media="print", color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    hidden = """[...document.querySelectorAll('main p, main td, main li')].filter(part => !part.offsetHeight).length"""
    assert page.evaluate(hidden) == 0, f"of {folded} folded parts some are not printed"
    assert faults(page) == []
    assert page.pdf().startswith(b"%PDF")


def test_the_keyboard_reaches_everything_in_order(opened):
    page = opened()
    page.evaluate(UNFOLD)
    count = page.evaluate(f"{REACHABLE}.length")
    assert count > 10
    reached = []
    for _ in range(count):
        page.keyboard.press("Tab")
        place, shown, outlined = page.evaluate(FOCUSED)
        assert shown and outlined, page.evaluate("document.activeElement.outerHTML")[:200]
        reached.append(place)
    assert reached == list(range(count))


def test_the_first_stop_skips_to_the_content(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")


def test_the_keyboard_unfolds(opened, file):
    if file.stem != "report":
        pytest.skip("only the report has folded parts")
    page = opened()
    folded = page.locator("details:not([open]) > summary").first
    title = folded.text_content()
    folded.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.parentElement.open") and title
    page.keyboard.press("Space")
    assert not page.evaluate("document.activeElement.parentElement.open")


def test_links_lead_to_their_sections(opened):
    page = opened()
    for link in page.locator("nav a").all():
        link.click()
        target = link.get_attribute("href").removeprefix("#")
        top = page.evaluate(f"document.getElementById('{target}').getBoundingClientRect().top")
        assert top < SIZES["desktop"][1]
    assert page.locator("nav a").count() >= 4


def test_a_checker_sees_a_fault(opened):
    page = opened()
    page.evaluate("document.documentElement.removeAttribute('lang')")
    page.evaluate("document.querySelector('main p').style.color = '#dddddd'")
    found = {line.partition(":")[0] for line in faults(page)}
    assert {"html-has-lang", "color-contrast"} <= found
