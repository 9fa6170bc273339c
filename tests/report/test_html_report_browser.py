"""The report page in a real browser: it opens fast, draws, searches, prints, and runs nothing but its own script."""

import json
import re

import pytest
from chromium import Page, find_chromium
from report_examples import EVIL, evil_report, many_features

from saelens_cosine.report.html import write_report

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on the path (or named by CHROMIUM); install chromium or chromium-headless-shell",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(many_features(), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    page = Page(CHROMIUM, str(tmp_path_factory.mktemp("profile")))
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


def test_two_thousand_features_open_fast(report, chromium):
    assert report.stat().st_size < 15e6
    assert any(chromium.open(report.as_uri()) < 3 for _ in range(5))  # the machine may be busy
    assert chromium.run("document.getElementById('found').textContent") == "2,000 of 2,000 features"


@pytest.mark.parametrize(("width", "mobile", "dark"), [(1280, False, False), (390, True, False), (1280, False, True)])
def test_every_plot_is_drawn_and_the_page_fits(report, chromium, width, mobile, dark):
    chromium.problems.clear()
    chromium.open(report.as_uri(), width=width, mobile=mobile, dark=dark)
    assert chromium.run("document.documentElement.scrollWidth") == width
    plots = chromium.run(
        """[...document.querySelectorAll(".chart")].map((chart) => {
          const box = chart.getBoundingClientRect();
          const marks = [...chart.querySelectorAll("svg *")].map((mark) => [mark, mark.getBoundingClientRect()]);
          const inside = marks.filter(([mark, m]) => m.width + m.height > 0 && m.right > box.left && m.left < box.right);
          const text = Math.min(...[...chart.querySelectorAll("text")].map((t) => t.getBoundingClientRect().height));
          const style = getComputedStyle(chart.querySelector(".line, .dot, .mark"));
          return [chart.getAttribute("aria-label"), box.width, inside.length, text, style.stroke + style.fill];
        })"""
    )
    assert (
        len(plots) == 11
    )  # curves, exponents, norms, zf, scaling, probing, precision twice, matches, density and exponent
    for name, plot_width, marks, _, colours in plots:
        assert plot_width > 300, name
        assert marks > 0, name
        assert "rgb" in colours, name
    assert chromium.problems == []


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


def test_a_point_of_a_scatter_shows_its_numbers_and_opens_its_feature(page):
    x, y = page.run(
        """(async () => {
          const dot = document.querySelector('#matches [data-f="0/2"]');
          dot.parentNode.append(dot);  // above its neighbours
          dot.scrollIntoView({ block: "center" });
          await new Promise((done) => setTimeout(done, 100));  // scrolling hides tooltips
          const box = dot.getBoundingClientRect();
          return [box.left + box.width / 2, box.top + box.height / 2];
        })()"""
    )
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert page.run("tip.hidden ? null : tip.textContent").startswith("one 2 and two 2: correlation ")
    for kind in ("mousePressed", "mouseReleased"):
        page.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    page.run("new Promise((done) => setTimeout(done, 50))")
    assert opened(page) == "Feature 2 of one"


def test_an_arm_is_hidden_by_its_box_from_the_keyboard(page):
    def displays():
        marks = "['.s0', '.s1'].map((arm) => document.querySelector('#exponents .chart ' + arm))"
        return page.run(f"{marks}.map((mark) => getComputedStyle(mark).display)")

    page.run("document.getElementById('show0').focus()")
    assert displays() == ["inline", "inline"]
    page.press(" ")
    assert displays() == ["none", "inline"]
    page.press(" ")
    assert displays() == ["inline", "inline"]


def test_it_prints(page):
    page.open(page.run("location.href"), width=794)  # A4 at 96 dots per inch
    page.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert page.run("document.documentElement.scrollWidth") == 794
        assert (
            page.run("['nav', '#controls', '#results'].map((s) => getComputedStyle(document.querySelector(s)).display)")
            == ["none"] * 3
        )
        assert page.run("document.querySelector('.legend label').getBoundingClientRect().height") > 0
    finally:
        page.send("Emulation.setEmulatedMedia", media="")
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 15


def test_hostile_text_does_nothing(chromium, tmp_path):
    chromium.problems.clear()
    chromium.open(write_report(evil_report(), tmp_path / "report.html").as_uri())
    chromium.run("query.value = 'hacked'; query.dispatchEvent(new Event('input'))")
    assert shown(chromium) == ["#7"]
    chromium.run("document.querySelector('#list button').click()")
    assert EVIL in chromium.run("document.getElementById('feature').textContent")
    assert chromium.run("document.title") == EVIL
    assert chromium.run("typeof window.hacked") == "undefined"
    assert chromium.run("document.querySelectorAll('main img').length") == 0
    assert chromium.problems == []
