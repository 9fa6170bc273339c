"""The feature browser in a real browser: search, order, colours, keyboard."""

import json

import pytest
from chromium import Page, find_chromium
from page_examples import page as example

from saelens_cosine.report.page import write_page

pytestmark = pytest.mark.skipif(
    find_chromium() is None,
    reason="no Chromium on the path (or named by CHROMIUM); install chromium or chromium-headless-shell",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_page(example(2000), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    page = Page(find_chromium(), str(tmp_path_factory.mktemp("profile")))
    yield page
    page.close()


@pytest.fixture
def page(chromium, report):
    chromium.problems.clear()
    chromium.open(report.as_uri())
    yield chromium
    assert chromium.problems == []


def shown(page) -> list[str]:
    return page.run("[...document.querySelectorAll('#list .number')].map((number) => number.textContent)")


def opened(page) -> str:
    return page.run("document.querySelector('#feature h3').textContent")


def focused(page) -> str:
    return page.run("document.activeElement.id || document.activeElement.dataset.id || document.activeElement.tagName")


def test_search_and_browse_by_keyboard_alone(page):
    for _ in range(60):
        page.press("Tab")
        if focused(page) == "query":
            break
    assert focused(page) == "query"
    page.type("needle")
    assert shown(page) == ["#7", "#507", "#1007", "#1507"]
    assert page.run("document.getElementById('found').textContent") == "4 of 2,000 features"
    page.press("ArrowDown")
    assert (focused(page), opened(page)) == ("1/7", "Feature 7 of two")
    page.press("ArrowDown")
    assert (focused(page), opened(page)) == ("1/507", "Feature 507 of two")
    assert page.run("[...document.querySelectorAll('#feature mark.peak')].map((m) => m.textContent)") == [" needle"] * 8
    page.press("ArrowUp")
    page.press("Escape")
    assert focused(page) == "query"


def test_search_finds_numbers_and_inactive_text_only_where_asked(page):
    def search(text, anywhere=False):
        page.run(f"anywhere.checked = {str(anywhere).lower()}; query.value = {json.dumps(text)}")
        page.run("query.dispatchEvent(new Event('input'))")
        return shown(page)

    assert search("#12") == ["#12"]
    assert search("no such text") == []
    assert search(" COMMON")[:3] == ["#0", "#1", "#2"]  # in any case
    assert search("straw") == ["#5", "#9"]
    assert search("straw", anywhere=True) == ["#3", "#5", "#9"]
    assert search("strawberry") == ["#9"]
    assert search("strawberry", anywhere=True) == ["#3", "#9"]


def test_sorting_and_arms(page):
    page.run("sort.value = 'exponent'; sort.dispatchEvent(new Event('input', {bubbles: true}))")
    assert shown(page)[:3] == ["#1999", "#1997", "#1995"]
    page.run("sort.value = 'largest code'; sort.dispatchEvent(new Event('input', {bubbles: true}))")
    assert shown(page)[:5] == ["#499", "#999", "#1499", "#1999", "#498"]
    page.run("arm.value = '0'; arm.dispatchEvent(new Event('input', {bubbles: true}))")
    assert shown(page)[:2] == ["#498", "#998"]
    assert len(shown(page)) == 60
    page.run("more.click()")
    assert len(shown(page)) == 120


def test_tokens_are_coloured_by_their_codes(page):
    page.run("location.hash = 'feature/0/4'")
    page.run("new Promise((done) => setTimeout(done, 50))")
    assert opened(page) == "Feature 4 of one"
    strength, tip, colour = page.run(
        "(() => { const m = document.querySelector('#feature mark.peak');"
        "return [m.style.getPropertyValue('--v'), m.dataset.t, getComputedStyle(m).backgroundColor] })()"
    )
    assert (strength, tip) == ("1.00", "50.4")
    assert colour == "rgba(230, 140, 0, 0.85)"
    assert page.run("document.querySelectorAll('#feature mark.negative').length") == 0
    # density of feature 4 is 0.1, the lowest of all 1e-4: at 3/4 of the way on a log scale
    assert float(
        page.run("document.querySelector('#feature .bar i').style.getPropertyValue('--share')")
    ) == pytest.approx(0.75)


def test_negative_codes_have_a_colour_of_their_own(page):
    page.run("location.hash = 'feature/1/5'")
    page.run("new Promise((done) => setTimeout(done, 50))")
    negative = "document.querySelectorAll('#feature mark.negative')"
    assert page.run(f"[...{negative}].map((mark) => mark.textContent)") == ["berry"] * 8
    assert page.run(f"getComputedStyle({negative}[0]).backgroundColor").startswith("rgba(0, 114, 178")
