"""The page in a real browser: it opens fast, draws, hides arms, zooms, prints, and runs nothing but its own scripts."""

import re

import pytest
from chromium import Page, find_chromium
from page_examples import EVIL, LINK, evil_page, page

from saelens_cosine.report.page import write_page

pytestmark = pytest.mark.skipif(
    find_chromium() is None,
    reason="no Chromium on the path (or named by CHROMIUM); install chromium or chromium-headless-shell",
)
CHARTS = 6


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_page(page(2000), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Page(find_chromium(), str(tmp_path_factory.mktemp("profile")))
    yield browser
    browser.close()


@pytest.fixture
def opened(chromium, report):
    chromium.problems.clear()
    chromium.open(report.as_uri())
    yield chromium
    assert chromium.problems == []


def wait(browser, condition: str):
    """Until a condition in the page holds, ten seconds at most: the machine may be busy."""
    met = f"new Promise((done) => {{ const end = Date.now() + 10000; const look = () => {{ const met = Boolean({condition});"
    assert browser.run(f"{met} met || Date.now() > end ? done(met) : setTimeout(look, 20); }}; look(); }})"), condition


def see(browser, chart: int):
    """Scroll to a chart and wait until it is drawn."""
    box = f"document.querySelectorAll('.chart')[{chart}]"
    browser.run(f"{box}.scrollIntoView({{ block: 'center' }})")
    wait(browser, f"{box}.querySelector('.main-svg')")


def place(browser, chart: int, mark: str, number: int = 0) -> tuple[float, float]:
    """Middle of one of a chart's marks in the window."""
    box = f"document.querySelectorAll('.chart')[{chart}].querySelectorAll('{mark}')[{number}].getBoundingClientRect()"
    return tuple(browser.run(f"(() => {{ const b = {box}; return [b.left + b.width / 2, b.top + b.height / 2] }})()"))


def move(browser, x: float, y: float):
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def press(browser, x: float, y: float, to: tuple[float, float] | None = None):
    """Press at a place and release there or at another."""
    browser.send("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", clickCount=1)
    x, y = to or (x, y)
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left", buttons=1)
    browser.send("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)


def hover_text(browser) -> str:
    wait(browser, "document.querySelector('.hovertext')")
    return browser.run("document.querySelector('.hovertext').textContent")


def test_two_thousand_features_open_fast(report, chromium):
    assert report.stat().st_size < 15e6
    assert any(chromium.open(report.as_uri()) < 3 for _ in range(5))  # the machine may be busy
    assert chromium.run("document.getElementById('found').textContent") == "2,000 of 2,000 features"


@pytest.mark.parametrize(("width", "mobile", "dark"), [(1400, False, False), (390, True, False), (1400, False, True)])
def test_every_chart_is_drawn_and_the_page_fits(report, chromium, width, mobile, dark):
    chromium.problems.clear()
    chromium.open(report.as_uri(), width=width, mobile=mobile, dark=dark)
    for chart in range(CHARTS):
        see(chromium, chart)
        drawn = chromium.run(
            f"""(() => {{ const chart = document.querySelectorAll('.chart')[{chart}];
            const inside = (part) => {{
              const a = part.getBoundingClientRect(), b = chart.getBoundingClientRect();
              return a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
            }};
            return [chart.clientWidth, inside(chart.querySelector('.main-svg')),
              [...chart.querySelectorAll('.trace.scatter :is(.js-line, .point)')].length,
              [...chart.querySelectorAll('.xtick text, .ytick text, .xtitle, .ytitle')].every(inside)] }})()"""
        )
        assert drawn[0] > 300
        assert drawn[1]
        assert drawn[2] > 0
        assert drawn[3]  # no label is cut off
    assert chromium.run("document.documentElement.scrollWidth") == width
    assert chromium.problems == []


def test_charts_are_drawn_when_they_are_near(opened):
    assert opened.run("document.querySelectorAll('.main-svg').length") < 3 * CHARTS
    see(opened, CHARTS - 1)


def test_a_wide_table_scrolls_in_its_own_box_from_the_keyboard(opened):
    sizes = opened.run(
        "(() => { const s = document.querySelector('#section-saes .scroll'); return [s.clientWidth, s.scrollWidth] })()"
    )
    assert sizes[1] > sizes[0]
    opened.run("document.querySelector('#section-saes .scroll').focus()")
    opened.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    wait(opened, "document.querySelector('#section-saes .scroll').scrollLeft > 0")


def test_values_are_shown_where_the_pointer_is(opened):
    see(opened, 0)
    move(opened, *place(opened, 0, ".point"))
    assert hover_text(opened) == "one: 1, 1.5 (1 to 2)"


def test_a_chart_zooms_and_returns(opened):
    chart = "document.querySelectorAll('.chart')[1]"
    see(opened, 1)
    left, right = opened.run(f"{chart}.layout.xaxis.range")
    x, y = place(opened, 1, ".nsewdrag")
    press(opened, x - 60, y - 60, to=(x + 60, y + 60))
    wait(opened, f"{chart}.layout.xaxis.range[0] > {left}")
    assert opened.run(f"{chart}.layout.xaxis.range[1]") < right
    opened.run(f"{chart}.querySelector('[data-title=\"Reset axes\"]').click()")
    wait(opened, f"{chart}.layout.xaxis.range[0] === {left}")


def test_no_button_hands_a_chart_to_others(opened):
    see(opened, 0)
    titles = opened.run(
        "[...document.querySelector('.chart').querySelectorAll('.modebar-btn')].map((b) => b.dataset.title.toLowerCase())"
    )
    assert titles == ["download plot as a png", "zoom", "pan", "zoom in", "zoom out", "reset axes"]
    opened.run("document.querySelector('.chart [data-title^=\"Download\"]').click()")
    opened.run("new Promise((done) => setTimeout(done, 300))")  # the picture is made without a fault of the policy


def test_an_arm_is_hidden_by_its_box_from_the_keyboard_in_every_chart(opened):
    shown = "(i) => document.querySelectorAll('.chart')[i].data.map((trace) => trace.visible)"
    see(opened, 0)
    see(opened, 1)
    opened.run("document.getElementById('show0').focus()")
    opened.press(" ")
    assert opened.run(f"[0, 1].map({shown})") == [[False, True]] * 2
    see(opened, 4)  # drawn afterwards
    assert opened.run(f"[4].map({shown})") == [[False, False]]
    opened.run("document.getElementById('show0').focus()")
    opened.press(" ")
    assert opened.run(f"[0, 1, 4].map({shown})") == [[True] * 2] * 3


def test_a_point_of_a_scatter_opens_its_feature(opened):
    see(opened, 4)
    chart = "document.querySelectorAll('.chart')[4]"
    number = opened.run(f"{chart}.data[0].customdata.indexOf('0/2')")
    # alone, so that no neighbour lies above it
    opened.run(
        f"Plotly.restyle({chart}, {{ x: [{chart}.data[0].x.map((v, i) => i === {number} ? 0.5 : null)] }}, [0]); 0"
    )
    x, y = place(opened, 4, ".point")
    move(opened, x, y)
    assert hover_text(opened).startswith("one: 2: ")
    press(opened, x, y)
    wait(opened, "document.querySelector('#feature h3').textContent === 'Feature 2 of one'")


def test_colours_follow_the_scheme(report, chromium):
    found = []
    for dark in (False, True):
        chromium.open(report.as_uri(), width=1400, dark=dark)
        see(chromium, 0)
        found.append(chromium.run("getComputedStyle(document.querySelector('.chart .js-line')).stroke"))
    assert found == ["rgb(0, 114, 178)", "rgb(74, 168, 224)"]
    chromium.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    wait(chromium, "getComputedStyle(document.querySelector('.chart .js-line')).stroke === 'rgb(0, 114, 178)'")


def test_it_prints_with_every_chart(opened):
    opened.open(opened.run("location.href"), width=794, dark=True)  # A4 at 96 dots per inch
    opened.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert opened.run("document.documentElement.scrollWidth") == 794
        hidden = "['nav', '#controls', '#results'].map((s) => getComputedStyle(document.querySelector(s)).display)"
        assert opened.run(hidden) == ["none"] * 3
        assert opened.run("document.querySelector('.legend label').getBoundingClientRect().height") > 0
    finally:
        opened.send("Emulation.setEmulatedMedia", media="")
    opened.run(
        "addEventListener('beforeprint', () => { window.printed = [document.querySelectorAll('.main-svg').length,"
        "getComputedStyle(document.querySelector('.chart .js-line')).stroke] })"
    )
    pdf = opened.pdf()
    assert opened.run("window.printed") == [3 * CHARTS, "rgb(0, 114, 178)"]  # on light paper
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 15


def test_hostile_text_does_nothing_and_is_shown_as_it_is(chromium, tmp_path):
    chromium.problems.clear()
    chromium.open(write_page(evil_page(), tmp_path / "report.html").as_uri())
    for chart in range(2):
        see(chromium, chart)
    texts = chromium.run("[...document.querySelectorAll('.chart text')].map((t) => t.textContent)")
    assert EVIL in texts  # an axis
    assert LINK in texts
    move(chromium, *place(chromium, 0, ".point"))
    # in lines, so blanks at their ends are gone
    assert hover_text(chromium).replace(" ", "") == f"{EVIL}:{LINK}".replace(" ", "")
    chromium.run("query.value = 'hacked'; query.dispatchEvent(new Event('input'))")
    chromium.run("document.querySelector('#list button').click()")
    assert EVIL in chromium.run("document.getElementById('feature').textContent")
    assert chromium.run("document.title") == EVIL
    assert chromium.run("typeof window.hacked") == "undefined"
    assert chromium.run("document.querySelectorAll('main img, .chart svg :is(a, image)').length") == 0
    assert chromium.problems == []
